"""HybridKV, re-implemented (arXiv 2604.05887): classify heads online, budget them by type, prune or retrieve."""

from __future__ import annotations

import torch

from sglang_hybridkv.budget import apportion, head_weights
from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptObservation
from sglang_hybridkv.select import text_first_order


class HybridKV(Compressor):
    """Static heads (statistic >= theta) keep a text-first pruned set, dynamic heads retrieve chunks."""

    name = "hybridkv"

    def plan(self, observation: PromptObservation, total_head_pages: int, *, retrieval: bool) -> HeadPlan:
        """METHOD sections 1 and 2; no host sync."""
        config, statistic = self.config, observation.statistic
        is_dynamic = statistic < config.theta if retrieval else torch.zeros_like(statistic, dtype=torch.bool)
        weights = head_weights(statistic.flatten(), is_dynamic.flatten(), config.dynamic_share, config.static_weight)
        floor = min(config.min_head_pages, observation.num_pages)
        pages = apportion(weights, total_head_pages, floor, observation.num_pages)
        return HeadPlan(is_dynamic, pages.view_as(statistic))

    def rank_tokens(self, observation: PromptObservation, plan: HeadPlan) -> torch.Tensor:
        """METHOD section 3."""
        page_size = observation.salience.shape[-1] // observation.num_pages
        return text_first_order(
            observation.salience,
            observation.is_text,
            plan.num_head_pages * page_size,
            num_sink_tokens=self.config.num_sink_tokens,
            recent_window=self.config.recent_window,
            text_share=self.config.text_share,
        )
