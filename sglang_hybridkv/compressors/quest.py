"""Quest (arXiv 2406.10774; public code mit-han-lab/Quest): every head retrieves pages by a bound on q . k."""

from __future__ import annotations

from sglang_hybridkv.compressors.base import Compressor, HeadPlan, PromptObservation
from sglang_hybridkv.compressors.hybridkv import lowest
from sglang_hybridkv.config import ChunkScore, RetrievalConfig


class QuestConfig(RetrievalConfig):
    """The bound from each page's minimum and maximum key."""

    chunk_score: ChunkScore = "quest"

    def fewest_dynamic_heads(self, num_heads: int, covered: int) -> int:
        """All."""
        return num_heads


class Quest(Compressor):
    """All heads are dynamic and share the budget equally.

    Deviations: Quest keeps all pages on the device and reads few, here the others are in host memory and the budget
    is what stays; it leaves the first two layers dense, here none; it chooses for each query head, here a KV head's
    group shares a choice (the largest bound); sinks and the recent window are always resident. With
    `on_host_store_full` "static" the heads that do not fit keep the most salient tokens instead: those whose attention
    is the sparsest.
    """

    name = "quest"
    config_class = QuestConfig

    def plan(self, observation: PromptObservation, total_head_pages: int, *, most_dynamic: int) -> HeadPlan:
        """Equal pages; as many heads as may be are dynamic."""
        plan = super().plan(observation, total_head_pages, most_dynamic=most_dynamic)
        return HeadPlan(lowest(observation.statistic, most_dynamic), plan.num_head_pages)
