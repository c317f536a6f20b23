"""Observe prompts: attention of their last queries, per KV head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybridkv_kernels import checks, dispatch, gpu
from hybridkv_kernels.score_heads import cpu, naive

STATISTICS = ("sparsity", "top_mass", "hit_cv", "stability", "capture", "worst_capture")
_IMPLEMENTATIONS = {"naive": naive.score_heads, "cpu": cpu.score_heads}  # of one prompt
_score_together = gpu.twin("score_heads", "score_heads_batch")

Scores = tuple[torch.Tensor, torch.Tensor]


def score_heads(q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor | None = None, **settings: Any) -> Scores:
    """Statistic and salience of each KV head of one layer, from the last W queries of a prompt.

    `score_heads_batch` of this prompt alone, and its settings.
    """
    return score_heads_batch([(q, slots)], k, **settings)[0]


def score_heads_batch(
    prompts: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    k: torch.Tensor,
    *,
    scaling: float,
    statistic: str = "sparsity",
    sparsity_fraction: float = 0.01,
    mass_fraction: float = 0.9,
    chunk_size: int = 16,
    capture_fraction: float = 0.1,
    num_sinks: int = 0,
    num_recent: int = 0,
) -> list[Scores]:
    """Statistic and salience of each KV head of one layer, from the last queries of several prompts.

    Parameters
    ----------
    prompts : (q, slots) of each; W and N are its own.
        q : [W, H * G, D], bf16 | fp16 | fp32. Queries after RoPE of the last W prompt tokens, in order.
        slots : [N], int64. Token slots of the prompt in k, W <= N; None where k is the prompt.
    k : [slots, H, D], or [N, H, D] without `slots`, same dtype and device. Keys after RoPE of one layer of the pool.
    scaling : factor of q . k before the softmax.
    statistic : one of STATISTICS, or several joined by "+". In [0, 1]; high means that the head is safe to prune: few
        tokens ("sparsity", "top_mass"), or tokens that stay while the query moves ("hit_cv", "stability", "capture",
        "worst_capture").
    sparsity_fraction, mass_fraction, chunk_size : parameters of the statistics; see `naive`.
    capture_fraction : share of the keys that "capture" and "worst_capture" keep, in (0, 1).
    num_sinks, num_recent : keys that these two keep before all others: the first of the prompt, and those that end
        with the query's own. They count towards the share.

    Returns
    -------
    The following of each prompt, to the bit what it is without the others.

    statistic : [H], fp32; [H, S] of S statistics.
    salience : [H, N], fp32. Probability of each key, averaged over the rows and the group.

    Raises
    ------
    ValueError
        A shape, dtype, device, name or range is not as above.

    Notes
    -----
    On CUDA the prompts share three to seven launches, whose reads docs/performance.md counts. Scratch is H * W * N
    numbers of fp32 of each prompt, twice as many for "capture" and "worst_capture"; where that is more than 256 MiB,
    the prompts are taken in groups. On the CPU k is read once, and scratch takes W * H * G * N numbers of fp32.

    Source: HybridKV (arXiv 2604.05887).
    Its sparsity is VL-Cache's, per head, and "hit_cv" is CateKV's. "stability", "capture" and "worst_capture" are ours;
    the last takes the worst query head and row instead of the mean. They exist because heads that are sparse and move
    lose most when they are pruned; CateKV and HeteroCache also tell heads apart by drift. With one row all three are
    0, as nothing shows that the head stays where it is: it counts as dynamic.
    """
    checks.check_shape("k", k, (None, None, None))
    checks.check_dtype("k", k, checks.FLOATS)
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    for q, slots in prompts:
        _check_prompt(q, k, slots)
    if not set(statistic.split("+")) <= set(STATISTICS):
        raise ValueError(f"statistic: expected {', '.join(STATISTICS)}, or several joined by '+', got {statistic!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected a number of tokens above 0, got {chunk_size}")
    if not 0 < capture_fraction < 1:
        raise ValueError(f"capture_fraction: expected a number above 0 and below 1, got {capture_fraction!r}")
    for name, number in (("num_sinks", num_sinks), ("num_recent", num_recent)):
        if number < 0:
            raise ValueError(f"{name}: expected a number of keys, got {number}")
    settings = (scaling, statistic, sparsity_fraction, mass_fraction, chunk_size, capture_fraction)
    chosen = dispatch.choose(k.device, k.dtype, k.shape[2], prompts[0][0].shape[1] // k.shape[1])
    if chosen == "triton":
        return _score_together(list(prompts), k, *settings, num_sinks, num_recent)
    score = _IMPLEMENTATIONS[chosen]
    return [score(q, k, slots, *settings, num_sinks, num_recent) for q, slots in prompts]


def _check_prompt(q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor | None) -> None:
    if slots is not None:
        checks.check_shape("slots", slots, (None,))
        checks.check_dtype("slots", slots, (torch.int64,))
    num_kv_heads, head_dim = k.shape[1:]
    num_tokens = len(k if slots is None else slots)
    checks.check_same("q", q, "k", k)
    checks.check_shape("q", q, (None, None, head_dim))
    if q.shape[1] % num_kv_heads or not 1 <= q.shape[0] <= num_tokens:
        raise ValueError(f"q: expected 1..{num_tokens} rows of a multiple of {num_kv_heads} heads, got {list(q.shape)}")
