"""The ledger's most frequent kind of entry: a hook on one SGLang function, by SGLang's own hook registry."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import Any, Literal

from hybridkv_patches.entry import ProcessEntry

PLUGIN = "hybridkv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hook(ProcessEntry):
    """Runs `function` at each call of the target, a function or method.

    Attributes
    ----------
    kind : ``before`` gets the call's arguments and may return new ``(args, kwargs)``; ``after`` gets
        ``(result, *args, **kwargs)`` and may return another result, but not None; ``around`` gets
        ``(original, *args, **kwargs)`` and returns the result.
    function : what runs there.
    """

    kind: Literal["before", "after", "around"]
    function: Callable[..., Any]

    def install(self) -> None:
        """Register it with SGLang, which applies all hooks of a target together, and none that come later."""
        from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

        source = HookSource(plugin_name=PLUGIN, dist_name="sglang-hybridkv")
        HookRegistry.register(self.target, self.function, HookType(self.kind), source=source)

    def is_installed(self) -> bool:
        """False when the symbol is gone, or when somebody else's hook was applied to it earlier."""
        try:
            function = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError):
            return False
        # SGLang's wrapper keeps the hook in its closure; several hooks on one target make a chain of wrappers.
        while function is not None:
            cells = getattr(function, "__closure__", None) or ()
            if any(cell.cell_contents is self.function for cell in cells):
                return True
            function = getattr(function, "__wrapped__", None)
        return False


def apply() -> None:
    """Have SGLang apply what is registered; it logs failures instead of raising."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
