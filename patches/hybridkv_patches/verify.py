"""The scheduler's side of the handshake: after its start, everything that compresses must be ours."""

from __future__ import annotations

import logging
from typing import Any

from hybridkv_patches import flashinfer_backend, full_component
from hybridkv_patches.entry import missing_sentence
from sglang_hybridkv.srt import refusals
from sglang_hybridkv.srt.settings import Settings

logger = logging.getLogger(__name__)

_MIN_DTYPE_BYTES = 2  # of a key's or value's element; smaller ones need scales that compression does not carry


def parts_fault(scheduler: Any) -> str | None:
    """Sentence that names the parts of `scheduler` that are SGLang's own; None when all are ours."""
    from sglang_hybridkv.srt.allocator import HybridAllocator
    from sglang_hybridkv.srt.attention_backend import HybridAttnMixin
    from sglang_hybridkv.srt.backends import concrete_backends
    from sglang_hybridkv.srt.memory_pool import HybridTokenToKVPool
    from sglang_hybridkv.srt.radix_cache import HybridRadixCache

    allocator = scheduler.token_to_kv_pool_allocator
    parts = {
        "KV pool": (allocator.get_kvcache(), HybridTokenToKVPool),
        "KV allocator": (allocator, HybridAllocator),
        "radix cache": (scheduler.tree_cache, HybridRadixCache),
    }
    backends = concrete_backends(scheduler.tp_worker.model_runner.attn_backend)
    parts |= {name: (backend, HybridAttnMixin) for name, backend in backends.items()}
    foreign = [f"{name} ({type(part).__name__})" for name, (part, ours) in parts.items() if not isinstance(part, ours)]
    if foreign:
        return f"--kv-compressor is set but SGLang kept its own {', '.join(foreign)}"
    untouched = [
        entry.target
        for entries, objects in (
            (flashinfer_backend.ENTRIES, backends.values()),
            (full_component.ENTRIES, (scheduler.tree_cache,)),
        )
        for entry in entries
        for owner in objects
        if not entry.is_installed_on(owner)
    ]
    if untouched:
        return missing_sentence(untouched)
    dtype = allocator.get_kvcache().dtype
    if not (dtype.is_floating_point and dtype.itemsize >= _MIN_DTYPE_BYTES):
        # "auto" follows the checkpoint, which the table of refused flags cannot see.
        return f"--kv-compressor cannot work on a KV cache of {dtype}; use --kv-cache-dtype bfloat16"
    return None


def describe_kernels(scheduler: Any) -> str:
    """The kernels that serve, for people; ValueError when those that the user forced cannot serve this model."""
    from hybridkv_kernels import dispatch
    from sglang_hybridkv.srt.backends import concrete_backends, decodes_by_flashinfer

    pool, runner = scheduler.token_to_kv_pool_allocator.get_kvcache(), scheduler.tp_worker.model_runner
    group_size = runner.model_config.num_attention_heads // runner.model_config.get_total_num_kv_heads()
    kernels = dispatch.describe(pool.device, pool.dtype, pool.head_dim, group_size)
    *_, decode = concrete_backends(runner.attn_backend).values()
    return f"{kernels}, decode by flashinfer" if decodes_by_flashinfer(decode) else kernels


def kernels_fault(scheduler: Any) -> str | None:
    """Sentence when the kernels that the user forced cannot serve this model."""
    try:
        describe_kernels(scheduler)
    except ValueError as error:
        return str(error)
    return None


def model_fault(scheduler: Any, settings: Settings) -> str | None:
    """Sentence when the self-test fails, or could not be run on a model that nothing else proves.

    Its result is kept for `describe_model`.
    """
    from sglang_hybridkv.srt.self_test import run_self_test

    architecture = _architecture(scheduler)
    flags = f"--model-path of a {architecture} cannot be combined with --kv-compressor {settings.name}"
    try:
        result = run_self_test(scheduler)
    except ValueError as error:
        return f"{flags}; {error}"
    scheduler.token_to_kv_pool_allocator.compression.self_test = result
    if result.difference is None:
        if architecture in refusals.ARCHITECTURES:
            logger.warning("KV compressor: the %s", result.describe())
            return None
        return f"{flags}; it is not verified, and its self-test could not be run: {result.obstacle}"
    if result.passed:
        return None
    return (
        f"{flags}; its compressed cache at budget 1 gives other answers than its prefill: the log-probs of the "
        f"self-test differ by {result.difference:.2g}, at most {result.limit:g} is allowed"
    )


def describe_model(scheduler: Any) -> dict[str, Any]:
    """For `/server_info`: architecture, whether tests of this project compare it with stock, and the self-test."""
    architecture = _architecture(scheduler)
    result = scheduler.token_to_kv_pool_allocator.compression.self_test
    is_verified = architecture in refusals.ARCHITECTURES
    return {"architecture": architecture, "verified": is_verified, **result.as_dict()}


def _architecture(scheduler: Any) -> str:
    return str(scheduler.tp_worker.model_runner.model_config.hf_config.architectures[0])


def summary(scheduler: Any, settings: Settings) -> str:
    """What the log says of a scheduler that passed."""
    from sglang_hybridkv.srt.backends import concrete_backends

    config = settings.config
    compression = scheduler.token_to_kv_pool_allocator.compression
    store, model = compression.store, describe_model(scheduler)
    backends = concrete_backends(scheduler.tp_worker.model_runner.attn_backend).values()
    return (
        f"KV compression is active: {settings.name}, budget {config.budget}, page size {config.page_size} tokens, "
        f"attention backend {' and '.join(type(backend).__name__ for backend in backends)}, "
        f"host store {store.num_pages * store.page_bytes} bytes, kernels {describe_kernels(scheduler)}, "
        f"{model['architecture']} ({'verified' if model['verified'] else 'not verified'}): "
        f"{compression.self_test.describe()}"
    )
