"""Hierarchical budgets: whole head pages for every head, by one divisor method.

Webster's method hands out seats one by one to the largest weight / (2 seats + 1). Floors are seats everybody has
from the start, a head that holds the whole prompt leaves the race, and the order of the race does not depend on
the number of seats. So the laws of a budget hold by construction: the sum is the budget, every head has
its floor, a larger budget never takes a page from any head, and budget 1.0 gives every head everything. Both
levels, the split between head types and the weights inside a type, are weights of the same race.
"""

from __future__ import annotations

import torch

_LEAST_WEIGHT = 1e-6  # relative to the mean: a head without weight still takes what the others cannot hold
_LEAST_SUM = 1e-30  # all weights 0 means all equal


def head_weights(
    statistic: torch.Tensor, is_dynamic: torch.Tensor, dynamic_share: float | torch.Tensor, static_weight: str
) -> torch.Tensor:
    """Weights of all heads: level 1 splits by `dynamic_share`, level 2 weighs static heads, dynamic ones share evenly.

    Parameters
    ----------
    statistic, is_dynamic : [E], fp32 in [0, 1] and bool.
    dynamic_share : r in [0, 1], share of the budget for the dynamic heads, a number or a scalar tensor; all of it goes
        to the only type there is.
    static_weight : "sparsity" (S) | "density" (1 - S) | "uniform".

    Returns
    -------
    [E], fp64, positive.
    """
    value = statistic.to(torch.float64)
    value = {"sparsity": value, "density": 1.0 - value, "uniform": torch.ones_like(value)}[static_weight]
    static = (value.clamp(min=0.0) + _LEAST_WEIGHT).where(~is_dynamic, 0.0)
    weights = (1.0 - dynamic_share) * static / static.sum().clamp(min=_LEAST_WEIGHT)
    weights += dynamic_share * is_dynamic / is_dynamic.sum().clamp(min=1)
    return weights + _LEAST_WEIGHT / len(weights)


def lift_weights(weights: torch.Tensor) -> torch.Tensor:
    """Make weights [E] of any sign fp64 and positive: what is not above 0 gets next to nothing."""
    positive = weights.to(torch.float64).clamp(min=0.0)
    return positive + _LEAST_WEIGHT * positive.mean() + _LEAST_SUM


def share_by_ratio(is_dynamic: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return the scalar share, fp64, with which a dynamic head gets `ratio` times what static heads get on average."""
    num_dynamic = is_dynamic.sum(dtype=torch.float64)
    return ratio * num_dynamic / (ratio * num_dynamic + (is_dynamic.numel() - num_dynamic))


def apportion(weights: torch.Tensor, total: int, floor: int, cap: int) -> torch.Tensor:
    """Split `total` seats by Webster's method between `floor` and `cap` seats a head.

    Parameters
    ----------
    weights : [E], fp64, positive.
    total : seats, in [E * floor, E * cap].
    floor, cap : least and most seats of a head, 0 <= floor <= cap.

    Returns
    -------
    [E], int64, sums to `total`. Monotone in `total` for each head. No host sync.

    Raises
    ------
    ValueError
        `total` is outside [E * floor, E * cap].
    """
    num_heads = len(weights)
    if not num_heads * floor <= total <= num_heads * cap:
        raise ValueError(f"total: expected {num_heads * floor}..{num_heads * cap} seats, got {total}")
    seats = torch.arange(floor, cap, dtype=torch.float64, device=weights.device)
    # Transposed, so that equal weights take turns: among equal quotients the earlier seat comes first.
    quotients = (weights / (2.0 * seats[:, None] + 1.0)).flatten()
    order = quotients.argsort(descending=True, stable=True)[: total - num_heads * floor]
    winners = torch.zeros(len(quotients), dtype=torch.int64, device=weights.device)
    winners[order] = 1
    return winners.view(len(seats), num_heads).sum(dim=0) + floor
