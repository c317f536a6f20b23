"""Every registered attention backend can become one that serves compressed requests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from hybridkv_patches.entry import ProcessEntry
from sglang_hybridkv.srt import refusals, settings


class HybridFactory:
    """A backend's factory that makes what it builds ours, where a server compresses."""

    def __init__(self, stock: Callable[[Any], Any]):
        functools.update_wrapper(self, stock)
        self.stock = stock

    def __call__(self, runner: Any) -> Any:
        backend = self.stock(runner)
        if settings.active() is None or getattr(runner, "is_draft_worker", False):
            return backend
        from sglang_hybridkv.srt.backends import make_hybrid

        return make_hybrid(backend)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoriesEntry(ProcessEntry):
    """Factories wrapped in place, under their own names: SGLang compares backend names as strings."""

    kind: str = "registry entries"

    def install(self) -> None:
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        for name, factory in list(ATTENTION_BACKENDS.items()):
            if not isinstance(factory, HybridFactory):
                ATTENTION_BACKENDS[name] = HybridFactory(factory)

    def is_installed(self) -> bool:
        """Of the backends that a compressing server may have; the others were refused before."""
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        supported = {name for names in refusals.ATTENTION_BACKENDS.values() for name in names}
        return all(isinstance(ATTENTION_BACKENDS.get(name), HybridFactory) for name in supported)


ENTRIES = (
    FactoriesEntry(
        target="sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS",
        why="the registry is a dict, whose entries SGLang's hooks cannot wrap; a backend under a new name is not taken "
        "for the one that it extends",
        until="SGLang asks backends what they can do instead of comparing their names",
    ),
)
