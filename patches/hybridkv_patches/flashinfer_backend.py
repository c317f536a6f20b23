"""FlashInfer's decode plans start where the dense tails start: `take_over` of our backend sees to it."""

from __future__ import annotations

from typing import Any

from hybridkv_patches.entry import ObjectEntry


def plans_tails(backend: Any) -> bool:
    """Whether a hybrid backend plans tails only, if it decodes by FlashInfer at all."""
    from sglang_hybridkv.srt.backends import decodes_by_flashinfer

    return not decodes_by_flashinfer(backend) or backend.plans_tails()


ENTRIES = (
    ObjectEntry(
        target="sglang.srt.layers.attention.flashinfer_backend.FlashInferIndicesUpdaterDecode.update",
        is_installed_on=plans_tails,
        why="SGLang plans whole sequences, but the first rows of a compressed one are in its head pages; the updater "
        "sets this attribute itself, and its class is named by no flag",
        until="FlashInferAttnBackend has a method that says which rows of a sequence decode reads",
    ),
)
