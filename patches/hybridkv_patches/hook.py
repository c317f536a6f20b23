"""One hook on one SGLang symbol: a ledger entry, its installation, and the proof that it is installed."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, Literal

PLUGIN = "hybridkv"


@dataclasses.dataclass(frozen=True)
class Hook:
    """A ledger entry.

    Attributes
    ----------
    target : dotted name of the hooked function or method.
    kind : ``before`` gets the call's arguments and may return new ``(args, kwargs)``; ``after`` gets
        ``(result, *args, **kwargs)`` and may return another result, but not None; ``around`` gets
        ``(original, *args, **kwargs)`` and returns the result.
    function : what runs there. It must do nothing when compression is off.
    why : reason that no public interface of SGLang does.
    until : what has to change for this entry to go.
    """

    target: str
    kind: Literal["before", "after", "around"]
    function: Callable[..., Any]
    why: str
    until: str


def install(hooks: Iterable[Hook]) -> None:
    """Register and apply `hooks` with SGLang's registry, which logs failures instead of raising: see `missing`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource(plugin_name=PLUGIN, dist_name="sglang-hybridkv")
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind), source=source)
    HookRegistry.apply_hooks()


def missing(hooks: Iterable[Hook]) -> list[str]:
    """Targets whose hook does not run: the symbol is gone, or somebody else's hook was applied to it earlier."""
    return sorted({hook.target for hook in hooks if not _is_installed(hook)})


def _is_installed(hook: Hook) -> bool:
    try:
        function = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError):
        return False
    # SGLang's wrapper keeps the hook in its closure; several hooks on one target make a chain of wrappers.
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook.function for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
