import types

import pytest
import torch
from sglang.srt.mem_cache.unified_cache.components import ComponentType

from hybridkv_patches import verify
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.srt import self_test
from sglang_hybridkv.srt.allocator import HybridAllocator
from sglang_hybridkv.srt.attention_backend import HybridAttnMixin
from sglang_hybridkv.srt.memory_pool import HybridTokenToKVPool
from sglang_hybridkv.srt.radix_cache import HybridRadixCache
from sglang_hybridkv.srt.self_test import SelfTestResult
from sglang_hybridkv.srt.settings import Settings
from tests.srt.serving import Serving


def blank(kind):
    """Instance of `kind` or of a subclass, without running anything of it."""
    return object.__new__(type(f"Blank{kind.__name__}", (kind,), {"__init__": lambda self: None}))


@pytest.fixture
def scheduler():
    pool, allocator = blank(HybridTokenToKVPool), blank(HybridAllocator)
    pool.dtype = torch.bfloat16
    allocator.get_kvcache = lambda: pool
    tree = blank(HybridRadixCache)
    tree.components = {ComponentType.FULL: types.SimpleNamespace(prepare_for_caching_req=tree._insertable)}
    runner = types.SimpleNamespace(attn_backend=blank(HybridAttnMixin))
    return types.SimpleNamespace(
        token_to_kv_pool_allocator=allocator,
        tree_cache=tree,
        tp_worker=types.SimpleNamespace(model_runner=runner),
    )


class Foreign:
    dtype = torch.bfloat16

    def get_kvcache(self):
        return self


def test_our_own_parts_pass(scheduler):
    assert verify.parts_fault(scheduler) is None


@pytest.mark.parametrize("part", ["KV pool", "KV allocator", "radix cache", "attention backend"])
def test_a_foreign_part_is_named(scheduler, part):
    if part == "KV pool":
        scheduler.token_to_kv_pool_allocator.get_kvcache = Foreign
    elif part == "KV allocator":
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        scheduler.token_to_kv_pool_allocator = Foreign()
        scheduler.token_to_kv_pool_allocator.get_kvcache = lambda: pool
    elif part == "radix cache":
        scheduler.tree_cache = Foreign()
    else:
        scheduler.tp_worker.model_runner.attn_backend = Foreign()
    assert verify.parts_fault(scheduler) == f"--kv-compressor is set but SGLang kept its own {part} (Foreign)"


class HybridAttnBackend:
    """SGLang's, which holds one backend a phase."""

    def __init__(self, prefill_backend, decode_backend):
        self.prefill_backend, self.decode_backend = prefill_backend, decode_backend


def test_both_backends_of_a_split_server_must_be_ours(scheduler):
    runner = scheduler.tp_worker.model_runner
    runner.attn_backend = HybridAttnBackend(blank(HybridAttnMixin), blank(HybridAttnMixin))
    assert verify.parts_fault(scheduler) is None
    runner.attn_backend = HybridAttnBackend(blank(HybridAttnMixin), Foreign())
    assert verify.parts_fault(scheduler).endswith("its own decode attention backend (Foreign)")
    runner.attn_backend = HybridAttnBackend(Foreign(), blank(HybridAttnMixin))
    assert verify.parts_fault(scheduler).endswith("its own prefill attention backend (Foreign)")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_a_quantized_cache_is_refused(scheduler, dtype):
    scheduler.token_to_kv_pool_allocator.get_kvcache().dtype = dtype
    assert "use --kv-cache-dtype bfloat16" in verify.parts_fault(scheduler)


def test_a_tree_whose_component_is_stock_again_is_named(scheduler):
    scheduler.tree_cache.components[ComponentType.FULL].prepare_for_caching_req = lambda *args: None
    assert "TreeComponent.prepare_for_caching_req (" in verify.parts_fault(scheduler)


def test_a_flashinfer_backend_that_plans_whole_sequences_is_named(scheduler, monkeypatch):
    backend = scheduler.tp_worker.model_runner.attn_backend = Serving("flashinfer", monkeypatch).backend
    assert verify.parts_fault(scheduler) is None
    updater = backend.indices_updater_decode
    updater.update = updater.update_single_wrapper
    assert "FlashInferIndicesUpdaterDecode.update (" in verify.parts_fault(scheduler)


VERIFIED, OTHER = "LlamaForCausalLM", "StableLmForCausalLM"


@pytest.mark.parametrize(
    ("architecture", "outcome", "fault"),
    [
        (VERIFIED, SelfTestResult(None, 1e-5, 1e-3, 0.1), None),
        (VERIFIED, SelfTestResult(None, 0.2, 1e-3, 0.1), "log-probs of the self-test differ by 0.2, at most 0.001"),
        (VERIFIED, SelfTestResult(None, float("inf"), 0.5, 0.1), "differ by inf, at most 0.5"),
        (VERIFIED, SelfTestResult("the pool is small", None, 1e-3, 0.1), None),
        (OTHER, SelfTestResult("the pool is small", None, 1e-3, 0.1), "could not be run: the pool is small"),
        (OTHER, SelfTestResult(None, 1e-5, 1e-3, 0.1), None),
        (OTHER, ValueError("attention sinks"), "; attention sinks"),
    ],
)
def test_a_model_is_served_if_its_self_test_passes(scheduler, monkeypatch, architecture, outcome, fault):
    config = types.SimpleNamespace(hf_config=types.SimpleNamespace(architectures=[architecture]))
    scheduler.tp_worker.model_runner.model_config = config
    scheduler.token_to_kv_pool_allocator.compression = types.SimpleNamespace(self_test=None)

    def run(_scheduler):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(self_test, "run_self_test", run)
    found = verify.model_fault(scheduler, Settings("hybridkv", HybridKVConfig()))
    if fault is None:
        assert found is None
        told = verify.describe_model(scheduler)
        assert (told["architecture"], told["verified"]) == (architecture, architecture == VERIFIED)
        assert told["self_test"] == ("passed" if outcome.passed else "not run: the pool is small")
    else:
        assert found.startswith(f"--model-path of a {architecture} cannot be combined with --kv-compressor hybridkv; ")
        assert fault in found
