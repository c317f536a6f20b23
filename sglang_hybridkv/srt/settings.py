"""The compressor's settings on their way to the scheduler process.

They ride as a plain dict in an underscore attribute of ServerArgs: it survives the spawn, and unpickling
needs none of our classes, which matters because a child unpickles before it loads plugins. A change of a running server
rides in SGLang's message SetInternalStateReq, which has names with numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from sglang_hybridkv.compressors import get_compressor
from sglang_hybridkv.config import CompressorConfig

ATTRIBUTE = "_hybridkv"
_CHANGE = "kv_compressor "


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for: name of the compressor and its validated config."""

    name: str
    config: CompressorConfig


def stash(server_args: Any, settings: Settings | None) -> None:
    """Write `settings` to `server_args`; None (compression off) leaves it untouched."""
    if settings is not None:
        setattr(server_args, ATTRIBUTE, {"name": settings.name, "config": settings.config.model_dump_json()})


def settings_of(server_args: Any) -> Settings | None:
    """Settings that ride on `server_args`; None when compression is off."""
    stored = getattr(server_args, ATTRIBUTE, None)
    return None if stored is None else _decode(stored["name"], stored["config"])


def active() -> Settings | None:
    """Settings of this process's server; None when compression is off."""
    from sglang.srt.runtime_context import get_server_args

    return settings_of(get_server_args())


@functools.lru_cache(maxsize=8)
def _decode(name: str, config: str) -> Settings:
    return Settings(name, get_compressor(name).config_class.model_validate_json(config))


def encode_change(given: dict[str, Any]) -> dict[str, int]:
    """Changed settings as SGLang's message has them: their JSON text is the name of a number."""
    return {_CHANGE + json.dumps(given): 0}


def is_change(server_args: dict[str, Any]) -> bool:
    """Whether a message has changed settings; others are about SGLang's own state."""
    return any(name.startswith(_CHANGE) for name in server_args)


def decode_change(server_args: dict[str, Any]) -> dict[str, Any]:
    """What `encode_change` was given."""
    [name] = server_args
    given: dict[str, Any] = json.loads(name.removeprefix(_CHANGE))
    return given
