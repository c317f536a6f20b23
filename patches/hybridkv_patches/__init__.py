"""HybridKV inside an unmodified SGLang: the entry point ``sglang.srt.plugins: hybridkv``.

Two stages, so that a server without ``--kv-compressor`` stays as it is:

1. `register`, when SGLang loads its plugins in a process: the flags, the arguments of ``sglang.Engine``, and a
   look at the configuration that the process publishes.
2. `activate`, when that configuration asks for compression: all other hooks, and the proof that each is in place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridkv_patches.hook import Hook

SUPPORTED_SGLANG = ">=0.5.21,<0.5.22"

_STARTUP_MODULES = ("server_args",)
_SERVER_MODULES = (
    "engine",
    "forward_batch_info",
    "kv_cache_configurator",
    "registry",
    "schedule_batch",
    "schedule_policy",
    "scheduler",
    "attention_registry",
    "tokenizer_manager",
    "verify",
)

_registered = False
_activated = False


def register() -> None:
    """Entry point: make the flags known. Changes nothing for a server that does not set them."""
    global _registered
    if _registered:
        return
    _registered = True
    from hybridkv_patches import engine, hook, server_args

    if version_fault() is None:
        server_args.register_resolution()
        hook.install(server_args.HOOKS)
    else:
        # Only the flag, so that asking for compression gets an answer; the rest may not fit this SGLang.
        hook.install(server_args.FLAG_HOOKS)
    engine.accept_arguments()


def activate() -> None:
    """Install every hook in this process, once; RuntimeError in one sentence when one is not in place afterwards."""
    global _activated
    if _activated:
        return
    fault = version_fault()
    if fault is not None:
        raise RuntimeError(fault)
    try:
        from hybridkv_patches import attention_registry, hook

        hook.install(server_hooks())
    except ImportError as error:
        raise RuntimeError(f"--kv-compressor cannot work: {error}") from error
    attention_registry.install()
    fault = hooks_fault()
    if fault is not None:
        raise RuntimeError(fault)
    _activated = True


def server_hooks() -> tuple[Hook, ...]:
    """Hooks that a compressing server needs besides those of the first stage."""
    return _hooks_of(_SERVER_MODULES)


def startup_fault() -> str | None:
    """Sentence that says why this process cannot start a compressing server; None when it can."""
    return version_fault() or _fault_of(_hooks_of(_STARTUP_MODULES))


def hooks_fault() -> str | None:
    """Sentence that names the hooks that are not in place; None when all are. Valid after `activate`."""
    return _fault_of(_hooks_of(_STARTUP_MODULES) + server_hooks())


def version_fault() -> str | None:
    """Sentence that names the installed and the supported SGLang versions; None when they agree."""
    from packaging.specifiers import SpecifierSet
    from sglang.version import __version__ as installed

    if SpecifierSet(SUPPORTED_SGLANG).contains(installed, prereleases=True):
        return None
    return f"--kv-compressor does not support SGLang {installed}; install a version {SUPPORTED_SGLANG}"


def _hooks_of(modules: tuple[str, ...]) -> tuple[Hook, ...]:
    return tuple(hook for name in modules for hook in importlib.import_module(f"{__name__}.{name}").HOOKS)


def _fault_of(hooks: tuple[Hook, ...]) -> str | None:
    from hybridkv_patches.hook import missing

    targets = missing(hooks)
    if not targets:
        return None
    return (
        f"--kv-compressor cannot work: SGLang did not take the hook on {', '.join(targets)} (is another plugin's hook "
        "there? SGLANG_PLUGINS=hybridkv loads this plugin alone)"
    )
