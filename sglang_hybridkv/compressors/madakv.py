"""MadaKV (ACL 2025, arXiv 2506.15724; no public code): each head splits its budget by the modality it prefers."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptObservation
from sglang_hybridkv.compressors.token_order import TokenOrder
from sglang_hybridkv.config import CompressorConfig, PoolKernel


class MadaKVConfig(CompressorConfig):
    """No pooling, and the mass that defines a layer's need."""

    pool_kernel: PoolKernel = 1
    need_mass: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.9,
        description="share of each modality's attention that a head's rows should hold; theta in the paper (inferred)",
    )


class MadaKV(Compressor):
    """Within a head, text and images get what the proxy rows pay to each; layers get what they need.

    A head's need is the fewest tokens of each modality that hold `need_mass` of its attention. The formulas were
    read in a published summary, the value of theta is not in it. Deviations: the paper goes layer by layer and
    passes a layer's surplus or debt on to those after it; here the whole prompt is seen first and every layer's
    budget is proportional to its need. Proxy rows are the last `observation_rows`; sinks and recent window are kept.
    """

    name = "madakv"
    config_class = MadaKVConfig
    config: MadaKVConfig

    def weigh_heads(self, observation: PromptObservation, total_head_pages: int) -> torch.Tensor:
        """Mean need of the layer's heads, in tokens."""
        need = torch.zeros_like(observation.statistic)
        for member in (observation.is_text, ~observation.is_text):
            mass = observation.salience.masked_fill(~member, 0.0).sort(dim=-1, descending=True).values
            total = mass.sum(-1, keepdim=True)
            need += ((mass.cumsum(-1) < self.config.need_mass * total).sum(-1) + 1) * (total > 0).squeeze(-1)
        return need.mean(dim=1, keepdim=True).expand_as(need)

    def rank_tokens(self, observation: PromptObservation, plan: HeadPlan) -> TokenOrder:
        """The best text and the best visual tokens, in the head's proportion, ahead of the rest."""
        num_kept = (plan.num_head_pages * observation.page_size).unsqueeze(-1)
        num_text = self.text_places(observation, num_kept)
        # Forced tokens come first here, so they count for their modality before places are handed out.
        order = self.order_tokens(observation).sorted()
        is_text = observation.is_text[order]
        chosen = torch.where(is_text, is_text.cumsum(-1) <= num_text, (~is_text).cumsum(-1) <= num_kept - num_text)
        return self.order_tokens(observation, torch.zeros_like(chosen).scatter_(-1, order, chosen))

    def text_places(self, observation: PromptObservation, num_kept: torch.Tensor) -> torch.Tensor:
        """[L, H, 1], int64: text's share of num_kept [L, H, 1]; what one modality cannot use goes to the other."""
        is_text = observation.is_text
        mass = observation.salience.sum(-1, keepdim=True)
        text_mass = observation.salience.masked_fill(~is_text, 0.0).sum(-1, keepdim=True)
        share = torch.where(mass > 0, text_mass / mass, 0.5)
        wanted = (share * num_kept).round().to(torch.int64)
        num_text, num_visual = is_text.sum(), (~is_text).sum()
        return wanted.clamp(min=num_kept - num_visual).minimum(num_text)
