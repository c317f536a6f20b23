import itertools

import pytest
import torch

pytest.importorskip("sglang")

from hybridkv_kernels.head_pages import HeadPageViews
from sglang_hybridkv.cache.memory import layout_of
from tests.builders import head_page
from tests.srt.serving import make_pool

SIZES = {"size": 128, "page_size": 16, "dtype": torch.bfloat16, "head_dim": 32, "layer_num": 3}


@pytest.fixture
def pool():
    return make_pool(**SIZES)


def test_layers_look_as_in_stock_sglang(pool):
    for buffers in (pool.k_buffer, pool.v_buffer):
        assert len(buffers) == 3
        for layer in buffers:
            assert layer.shape == (128 + 16, 2, 32)
            assert layer.is_contiguous()
            assert layer.dtype == torch.bfloat16
            assert not layer.any(), "padding must not be NaN"
    assert pool.get_key_buffer(1).data_ptr() == pool.k_buffer[1].data_ptr()
    assert pool.get_value_buffer(2).data_ptr() == pool.v_buffer[2].data_ptr()


def test_head_pages_are_views_of_the_layers(pool):
    layout = layout_of(pool.keys, 16)
    assert (layout.num_layers, layout.num_kv_heads, layout.pages_per_layer, layout.page_size) == (3, 2, 9, 16)
    views = HeadPageViews.over(layout, pool.keys, pool.values)
    for layers, pages in ((pool.k_buffer, views.k_pages), (pool.v_buffer, views.v_pages)):
        pages.copy_(torch.arange(len(pages), dtype=torch.float32)[:, None, None].expand_as(pages))
        for layer, page, head in itertools.product(range(3), range(9), range(2)):
            assert (head_page(torch.stack(layers), page, layer, head, 16) == (layer * 9 + page) * 2 + head).all()


def test_keys_and_values_are_two_memories(pool):
    pool.k_buffer[0].fill_(1)
    assert not pool.v_buffer[0].any()


def test_the_residency_map_has_an_entry_for_each_head_page(pool):
    for chunk_size, chunks in ((None, 1), (16, 1), (2, 8)):
        views = HeadPageViews.over(layout_of(pool.keys, 16), pool.keys, pool.values, chunk_size)
        assert views.held_chunks.shape == (len(views.k_pages), chunks) == (3 * 9 * 2, chunks)
        assert views.held_chunks.dtype == torch.int32


def test_page_bytes_are_those_of_one_page_of_all_layers(pool):
    total = sum(t.numel() * t.element_size() for t in (*pool.k_buffer, *pool.v_buffer))
    assert pool.page_bytes * 9 == pool.pool_bytes == total


@pytest.mark.parametrize("changes", [{"v_head_dim": 16}, {"size": 120}, {"kv_cache_layout": "hnd"}])
def test_what_head_pages_cannot_hold_is_refused(changes):
    with pytest.raises(ValueError, match="head pages need the NHD layout, whole pages and equal head sizes"):
        make_pool(**SIZES | changes)
