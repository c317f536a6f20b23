"""A decode batch on its way to the forward: its rows, which SGLang later has on the device only."""

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import settings


def note_rows(_result, _cls, batch, model_runner, *args, **kwargs):
    """AFTER ForwardBatch.init_new: FlashInfer's plans need to know who is in the batch, and may not wait for it."""
    if settings.active() is None or not batch.forward_mode.is_decode():
        return
    from sglang_hybridkv.srt.attention_backend import HybridAttnMixin
    from sglang_hybridkv.srt.backends import concrete_backends

    for backend in concrete_backends(model_runner.attn_backend).values():
        if isinstance(backend, HybridAttnMixin):
            backend.note_rows(batch.req_pool_indices_cpu.tolist())


ENTRIES = (
    Hook(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        kind="after",
        function=note_rows,
        why="ForwardBatch carries req_pool_indices_cpu for prefill only, and a replayed graph's view of it not at all",
        until="ForwardBatch and its replay view carry req_pool_indices_cpu while decoding",
    ),
)
