"""C++ twin of `score_heads`: one pass over the keys, no copy of the prompt."""

from __future__ import annotations

import ctypes

import torch

from hybridkv_kernels import cpu
from hybridkv_kernels.score_heads.naive import HIT_LEVEL, hit_ranks, join_statistics, num_captured

_STATISTICS = {"sparsity": 0, "top_mass": 1, "hit_cv": 2, "stability": 3, "capture": 4, "worst_capture": 5}
_SIZES = "num_rows num_q_heads num_kv_heads head_dim type num_threads num_statistics chunk_size num_sinks num_recent"


class ScoreArgs(ctypes.Structure):
    """Mirror of ScoreArgs in cpu/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "slots", "statistics", "out_statistic", "out_salience")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "low_rank", "high_rank", "num_captured")),
        *((name, ctypes.c_int32) for name in _SIZES.split()),
        *((name, ctypes.c_float) for name in ("scaling", "sparsity_fraction", "mass_fraction", "hit_level")),
    ]


def score_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor | None,
    scaling: float,
    statistic: str,
    sparsity_fraction: float,
    mass_fraction: float,
    chunk_size: int,
    capture_fraction: float,
    num_sinks: int = 0,
    num_recent: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as the public function's."""
    q, k = q.contiguous(), k.contiguous()
    slots = None if slots is None else slots.contiguous()
    num_tokens, num_kv_heads = len(k if slots is None else slots), k.shape[1]
    names = statistic.split("+")
    values, salience = torch.empty(num_kv_heads, len(names)), torch.empty(num_kv_heads, num_tokens)
    statistics = (ctypes.c_int32 * len(names))(*(_STATISTICS[name] for name in names))
    arguments = ScoreArgs(
        q.data_ptr(),
        k.data_ptr(),
        None if slots is None else slots.data_ptr(),
        ctypes.addressof(statistics),
        values.data_ptr(),
        salience.data_ptr(),
        num_tokens,
        *hit_ranks(num_tokens),
        num_captured(num_tokens, capture_fraction),
        q.shape[0],
        q.shape[1],
        num_kv_heads,
        q.shape[2],
        cpu.ELEMENT_TYPES[q.dtype],
        torch.get_num_threads(),
        len(names),
        chunk_size,
        num_sinks,
        num_recent,
        scaling,
        sparsity_fraction,
        mass_fraction,
        HIT_LEVEL,
    )
    cpu.call("hk_score", arguments)
    return join_statistics(list(values.T)), salience
