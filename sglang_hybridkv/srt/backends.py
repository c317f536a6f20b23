"""From the attention backends that SGLang builds to ours."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_hybridkv.srt.attention_backend import HybridAttnMixin
from sglang_hybridkv.srt.flashinfer_backend import HybridFlashInferMixin


def is_flashinfer(backend_class: type) -> bool:
    """Whether the class is SGLang's FlashInfer backend; by name, as its module is not needed where it is not used."""
    return any(base.__name__ == "FlashInferAttnBackend" for base in backend_class.__mro__)


def decodes_by_flashinfer(backend: AttentionBackend) -> bool:
    """Whether FlashInfer reads the head pages of this backend's decode, rather than our kernels."""
    return isinstance(backend, HybridFlashInferMixin)


def concrete_backends(backend: AttentionBackend) -> dict[str, AttentionBackend]:
    """The attention backends that do the work, by what they are called; SGLang's HybridAttnBackend holds one a phase.

    The one that decodes comes last.
    """
    if type(backend).__name__ != "HybridAttnBackend":
        return {"attention backend": backend}
    both: Any = backend
    return {
        "prefill attention backend": both.prefill_backend,
        "decode attention backend": both.decode_backend,
    }


def make_hybrid(backend: AttentionBackend) -> AttentionBackend:
    """A backend with the state of the freshly built `backend` that serves compressed requests, too."""
    stock = type(backend)
    mixin = HybridFlashInferMixin if is_flashinfer(stock) else HybridAttnMixin
    hybrid: Any = object.__new__(type(f"Hybrid{stock.__name__}", (mixin, stock), {}))
    hybrid.__dict__.update(backend.__dict__)
    hybrid.take_over()
    return hybrid
