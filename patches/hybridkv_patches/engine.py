"""``sglang.Engine(kv_compressor=...)``."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from hybridkv_patches.entry import ProcessEntry
from hybridkv_patches.server_args import adopt, claim_page_size, make_settings

_ENGINE_MODULE = "sglang.srt.entrypoints.engine"


class EngineServerArgs:
    """Stands in for ServerArgs where an Engine builds its arguments: takes the compressor's three away first."""

    def __init__(self, stock: Any):
        self.stock = stock

    def __call__(
        self,
        *args: Any,
        kv_compressor: str | None = None,
        kv_compressor_budget: float | None = None,
        kv_compressor_config: dict | str | None = None,
        **kwargs: Any,
    ) -> Any:
        settings = make_settings(kv_compressor, kv_compressor_budget, kv_compressor_config)
        if settings is None:
            return self.stock(*args, **kwargs)
        kwargs["page_size"] = claim_page_size(kwargs.get("page_size"), settings.config)
        server_args = self.stock(*args, **kwargs)
        adopt(server_args, settings)
        return server_args

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineArguments(ProcessEntry):
    """The class attribute that Engine.__init__ reads right after it has loaded the plugins."""

    kind: str = "class attribute"

    def install(self) -> None:
        engine = _engine()
        if engine is not None and not self.is_installed():
            engine.server_args_class = EngineServerArgs(engine.server_args_class)

    def is_installed(self) -> bool:
        return isinstance(getattr(_engine(), "server_args_class", None), EngineServerArgs)


def is_imported() -> bool:
    """Whether this process has the engine; one that has not is not in Engine.__init__."""
    return hasattr(_engine(), "server_args_class")


def _engine() -> Any:
    return getattr(sys.modules.get(_ENGINE_MODULE), "Engine", None)


ENTRIES = (
    EngineArguments(
        target=f"{_ENGINE_MODULE}.Engine.server_args_class",
        why="Engine.__init__ loads the plugins itself, so that a hook on it would miss the first engine",
        until="plugins can add server arguments",
    ),
)
