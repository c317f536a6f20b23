"""Readable reference of `compact_kv`."""

import torch


def compact_kv(k: torch.Tensor, v: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """k[dst] = k[src] and v[dst] = v[src] where src is no negative number; arguments as the public function's."""
    src, dst = src[src >= 0], dst[src >= 0]
    k[dst] = k[src]
    v[dst] = v[src]
