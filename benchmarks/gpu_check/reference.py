"""Compare decode attention with exact attention for a few requests: what was timed must be right."""

from __future__ import annotations

import torch

from benchmarks.gpu_check.pool import Pool, Request
from hybridkv_kernels.decode_attn.naive import layer_head_pages

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest error as a share of the largest number of a request's output. The inputs of the second product are rounded,
and so is the output."""


class Mismatch(Exception):
    """A check did not hold."""


def expect(condition: bool, what: str) -> None:
    """Mismatch with `what` unless the condition holds."""
    if not condition:
        raise Mismatch(what)


def check_attention(pool: Pool, layer_idx: int, q: torch.Tensor, request: Request, out: torch.Tensor) -> float:
    """Largest error of one request's `out` [H * G, D] for `q`, as a share of its largest number; Mismatch beyond it."""
    expect(bool(out.isfinite().all()), f"decode_attn: {int((~out.isfinite()).sum())} outputs are not finite")
    exact = exact_attention(pool, layer_idx, q, request)
    error = float((out.double() - exact).abs().max() / exact.abs().max())
    tolerance = TOLERANCE[pool.shape.dtype]
    expect(error <= tolerance, f"decode_attn: largest relative error {error:.2e}, tolerance {tolerance:.0e}")
    return error


def exact_attention(pool: Pool, layer_idx: int, q: torch.Tensor, request: Request) -> torch.Tensor:
    """[H * G, D], fp64: attention of one request over the rows that its heads hold now, and its tail."""
    tail = pool.req_to_token[request.row, int(pool.table.covered[request.row]) : request.seq_len].long()
    keys, values = (rows[tail].transpose(0, 1) for rows in pool.views.layer_rows(layer_idx))  # [H, N, D]
    mask = torch.ones(keys.shape[:2], dtype=torch.bool, device=q.device)
    if pool.table.num_pages[request.row] > 0:
        ids, is_real = layer_head_pages(pool.table, request.row, layer_idx)
        kept = (pages[ids].flatten(1, 2) for pages in (pool.views.k_pages, pool.views.v_pages))
        keys, values = (torch.cat((mine, more), dim=1) for mine, more in zip(kept, (keys, values), strict=True))
        mask = torch.cat((is_real, mask), dim=1)
    return full_attention(q, keys, values, pool.scaling, mask)


def full_attention(
    q: torch.Tensor,
    keys_HND: torch.Tensor,
    values_HND: torch.Tensor,
    scaling: float,
    keep_HN: torch.Tensor | None = None,
) -> torch.Tensor:
    """[H * G, D], fp64: one query's attention over the kept keys, head by head."""
    q_HGD = q.double().view(len(keys_HND), -1, q.shape[-1])
    logits = q_HGD @ keys_HND.double().transpose(1, 2) * scaling
    if keep_HN is not None:
        logits = logits.masked_fill(~keep_HN[:, None], float("-inf"))
    return (logits.softmax(-1) @ values_HND.double()).flatten(0, 1)
