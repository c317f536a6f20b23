from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from hybridkv_patches import kv_cache_configurator
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.srt import settings
from sglang_hybridkv.srt.allocator import HybridAllocator
from sglang_hybridkv.srt.memory_pool import HybridTokenToKVPool
from sglang_hybridkv.srt.ranks import Ranks
from sglang_hybridkv.srt.settings import Settings

PAGES, P = 12, 8


@pytest.fixture(params=[False, True], ids=["stock", "compressing"])
def compressing(request, monkeypatch):
    chosen = Settings("hybridkv", HybridKVConfig(page_size=P, host_store_bytes=0)) if request.param else None
    monkeypatch.setattr(settings, "active", lambda: chosen)
    return request.param


def make_pool(*, mha_pool_class, **kwargs):
    return mha_pool_class(PAGES * P, page_size=P, dtype=torch.float32, head_num=2, head_dim=8, layer_num=2, **kwargs)


def build_pool(stock_class):
    return kv_cache_configurator.build_pool(
        lambda configurator, **kwargs: make_pool(**kwargs),
        "configurator",
        mha_pool_class=stock_class,
        device="cpu",
        enable_memory_saver=False,
        enable_alt_stream=False,
    )


def build_allocator(stock, num_layers=2, windows=(), backend="torch_native"):
    rows = SimpleNamespace(req_to_token=torch.zeros(3, 64, dtype=torch.int32))
    config = SimpleNamespace(num_hidden_layers=2, hf_config=SimpleNamespace(architectures=["MyModel"]))
    config.get_total_num_kv_heads = lambda: 2
    model = torch.nn.ModuleList(RadixAttention(4, 8, 1.0, 2, layer_id) for layer_id in range(num_layers))
    for layer, window in zip(model, windows, strict=False):
        layer.sliding_window_size = window - 1
    # As the user gave them, nothing, and what SGLang has decided since.
    server_args = SimpleNamespace(device=None, attention_backend=None, decode_attention_backend=None)
    device = "cpu" if backend == "torch_native" else "cuda"
    server_args._resolved_overrides = [("auto", {"device": device, "attention_backend": backend})]
    configurator = SimpleNamespace(model=model, model_config=config, server_args=server_args)
    build = kv_cache_configurator.build_allocator
    with mock.patch("sglang_hybridkv.srt.ranks.tensor_parallel_ranks", Ranks):
        return build(lambda *args, **kwargs: stock, configurator, req_to_token_pool=rows)


def test_a_compressing_server_gets_our_pool_and_any_other_its_own(compressing):
    stock_class = type("StockPool", (HybridTokenToKVPool,), {})
    assert type(build_pool(stock_class)) is (HybridTokenToKVPool if compressing else stock_class)


@pytest.mark.parametrize("need_sort", [False, True])
def test_our_allocator_has_what_stock_s_had_and_shares_one_state_with_the_pool(compressing, need_sort):
    pool = build_pool(HybridTokenToKVPool)
    stock = PagedTokenToKVPoolAllocator(PAGES * P, P, torch.float32, "cpu", pool, need_sort)
    made = build_allocator(stock)
    if not compressing:
        assert made is stock
        return
    assert type(made) is HybridAllocator
    for name in ("size", "page_size", "dtype", "device", "need_sort"):
        assert getattr(made, name) == getattr(stock, name)
    assert made.available_size() == stock.available_size()
    assert made.get_kvcache() is pool
    assert made.compression.allocator is made
    assert made.compression.cache is pool.cache


def test_windows_are_the_loaded_model_s_and_flashinfer_does_not_decode_them(compressing):
    pool = build_pool(HybridTokenToKVPool)
    stock = PagedTokenToKVPoolAllocator(PAGES * P, P, torch.float32, "cpu", pool, False)
    made = build_allocator(stock, windows=(24, 0))
    if not compressing:
        assert made is stock
        return
    assert made.compression.cache.memory.layout.windows == (24, 0)
    assert made.compression.shape.head_windows == (24, 24)
    with pytest.raises(RuntimeError, match="layers with a window.* use --attention-backend triton or fa3$"):
        build_allocator(stock, windows=(24, 0), backend="flashinfer")


def test_another_allocator_is_refused_by_its_name(compressing):
    class OtherAllocator(PagedTokenToKVPoolAllocator):
        pass

    other = object.__new__(OtherAllocator)
    if not compressing:
        assert build_allocator(other) is other
        return
    with pytest.raises(RuntimeError, match="paged allocator, got OtherAllocator"):
        build_allocator(other)


def test_a_model_that_is_unfit_is_refused_before_its_pool_is_taken_over(compressing):
    if not compressing:
        assert build_allocator("stock", num_layers=1) == "stock"
        return
    with pytest.raises(RuntimeError, match="^--model-path of a MyModel cannot be .*; compression needs every l"):
        build_allocator("stock", num_layers=1)
