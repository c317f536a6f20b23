"""``sglang.Engine(kv_compressor=...)``."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from hybridkv_patches.entry import ProcessEntry
from hybridkv_patches.server_args import adopt, claim_page_size, make_settings

_ENGINE_MODULE = "sglang.srt.entrypoints.engine"
_KEYWORDS = ("kv_compressor", "kv_compressor_budget", "kv_compressor_events", "kv_compressor_config")
BESIDE_SERVER_ARGS = (
    "sglang.Engine reads no {keywords} beside server_args; build these with prepare_server_args(['--kv-compressor', "
    "...]), or give all arguments to Engine by keyword"
)


class EngineServerArgs:
    """Stands in for ServerArgs where an Engine builds its arguments: takes the compressor's away first."""

    def __init__(self, stock: Any):
        self.stock = stock

    def __call__(
        self,
        *args: Any,
        kv_compressor: str | None = None,
        kv_compressor_budget: float | None = None,
        kv_compressor_events: str | None = None,
        kv_compressor_config: dict | str | None = None,
        **kwargs: Any,
    ) -> Any:
        settings = make_settings(kv_compressor, kv_compressor_budget, kv_compressor_config, kv_compressor_events)
        if settings is None:
            return self.stock(*args, **kwargs)
        kwargs["page_size"] = claim_page_size(kwargs.get("page_size"), settings.config)
        server_args = self.stock(*args, **kwargs)
        adopt(server_args, settings)
        return server_args

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)


class GuardedServerArgs:
    """`Engine.server_args`: what Engine.__init__ assigns there right after it chose between its two kinds of arguments.

    It drops every keyword beside `server_args` without a word; ours are refused.
    """

    def __get__(self, engine: Any, owner: type | None = None) -> Any:
        if engine is None:
            return self
        try:
            return engine.__dict__["server_args"]
        except KeyError:
            raise AttributeError("server_args") from None

    def __set__(self, engine: Any, server_args: Any) -> None:
        given = sys._getframe(1).f_locals.get("kwargs", {})
        ignored = [name for name in _KEYWORDS if given.get(name) is not None]
        if "server_args" in given and ignored:
            raise ValueError(BESIDE_SERVER_ARGS.format(keywords=" and ".join(ignored)))
        engine.__dict__["server_args"] = server_args


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineServerArgsGuard(ProcessEntry):
    """The instance attribute, made a descriptor of the class."""

    kind: str = "class attribute"

    def install(self) -> None:
        engine = _engine()
        if engine is not None and not self.is_installed():
            engine.server_args = GuardedServerArgs()

    def is_installed(self) -> bool:
        return isinstance(getattr(_engine(), "server_args", None), GuardedServerArgs)


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
    EngineServerArgsGuard(
        target=f"{_ENGINE_MODULE}.Engine.server_args",
        why="Engine.__init__ drops every keyword beside server_args in silence",
        until="plugins can add server arguments",
    ),
)
