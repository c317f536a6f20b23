"""Which tokens a static head keeps, and which chunks a dynamic head starts with."""

from __future__ import annotations

import torch

_FORCED = 1 << 8  # above every tier that a method names


def pool_salience(salience: torch.Tensor, kernel: int, mode: str = "average") -> torch.Tensor:
    """[..., N]: "average" or "max" of `kernel` neighbouring tokens; the ends count real neighbours only."""
    if kernel == 1 or salience.shape[-1] == 0:
        return salience
    flat = salience.flatten(0, -2).unsqueeze(1)
    if mode == "max":
        pooled = torch.nn.functional.max_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    else:
        pooled = torch.nn.functional.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2, count_include_pad=False)
    return pooled.squeeze(1).view_as(salience)


def tiered_order(
    salience: torch.Tensor, tier: torch.Tensor | int, *, num_sink_tokens: int, recent_window: int
) -> torch.Tensor:
    """Order in which heads keep tokens: sinks and the recent window, then tier by tier the most salient.

    Parameters
    ----------
    salience : [L, H, N], fp32, not negative.
    tier : integers in [0, 256), broadcast against salience; a higher tier comes first.
    num_sink_tokens, recent_window : first and last tokens that come before everything else.

    Returns
    -------
    [L, H, N], int64. Token positions, the ones to keep first; ties go to the earlier token.
    """
    num_tokens = salience.shape[-1]
    positions = torch.arange(num_tokens, device=salience.device)
    forced = (positions < num_sink_tokens) | (positions >= num_tokens - recent_window)
    tiers = (forced * _FORCED + tier).expand_as(salience)
    # Two stable sorts instead of one of tier + salience: adding would round small saliences to ties.
    order = salience.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, tiers.gather(-1, order).argsort(dim=-1, descending=True, stable=True))


def text_first_order(
    salience: torch.Tensor,
    is_text: torch.Tensor,
    num_kept: torch.Tensor,
    *,
    num_sink_tokens: int,
    recent_window: int,
    text_share: float,
) -> torch.Tensor:
    """Order in which static heads keep tokens: sinks and the recent window, then text, then salient visual tokens.

    Parameters
    ----------
    salience : [L, H, N], fp32 in [0, 1].
    is_text : [N], bool.
    num_kept : [L, H], integer. Rows each head keeps; the first num_kept of the order.
    num_sink_tokens, recent_window : first and last tokens that come before everything else.
    text_share : text beyond this share of num_kept competes with visual tokens on salience alone.

    Returns
    -------
    [L, H, N], int64. Token positions, the ones to keep first. Source: HybridKV (arXiv 2604.05887), text-prior pruning.
    """
    text_rank = _rank(salience.masked_fill(~is_text, -1.0))
    preferred = is_text & (text_rank < (text_share * num_kept).unsqueeze(-1))
    return tiered_order(
        salience, preferred.to(torch.int64), num_sink_tokens=num_sink_tokens, recent_window=recent_window
    )


def chunk_salience(salience: torch.Tensor, page_size: int) -> torch.Tensor:
    """[L, H, C]: salience of each chunk of `page_size` tokens, N being a multiple of it."""
    return salience.unflatten(-1, (-1, page_size)).sum(dim=-1)


def _rank(score: torch.Tensor) -> torch.Tensor:
    order = score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
