"""Reserve compressed pages before the final part of a prefill is launched."""

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import settings


def reserve(_result, batch, *args, **kwargs):
    """AFTER prepare_for_extend: SGLang has allocated this part, nothing is launched yet."""
    if settings.active() is None:
        return
    compression = batch.tree_cache.compression
    for req in batch.reqs:
        compression.prepare(req, batch.tree_cache)


ENTRIES = (
    Hook(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
        kind="after",
        function=reserve,
        why="with overlap a decode step is launched before the prefill's result is seen: pages must exist by then",
        until="SGLang has a callback between allocation and launch of a prefill",
    ),
)
