"""Quest (arXiv 2406.10774; public code mit-han-lab/Quest): every head retrieves pages by a bound on q . k."""

from __future__ import annotations

import torch

from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptObservation
from sglang_hybridkv.config import ChunkScore, RetrievalConfig


class QuestConfig(RetrievalConfig):
    """The bound from each page's minimum and maximum key."""

    chunk_score: ChunkScore = "quest"


class Quest(Compressor):
    """All heads are dynamic and share the budget equally.

    Deviations: Quest keeps all pages on the device and reads few, here the others are in host memory and the budget
    is what stays; it leaves the first two layers dense, here none; it chooses for each query head, here a KV head's
    group shares a choice (the largest bound); sinks and the recent window are always resident. With
    `on_host_store_full` "static" a request that does not fit keeps the most salient tokens instead.
    """

    name = "quest"
    config_class = QuestConfig

    def plan(self, observation: PromptObservation, total_head_pages: int, *, may_retrieve: bool) -> HeadPlan:
        """Equal pages; dynamic wherever retrieval is possible."""
        plan = super().plan(observation, total_head_pages, may_retrieve=may_retrieve)
        return HeadPlan(torch.full_like(plan.is_dynamic, may_retrieve), plan.num_head_pages)
