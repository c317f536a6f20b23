"""The launcher's side of the handshake with the scheduler process."""

from __future__ import annotations

from typing import Any

from hybridkv_patches.hook import Hook
from hybridkv_patches.server_args import end_at_once
from sglang_hybridkv.srt import settings as settings_module

# Key under which a scheduler that compresses says so in what it sends to its launcher when it is ready.
REPORT_KEY = "kv_compressor"


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


ENTRIES = (
    Hook(
        target="sglang.srt.entrypoints.engine.SchedulerInitResult.__init__",
        kind="after",
        function=require_reports,
        why="a scheduler that lost its plugin would serve uncompressed; every launcher waits through this object",
        until="SGLang ends a process whose plugin failed to load",
    ),
)
