"""``sglang.Engine(kv_compressor=...)``, and the launcher's side of the handshake with the scheduler process."""

from __future__ import annotations

import sys
from typing import Any

from hybridkv_patches.hook import Hook
from hybridkv_patches.server_args import adopt, claim_page_size, end_at_once, make_settings
from sglang_hybridkv.srt import settings as settings_module

_ENGINE_MODULE = "sglang.srt.entrypoints.engine"
# Key under which a scheduler that compresses says so in what it sends to its launcher when it is ready.
REPORT_KEY = "kv_compressor"


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


def accept_arguments() -> None:
    """Let Engine take the compressor's arguments, where this process uses Engine at all.

    Engine.__init__ loads the plugins and then reads this attribute, so that a hook on __init__ would miss the first
    engine. A process that has not imported the engine is not in __init__, and is spared the import.
    """
    module = sys.modules.get(_ENGINE_MODULE)
    stock = getattr(getattr(module, "Engine", None), "server_args_class", None)
    if stock is not None and not isinstance(stock, EngineServerArgs):
        module.Engine.server_args_class = EngineServerArgs(stock)  # type: ignore[union-attr]


def require_reports(_result: Any, init_result: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER SchedulerInitResult.__init__: once the schedulers are ready, each must have said that it compresses.

    A plugin that fails to load in the scheduler process only leaves no other trace: SGLang logs it and goes on.
    """
    if settings_module.active() is None:
        return
    wait_for_ready = init_result.wait_for_ready

    def wait_and_check() -> None:
        wait_for_ready()
        check_reports(init_result)

    init_result.wait_for_ready = wait_and_check


def check_reports(init_result: Any) -> None:
    """Stop the schedulers and refuse to serve unless every one of them reported compression."""
    from sglang.srt.runtime_context import get_server_args
    from sglang.srt.utils import kill_process_tree

    reports = [info.get(REPORT_KEY) for info in init_result.scheduler_infos]
    if reports and all(reports):
        return
    for pid in init_result.all_child_pids:
        kill_process_tree(pid)
    sentence = (
        "--kv-compressor is set but the scheduler process did not report compression; its log says why the plugin "
        "'hybridkv' was not loaded there"
    )
    end_at_once(get_server_args(), RuntimeError(sentence))


HOOKS = (
    Hook(
        target=f"{_ENGINE_MODULE}.SchedulerInitResult.__init__",
        kind="after",
        function=require_reports,
        why="a scheduler that lost its plugin would serve uncompressed; every launcher waits through this object",
        until="SGLang ends a process whose plugin failed to load",
    ),
)
