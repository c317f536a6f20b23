"""The log line of a decode batch says how many of its requests are compressed, and what that saves."""

from __future__ import annotations

from typing import Any

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import settings


def describe(stats: Any, observer: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER get_pool_stats: the same figures, with more to say where they are logged."""
    if settings.active() is None:
        return None
    from sglang_hybridkv.srt.pool_stats import HybridPoolStats

    return HybridPoolStats.of(stats, observer.tree_cache.compression)


ENTRIES = (
    Hook(
        target="sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver.get_pool_stats",
        kind="after",
        function=describe,
        why="the words of the log line come from a class that no flag names",
        until="plugins can add to the log line of a batch",
    ),
)
