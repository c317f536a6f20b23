"""Readable reference of `select_tokens`."""

import torch

_FORCED = 1 << 8  # above every tier


def select_tokens(
    score: torch.Tensor, num_selected: torch.Tensor, tier: torch.Tensor | None, num_first: int, num_last: int
) -> torch.Tensor:
    """Arguments and result as the public function's."""
    return first_of_order(sort_tokens(score, tier, num_first, num_last), num_selected)


def first_of_order(order: torch.Tensor, num_selected: torch.Tensor) -> torch.Tensor:
    """[..., N], bool: the first num_selected [...] of tokens [..., N] in order; fewer where one is named twice."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.full_like(order, order.shape[-1]).scatter_(-1, order, places)
    return rank < num_selected.unsqueeze(-1)


def sort_tokens(score: torch.Tensor, tier: torch.Tensor | None, num_first: int, num_last: int) -> torch.Tensor:
    """[..., N], int64: the tokens in order, of scores [..., N] and tiers that are broadcast against them."""
    num_tokens = score.shape[-1]
    positions = torch.arange(num_tokens, device=score.device)
    forced = (positions < num_first) | (positions >= num_tokens - num_last)
    tiers = (forced * _FORCED + (0 if tier is None else tier.to(torch.int64))).expand_as(score)
    # Two stable sorts in place of one of tier + score: adding would round small scores to ties.
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, tiers.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
