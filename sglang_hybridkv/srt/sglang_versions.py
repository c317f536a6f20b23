"""The versions of SGLang that are supported, and all that differs between them.

The rest of the project speaks the interface of SGLang 0.5.22 and later, where a tree takes the keys and values of a
request by `checkpoint`, whether it goes on or has ended, and a request holds one lock of the tree. What 0.5.21 has
instead is told by the objects themselves, not by a number. Nothing of SGLang is imported before it is needed.
"""

from __future__ import annotations

from typing import Any

SUPPORTED = ">=0.5.21,<0.5.24"


def is_supported(installed: str) -> bool:
    """Whether `installed`, a version of SGLang, is among the supported ones; pre-releases of the first are not."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(SUPPORTED).contains(installed, prereleases=True)


def tree_class() -> Any:
    """SGLang's radix tree, with `checkpoint`."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    return UnifiedRadixCache if hasattr(UnifiedRadixCache, "checkpoint") else _with_checkpoint(UnifiedRadixCache)


def _with_checkpoint(stock: Any) -> Any:
    class CheckpointingRadixCache(stock):
        """SGLang 0.5.21 calls `insert_req` for a request that has ended and `cache_unfinished_req` for the others."""

        def checkpoint(self, req, *, up_to, **kwargs):
            if req.finished():
                super().insert_req(req, up_to=up_to, **kwargs)
            else:
                super().cache_unfinished_req(req, **kwargs)

        def insert_req(self, req, *, up_to, **kwargs):
            self.checkpoint(req, up_to=up_to, **kwargs)

        def cache_unfinished_req(self, req, **kwargs):
            self.checkpoint(req, up_to=extend_end(req), **kwargs)

    return CheckpointingRadixCache


def take_lock(tree: Any, req: Any) -> None:
    """Keep the tree from evicting what `req` has found there, as SGLang does on admission."""
    if hasattr(req, "lock_receipt"):
        req.lock_receipt = tree.inc_lock_ref(req.last_node).to_dec_params()
    else:
        req.lock = tree.lock(req.last_node)


def drop_lock(tree: Any, req: Any) -> None:
    """Let the tree evict what `req` holds of it. SGLang, which does so when a request ends, then finds nothing held."""
    if hasattr(req, "lock_receipt"):
        from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams

        tree.unpin(req)
        req.lock_receipt = DecLockRefParams()
    else:
        tree.unlock(req.lock)
        req.lock = None
    req.last_node = None


def prefix_len(req: Any) -> int:
    """Tokens of `req` that are computed already: found in the tree, or in earlier parts of its prefill."""
    return len(req.prefix_indices) if hasattr(req, "prefix_indices") else req.prefix_len


def extend_end(req: Any) -> int:
    """Where the part of `req` ends, in tokens from its start, that is prefilled now."""
    return req.extend_range.end if hasattr(req, "extend_range") else req.extend_end


def set_extend_end(req: Any, end: int) -> None:
    """Let the next part of the prefill of `req` end there."""
    if hasattr(req, "extend_range"):
        req.set_extend_range(prefix_len(req), end)
    else:
        req.extend_end = end


def note_row(req: Any, row: Any) -> None:
    """`row`, the slots of `req`, was rewritten; 0.5.21 keeps a copy of those of its prefix."""
    if hasattr(req, "prefix_indices"):
        req.prefix_indices = row[: len(req.prefix_indices)].long().clone()


def release(tree: Any, req: Any) -> None:
    """SGLang's `release_kv_cache`: give all back that `req` holds, and let nothing of it enter the tree."""
    from sglang.srt.mem_cache import common

    flag = "checkpoint" if hasattr(common, "checkpoint_kv_cache") else "is_insert"
    common.release_kv_cache(req, tree, **{flag: False})
