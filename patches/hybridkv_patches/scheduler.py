"""The scheduler looks for room again after a commit, and reports that compression ran."""

from hybridkv_patches.hook import Hook
from hybridkv_patches.verify import describe_kernels
from sglang_hybridkv.srt import settings

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def readmit(scheduler, running_batch, *args, **kwargs):
    """BEFORE get_next_batch_to_run: a commit frees memory while its request runs on.

    `batch_is_full` was set by an admission that met the peak; stock clears it only when a request ends.
    """
    if settings.active() is None:
        return
    ledger = scheduler.tree_cache.compression.ledger
    if ledger.freed_memory:
        ledger.freed_memory = False
        running_batch.batch_is_full = False


def choose_streamer(original, scheduler):
    """Our streamer adds one entry a request."""
    if settings.active() is None:
        return original(scheduler)
    from sglang_hybridkv.srt.output_streamer import HybridOutputStreamer

    return HybridOutputStreamer


def report(result, scheduler, *args, **kwargs):
    """AFTER get_internal_state: the proof in /server_info."""
    if settings.active() is not None:
        info = scheduler.tree_cache.compression.server_info()
        result.internal_state["kv_compressor"] = {**info, "kernels": describe_kernels(scheduler)}


HOOKS = (
    Hook(
        target=f"{_SCHEDULER}.get_next_batch_to_run",
        kind="before",
        function=readmit,
        why="freed memory is not admitted by itself",
        until="SGLang lets a tree or allocator say that memory became free",
    ),
    Hook(
        target=f"{_SCHEDULER}.get_output_streamer_class",
        kind="around",
        function=choose_streamer,
        why="the streamer class is the supported way to add per-request output; only a subclass can name it",
        until="plugins can register customized info",
    ),
    Hook(
        target=f"{_SCHEDULER}.get_internal_state",
        kind="after",
        function=report,
        why="/server_info has no registry of reporters",
        until="plugins can add to the internal state",
    ),
)
