"""What was timed was right: decode attention beside exact attention, for a few requests; and how a check fails."""

from __future__ import annotations

import torch

from benchmarks.gpu_check.pool import Pool
from hybridkv_kernels.decode_attn.naive import layer_head_pages

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest error as a share of the largest number of a request's output: the second product's inputs are rounded, and
the output."""


class Mismatch(Exception):
    """A check did not hold."""


def expect(condition: bool, what: str) -> None:
    """Mismatch with `what` unless the condition holds."""
    if not condition:
        raise Mismatch(what)


def check_attention(pool: Pool, layer_idx: int, q: torch.Tensor, row: int, out: torch.Tensor) -> float:
    """Largest error of one request's `out` [H * G, D] for `q`, as a share of its largest number; Mismatch beyond it."""
    expect(bool(out.isfinite().all()), f"decode_attn: {int((~out.isfinite()).sum())} outputs are not finite")
    exact = exact_attention(pool, layer_idx, q, row)
    error = float((out.double() - exact).abs().max() / exact.abs().max())
    tolerance = TOLERANCE[pool.shape.dtype]
    expect(error <= tolerance, f"decode_attn: largest relative error {error:.2e}, tolerance {tolerance:.0e}")
    return error


def exact_attention(pool: Pool, layer_idx: int, q: torch.Tensor, row: int) -> torch.Tensor:
    """[H * G, D], fp64: attention of one request over the rows that its heads hold now, and its tail."""
    tail = pool.req_to_token[row, int(pool.table.covered[row]) : pool.seq_lens[row]].long()
    keys, values = (rows[tail].transpose(0, 1).double() for rows in pool.views.layer_rows(layer_idx))  # [H, N, D]
    mask = torch.ones(keys.shape[:2], dtype=torch.bool, device=q.device)
    if pool.table.num_pages[row] > 0:
        ids, is_real = layer_head_pages(pool.table, row, layer_idx)
        kept = (pages[ids].flatten(1, 2).double() for pages in (pool.views.k_pages, pool.views.v_pages))
        keys, values = (torch.cat((mine, more), dim=1) for mine, more in zip(kept, (keys, values), strict=True))
        mask = torch.cat((is_real, mask), dim=1)
    grouped = q.double().view(len(keys), -1, q.shape[-1])  # [H, G, D]
    logits = grouped @ keys.transpose(1, 2) * pool.scaling
    return (logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ values).flatten(0, 1)
