"""The scheduler compresses, looks for room again after a commit, and reports it: to its launcher and to users."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from hybridkv_patches import activation, verify
from hybridkv_patches.hook import Hook
from hybridkv_patches.scheduler_init_result import REPORT_KEY
from sglang_hybridkv.srt import settings as settings_module

logger = logging.getLogger(__name__)

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def check_start(_result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER Scheduler.__init__: RuntimeError, one sentence, unless all parts are ours and the self-test passes."""
    settings = settings_module.active()
    if settings is None:
        return
    fault = activation.installation_fault() or verify.parts_fault(scheduler) or verify.kernels_fault(scheduler)
    fault = fault or verify.model_fault(scheduler, settings)
    if fault is not None:
        logger.error(fault)
        raise RuntimeError(fault)
    reporter = scheduler.metrics_reporter
    if reporter.current_scheduler_metrics_enabled:
        scheduler.tree_cache.compression.publish_metrics(reporter.metrics_collector.labels)
    logger.info(verify.summary(scheduler, settings))
    _grow(scheduler.tree_cache.compression.store)


def _grow(store: Any) -> None:
    """In the background, which has to wait until here: while CUDA graphs are captured, no other thread may pin memory.

    Where SGLang captures graphs of the vision tower when it meets an image, all of the store is made now.
    """
    from sglang.srt.environ import envs

    if envs.SGLANG_VIT_ENABLE_CUDA_GRAPH.get():
        store.make_all()
    else:
        store.grow()


def report_ready(result: dict, scheduler: Any, *args: Any, **kwargs: Any) -> dict | None:
    """AFTER Scheduler.get_init_info: tell the launcher that this scheduler compresses."""
    settings = settings_module.active()
    if settings is None:
        return None
    config = settings.config
    return {**result, REPORT_KEY: {"name": settings.name, "budget": config.budget, "page_size": config.page_size}}


def readmit(scheduler, running_batch, *args, **kwargs):
    """BEFORE get_next_batch_to_run: a commit frees memory while its request runs on.

    `batch_is_full` was set by an admission that met the peak; stock clears it only when a request ends.
    """
    if settings_module.active() is None:
        return
    ledger = scheduler.tree_cache.compression.ledger
    if ledger.freed_memory:
        ledger.freed_memory = False
        running_batch.batch_is_full = False


def requeue_preempted(original, scheduler, running_batch):
    """AROUND get_new_batch_prefill: what was preempted waits again, also when nothing could be admitted instead.

    Stock gives preempted requests back to the queue together with the batch that they made room for, and forgets
    them when there is none.
    """
    if settings_module.active() is None or not scheduler.enable_priority_preemption:
        return original(scheduler, running_batch)
    before = list(running_batch.reqs)
    plan = original(scheduler, running_batch)
    if plan.batch_to_run is None:
        running = set(plan.running_batch.reqs)
        for req in before:
            if req not in running:
                scheduler._add_request_to_queue(req)
    return plan


def choose_streamer(original, scheduler):
    """Our streamer adds one entry a request."""
    if settings_module.active() is None:
        return original(scheduler)
    from sglang_hybridkv.srt.output_streamer import HybridOutputStreamer

    return HybridOutputStreamer


def send_records(_result, scheduler, *args, **kwargs):
    """AFTER init_ipc_channels: what is aborted outside of a batch does not pass the streamer."""
    if settings_module.active() is None:
        return
    from sglang_hybridkv.srt.output_streamer import HybridSender

    channels = scheduler.ipc_channels
    sender = HybridSender(channels.send_to_tokenizer, scheduler)
    scheduler.ipc_channels = dataclasses.replace(channels, send_to_tokenizer=sender)


def report_state(result, scheduler, *args, **kwargs):
    """AFTER get_internal_state: the proof in /server_info."""
    if settings_module.active() is not None:
        info = scheduler.tree_cache.compression.server_info()
        kernels, model = verify.describe_kernels(scheduler), verify.describe_model(scheduler)
        result.internal_state["kv_compressor"] = {**info, "kernels": kernels, "model": model}


def change_settings(original, scheduler, recv_req):
    """AROUND set_internal_state: settings of the compressor ride in SGLang's message for its own."""
    if settings_module.active() is None:
        return original(scheduler, recv_req)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    if not settings_module.is_change(recv_req.server_args):
        return original(scheduler, recv_req)
    try:
        scheduler.tree_cache.compression.change_settings(settings_module.decode_change(recv_req.server_args))
    except ValueError as error:  # checked where it was asked for, with the same settings
        logger.error("KV compressor: settings were not changed: %s", error)
        return SetInternalStateReqOutput(updated=False)
    return SetInternalStateReqOutput(updated=True)


ENTRIES = (
    Hook(
        target=f"{_SCHEDULER}.__init__",
        kind="after",
        function=check_start,
        why="SGLang swallows every failure of a hook; a server that lost one would run uncompressed",
        until="SGLang ends a process whose hook was not applied",
    ),
    Hook(
        target=f"{_SCHEDULER}.get_init_info",
        kind="after",
        function=report_ready,
        why="the launcher must see a positive sign from the process that compresses",
        until="SGLang ends a process whose plugin failed to load",
    ),
    Hook(
        target=f"{_SCHEDULER}.get_next_batch_to_run",
        kind="before",
        function=readmit,
        why="freed memory is not admitted by itself",
        until="SGLang lets a tree or allocator say that memory became free",
    ),
    Hook(
        target=f"{_SCHEDULER}.get_new_batch_prefill",
        kind="around",
        function=requeue_preempted,
        why="a request that is preempted for one that is not admitted after all is forgotten, and never answered",
        until="SGLang queues preempted requests also when it has no batch",
    ),
    Hook(
        target=f"{_SCHEDULER}.get_output_streamer_class",
        kind="around",
        function=choose_streamer,
        why="the streamer class is the supported way to add per-request output; only a subclass can name it",
        until="plugins can register customized info",
    ),
    Hook(
        target=f"{_SCHEDULER}.init_ipc_channels",
        kind="after",
        function=send_records,
        why="requests that end in a queue are answered by an AbortReq, which has no field for more",
        until="plugins can register customized info, and an AbortReq carries it",
    ),
    Hook(
        target=f"{_SCHEDULER}.get_internal_state",
        kind="after",
        function=report_state,
        why="/server_info has no registry of reporters",
        until="plugins can add to the internal state",
    ),
    Hook(
        target=f"{_SCHEDULER}.set_internal_state",
        kind="around",
        function=change_settings,
        why="a scheduler takes no messages of plugins",
        until="plugins have messages of their own",
    ),
)
