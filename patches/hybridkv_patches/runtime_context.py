"""The second stage begins where each process publishes its configuration."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from hybridkv_patches import activation
from hybridkv_patches.entry import ProcessEntry
from hybridkv_patches.hook import Hook
from hybridkv_patches.server_args import refuse
from sglang_hybridkv.srt import refusals
from sglang_hybridkv.srt import settings as settings_module

_SERVER_MODULES = (
    "attention_registry",
    "forward_batch_info",
    "http_server",
    "io_struct",
    "kv_cache_configurator",
    "openai_api",
    "pool_stats_observer",
    "registry",
    "schedule_batch",
    "schedule_policy",
    "scheduler",
    "scheduler_init_result",
    "tokenizer_manager",
    "weight_updater",
)
# Those of the HTTP API; a process without the server, such as a scheduler, is spared its import.
_HTTP_MODULES = ("http_server", "openai_api")
_HTTP_SERVER = "sglang.srt.entrypoints.http_server"
_activated = False


def check_published(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE runtime_context.publish, in every process: refuse what cannot work, then install all other changes.

    SGLang's launchers, engines and schedulers all publish their configuration before they build anything.
    """
    settings = settings_module.settings_of(server_args)
    if settings is None:
        return
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    server_args.resolve_once()
    try:
        view, model_config = resolving_view(server_args), model_config_of(server_args)
        refusals.check_server_args(view, settings)
        refusals.check_model(model_config, settings)
        refusals.check_kernels(view, model_config, settings)
        activate()
    except (ValueError, RuntimeError) as error:
        refuse(server_args, error)


def activate() -> None:
    """Install all changes in this process, once; RuntimeError in one sentence when one is not in place afterwards."""
    global _activated
    if _activated:
        return
    fault = activation.version_fault()
    if fault is None:
        try:
            activation.install(server_entries())
        except ImportError as error:
            raise RuntimeError(f"--kv-compressor cannot work: {error}") from error
        fault = activation.installation_fault()
    if fault is not None:
        raise RuntimeError(fault)
    _activated = True


def server_modules() -> tuple[ModuleType, ...]:
    """Modules whose entries a compressing server needs besides those of the first stage; imported only for one."""
    return tuple(importlib.import_module(f"hybridkv_patches.{name}") for name in _SERVER_MODULES)


def server_entries() -> tuple[ProcessEntry, ...]:
    """The entries of those that this process needs."""
    names = {f"hybridkv_patches.{name}" for name in _HTTP_MODULES} if _HTTP_SERVER not in sys.modules else set()
    return tuple(entry for module in server_modules() if module.__name__ not in names for entry in module.ENTRIES)


ENTRIES = (
    Hook(
        target="sglang.srt.runtime_context.publish",
        kind="before",
        function=check_published,
        why="launcher, sglang.Engine and scheduler process all pass here, and only here, with resolved arguments",
        until="plugins are told the resolved arguments",
    ),
)
