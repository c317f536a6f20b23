"""What the scheduler knows of its pool: the leak check finds all pages, the log line says what compression saves."""

from __future__ import annotations

from typing import Any

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import settings

_OBSERVER = "sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver"


def describe(stats: Any, observer: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER get_pool_stats: the same figures, with more to say where they are logged."""
    if settings.active() is None:
        return None
    from sglang_hybridkv.srt.pool_stats import HybridPoolStats

    return HybridPoolStats.of(stats, observer.tree_cache.compression)


def add_unlisted(held_tokens: int, observer: Any) -> int | None:
    """AFTER session_held_tokens: with the compressed pages that no row shows; the leak check counts rows and the tree.

    It has no other summand for pages that belong to a request and are not in its row.
    """
    if settings.active() is None:
        return None
    return held_tokens + int(observer.tree_cache.compression.ledger.unlisted_tokens())


ENTRIES = (
    Hook(
        target=f"{_OBSERVER}.session_held_tokens",
        kind="after",
        function=add_unlisted,
        why="a page that belongs to a request and is not in its row counts as lost",
        until="the leak check asks the tree, or the allocator, what else is held",
    ),
    Hook(
        target=f"{_OBSERVER}.get_pool_stats",
        kind="after",
        function=describe,
        why="the words of the log line come from a class that no flag names",
        until="plugins can add to the log line of a batch",
    ),
)
