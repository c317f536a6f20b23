"""Reserve compressed pages before the final chunk is launched, and leave it queries to observe."""

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import settings


def reserve(_result, batch, *args, **kwargs):
    """AFTER prepare_for_extend: SGLang has allocated the chunk, nothing is launched yet."""
    if settings.active() is None:
        return
    compression = batch.tree_cache.compression
    for req in batch.reqs:
        compression.prepare(req, batch.tree_cache)


def leave_observation_rows(original, req, input_len):
    """A prefix hit must not swallow the queries that the classification observes."""
    length = original(req, input_len)
    active = settings.active()
    if active is None or input_len < active.config.min_prompt_tokens:
        return length
    return max(0, min(length, input_len - active.config.min_observation_rows))


HOOKS = (
    Hook(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
        kind="after",
        function=reserve,
        why="with overlap a decode step is launched before the prefill's result is seen: pages must exist by then",
        until="SGLang has a callback between allocation and launch of a prefill",
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len",
        kind="around",
        function=leave_observation_rows,
        why="the tree's swa_reprefill_tail_tokens would shorten the hits of dense requests, too",
        until="SGLang asks the tree per request how much of a hit to recompute",
    ),
)
