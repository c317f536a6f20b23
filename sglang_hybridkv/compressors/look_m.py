"""LOOK-M (arXiv 2406.18139; public code SUSTechBruce/LOOK-M): text first, evicted visual rows merged into kept ones."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import Field

from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptObservation
from sglang_hybridkv.compressors.token_order import TokenOrder
from sglang_hybridkv.config import CompressorConfig, NumSinkTokens, PoolKernel

_BLOCK = 1024  # rows whose similarities are in memory at once


class LookMConfig(CompressorConfig):
    """No sinks and no pooling, half the rows for recent tokens, as in the public code."""

    num_sink_tokens: NumSinkTokens = 0
    pool_kernel: PoolKernel = 1
    recent_share: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5, description="share of a head's rows that the last tokens get; recent_window tokens at least"
    )
    merging: Literal["averaged", "pivotal", "weighted", "none"] = Field(
        "pivotal", description="how evicted visual rows are merged into the kept row with the most similar key"
    )


class LookM(Compressor):
    """Equal budgets; recent tokens, then text, then visual tokens by attention; evicted visual rows are merged.

    With e_1 .. e_n the evicted rows whose key is most similar (cosine) to that of kept row c, c becomes the mean of
    c and e_i ("averaged"), of c and (e_i + c) / 2 ("pivotal"), or of c and s_i e_i with the similarity s_i
    ("weighted"), for keys and values alike. Deviations: scores are those of the last `observation_rows` queries,
    not of all; in the public code text survives beyond the budget, here it is ranked by its score and capped; all
    evicted visual rows are merged (the public code drops those of low similarity in two of its modes, with indices
    that do not fit), evicted text never; negative similarities weigh 0.
    """

    name = "look-m"
    config_class = LookMConfig
    config: LookMConfig
    merges = True

    def rank_tokens(self, observation: PromptObservation, plan: HeadPlan) -> TokenOrder:
        """Recent tokens, text, visual tokens."""
        num_kept = plan.num_head_pages * observation.page_size
        num_tokens = observation.salience.shape[-1]
        positions = torch.arange(num_tokens, device=num_kept.device)
        recent = positions >= (num_tokens - (self.config.recent_share * num_kept).to(torch.int64)).unsqueeze(-1)
        return self.order_tokens(observation, 2 * recent + observation.is_text.to(torch.uint8))

    def merge(
        self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, is_text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Head by head, as in the class's text; rows that nothing is merged into stay bit for bit."""
        if self.config.merging == "none":
            return keys, values
        merged = [self._merge_head(*rows, is_text) for rows in zip(keys, values, kept, strict=True)]
        return torch.stack([k for k, _ in merged]), torch.stack([v for _, v in merged])

    def _merge_head(
        self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, is_text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_evicted = (~kept & ~is_text).unsqueeze(-1)  # [N, 1]
        candidates = kept.to(torch.uint8).argsort(descending=True, stable=True)[: self._most_kept(len(kept))]
        unit = torch.nn.functional.normalize(keys.float(), dim=-1)
        others = ~kept[candidates]
        best = [
            (block @ unit[candidates].T).masked_fill(others, -float("inf")).max(dim=1) for block in unit.split(_BLOCK)
        ]
        similarity = torch.cat([b.values for b in best]).clamp(min=0.0).unsqueeze(-1)
        target = candidates[torch.cat([b.indices for b in best])]
        count = torch.zeros(len(keys), 1, device=keys.device).index_add_(0, target, is_evicted.float())
        out = []
        for rows in (keys, values):
            full = rows.float()
            entering, anchor = full, full[target]
            if self.config.merging == "pivotal":
                entering = (entering + anchor) / 2
            elif self.config.merging == "weighted":
                entering = similarity * entering
            mean = full.clone().index_add_(0, target, entering.where(is_evicted, 0.0)) / (count + 1)
            out.append(torch.where(count > 0, mean.to(rows.dtype), rows))
        return out[0], out[1]

    def _most_kept(self, num_tokens: int) -> int:
        """Rows that a head keeps at most, as all share the budget equally; the host knows no more."""
        page_size = self.config.page_size
        return min(num_tokens, math.ceil(Fraction(repr(self.config.budget)) * num_tokens / page_size) * page_size)
