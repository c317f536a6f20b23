"""Which tokens a static head keeps, and which chunks a dynamic head starts with."""

from __future__ import annotations

import dataclasses

import torch

from hybridkv_kernels.select_tokens import select_tokens
from hybridkv_kernels.select_tokens.naive import sort_tokens


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


@dataclasses.dataclass(frozen=True)
class TokenOrder:
    """Order in which heads keep tokens: forced ones, then tier by tier those with the largest score.

    What a head keeps is found without sorting all its tokens. Ties go to the earlier token.

    Attributes
    ----------
    score : [L, H, N], fp32.
    tier : bool or integers in [0, 256), broadcast against score; a higher tier comes first. None is one tier.
    num_sink_tokens, recent_window : first and last tokens that come before everything else.
    """

    score: torch.Tensor
    tier: torch.Tensor | None
    num_sink_tokens: int
    recent_window: int

    def first(self, num_kept: torch.Tensor) -> torch.Tensor:
        """[L, H, N], bool: the first num_kept [L, H], int64, tokens of each head."""
        tier = self.tier
        if tier is not None:
            tier = tier if tier.dtype == torch.bool else tier.to(torch.uint8)
            tier = tier.expand_as(self.score).flatten(0, 1) if tier.ndim > 1 else tier
        return select_tokens(
            self.score.flatten(0, 1),
            num_kept.flatten(),
            tier,
            num_first=self.num_sink_tokens,
            num_last=self.recent_window,
        ).view_as(self.score)

    def sorted(self) -> torch.Tensor:
        """[L, H, N], int64: the tokens in order."""
        return sort_tokens(self.score, self.tier, self.num_sink_tokens, self.recent_window)


def text_first_order(
    salience: torch.Tensor,
    is_text: torch.Tensor,
    num_kept: torch.Tensor,
    *,
    num_sink_tokens: int,
    recent_window: int,
    text_share: float,
    least_kept: int = 0,
) -> TokenOrder:
    """Order in which static heads keep tokens: sinks and the recent window, then text, then salient visual tokens.

    Parameters
    ----------
    salience : [L, H, N], fp32 in [0, 1].
    is_text : [N], bool.
    num_kept : [L, H], int64. Rows each head keeps; the first num_kept of the order.
    num_sink_tokens, recent_window : first and last tokens that come before everything else.
    text_share : text beyond this share of num_kept competes with visual tokens on salience alone.
    least_kept : rows that each head keeps at least, as far as the host knows; spares a selection where it is enough.

    Notes
    -----
    Source: HybridKV (arXiv 2604.05887), text-prior pruning.
    """
    tier = is_text
    # Where all text is ahead, and no forced token is left out, text that is not among the best num_kept is not kept.
    if text_share < 1 or least_kept < num_sink_tokens + recent_window:
        most = (text_share * num_kept).ceil().to(torch.int64)
        best_text = TokenOrder(salience.masked_fill(~is_text, -1.0), None, 0, 0).first(most)
        tier = is_text & best_text
    return TokenOrder(salience, tier, num_sink_tokens, recent_window)


def chunk_salience(salience: torch.Tensor, page_size: int) -> torch.Tensor:
    """[L, H, C]: salience of each chunk of `page_size` tokens, N being a multiple of it."""
    return salience.unflatten(-1, (-1, page_size)).sum(dim=-1)
