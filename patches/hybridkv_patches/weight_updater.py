"""Graphs that are captured while a server runs: nothing else may pin memory meanwhile."""

from __future__ import annotations

from typing import Any

from hybridkv_patches.hook import Hook
from sglang_hybridkv.srt import settings


def finish_growing(updater: Any, *args: Any, recapture_cuda_graph: bool = False, **kwargs: Any) -> None:
    """BEFORE WeightUpdater.update_weights_from_disk: the host store grows no more where graphs are captured again."""
    if recapture_cuda_graph and settings.active() is not None:
        updater.get_model_runner().token_to_kv_pool.cache.memory.store.finish_growing()


ENTRIES = (
    Hook(
        target="sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_disk",
        kind="before",
        function=finish_growing,
        why="a CUDA graph that is captured is lost when another thread, that of the host store, pins memory",
        until="SGLang captures graphs in a mode that other threads do not disturb",
    ),
)
