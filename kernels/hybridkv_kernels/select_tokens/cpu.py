"""C++ twin of `select_tokens`: entries are shared out over threads."""

from __future__ import annotations

import ctypes

import torch

from hybridkv_kernels import cpu


class SelectArgs(ctypes.Structure):
    """Mirror of SelectArgs in cpu/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("score", "num_selected", "tier", "out")),
        *((name, ctypes.c_int64) for name in ("num_entries", "num_tokens", "tier_stride", "num_first", "num_last")),
        ("num_threads", ctypes.c_int32),
    ]


def select_tokens(
    score: torch.Tensor, num_selected: torch.Tensor, tier: torch.Tensor | None, num_first: int, num_last: int
) -> torch.Tensor:
    """Arguments and result as the public function's."""
    score, num_selected = score.contiguous(), num_selected.contiguous()
    out = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    tier = None if tier is None else tier.contiguous()
    arguments = SelectArgs(
        score.data_ptr(),
        num_selected.data_ptr(),
        None if tier is None else tier.data_ptr(),
        out.data_ptr(),
        *score.shape,
        0 if tier is None or tier.ndim == 1 else score.shape[1],
        num_first,
        num_last,
        torch.get_num_threads(),
    )
    cpu.call("hk_select", arguments)
    return out
