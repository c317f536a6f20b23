"""Faults that a soak has to find: ``python -m tests.e2e.soak --plant NAME``.

SGLang imports this package in each process of a server whose environment has it as SGLANG_EXTERNAL_MODEL_PACKAGE. It
has no models; it breaks what the environment names, once a file exists, and on every EVERY-th call only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang_hybridkv.cache import compress
from sglang_hybridkv.cache.host_store import HostStore
from sglang_hybridkv.cache.observation import PromptObserver
from sglang_hybridkv.requests.stats import CompressionStats

_FAULT, _BEGUN = "HYBRIDKV_PLANTED_FAULT", "HYBRIDKV_PLANTED_FAULT_BEGUN"
EVERY = 97
KEPT_BYTES = 2**18  # that a request leaves behind; every one does

Faulty = Callable[..., Any]
_kept: list[bytes] = []


def _loses_pages(stock: Faulty, *_: Any) -> None:
    """Pages of the pool are not given back."""


def _loses_host_pages(stock: Faulty, *_: Any) -> None:
    """Pages of the host store are not given back."""


def _loses_kept_rows(stock: Faulty, k_flat: torch.Tensor, v_flat: torch.Tensor, source: Any, destination: Any) -> None:
    """Eight rows of one head are zeros."""
    stock(k_flat, v_flat, source, destination)
    k_flat[destination[-8:]], v_flat[destination[-8:]] = 0, 0


def _writes_into_the_prefix(stock: Faulty, tree: Any, req: Any, reservation: Any) -> None:
    """A page of the exact prefix is written to when the request no longer owns it."""
    views = tree.compression.cache.memory.views
    slots = tree.req_to_token_pool.req_to_token[req.kv.req_pool_idx][:8].long()
    stock(tree, req, reservation)
    views.v_flat[views.token_rows(torch.tensor(0), slots, torch.tensor(0))] = 0


def _observes_other_queries(stock: Faulty, observer: PromptObserver, row: int, window: range) -> None:
    """The last query is not observed."""
    stock(observer, row, window[:-1])


def _forgets_an_answer(stock: Faulty, streamer: Any, reqs: list[Any], *arguments: Any, **options: Any) -> None:
    """Requests that ended are not answered."""
    stock(streamer, [req for req in reqs if not req.finished()], *arguments, **options)


def _counts_too_few(stock: Faulty, *_: Any) -> None:
    """A compressed request is not counted."""


def _keeps_memory(stock: Faulty, *arguments: Any) -> None:
    """Some memory stays."""
    _kept.append(os.urandom(KEPT_BYTES))
    stock(*arguments)


def _owners() -> dict[str, tuple[Any, str, Faulty, int]]:
    from sglang_hybridkv.srt.allocator import HybridAllocator
    from sglang_hybridkv.srt.output_streamer import HybridOutputStreamer
    from sglang_hybridkv.srt.radix_cache import HybridRadixCache

    return {
        "pages": (HybridAllocator, "free_page_ids", _loses_pages, EVERY),
        "host_pages": (HostStore, "free", _loses_host_pages, EVERY),
        "kept_rows": (compress, "compact_kv", _loses_kept_rows, EVERY),
        "prefix": (HybridRadixCache, "_commit", _writes_into_the_prefix, EVERY),
        "plan": (PromptObserver, "watch", _observes_other_queries, EVERY),
        "answer": (HybridOutputStreamer, "stream_output", _forgets_an_answer, EVERY),
        "count": (CompressionStats, "count_compressed", _counts_too_few, EVERY),
        "memory": (CompressionStats, "count_compressed", _keeps_memory, 1),
    }


NAMES = tuple(_owners())


class Plant:
    """The fault of that name, for a server that is started with `env`; None is no fault."""

    def __init__(self, name: str | None):
        self.begun = Path(tempfile.mkdtemp(prefix="hybridkv-planted-")) / "begun"
        self.env = {"SGLANG_EXTERNAL_MODEL_PACKAGE": __name__, _FAULT: name, _BEGUN: str(self.begun)} if name else {}

    def begin(self) -> None:
        """From now on the fault shows."""
        self.begun.touch()


def _plant(owner: Any, name: str, faulty: Faulty, every: int) -> None:
    stock, calls, begun = getattr(owner, name), [0], Path(os.environ[_BEGUN])

    def broken(*arguments: Any, **options: Any) -> Any:
        calls[0] += begun.exists()
        is_due = calls[0] > 0 and calls[0] % every == 0
        return faulty(stock, *arguments, **options) if is_due else stock(*arguments, **options)

    setattr(owner, name, broken)


if _FAULT in os.environ:
    _plant(*_owners()[os.environ[_FAULT]])
