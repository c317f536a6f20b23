"""The radix tree's component of full attention caps inserts: our tree sees to it when it is built."""

from __future__ import annotations

from typing import Any

from hybridkv_patches.entry import ObjectEntry


def caps_inserts(tree: Any) -> bool:
    """Whether a hybrid tree decides how much of a request may enter it."""
    return bool(tree.caps_inserts())


ENTRIES = (
    ObjectEntry(
        target="sglang.srt.mem_cache.unified_cache.components.base.TreeComponent.prepare_for_caching_req",
        is_installed_on=caps_inserts,
        why="what is computed over compressed context must not enter the tree, and the tree's Rust core refuses a "
        "component of another class",
        until="UnifiedRadixCache asks a method of its own how much of a request may be inserted",
    ),
)
