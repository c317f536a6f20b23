"""Prefetch through the backends: what it changes is when chunks come, and which query a step's chunks are of."""

import pytest
import torch

pytest.importorskip("sglang")

from tests.builders import forced_kernels, fresh_generator
from tests.srt.serving import BACKENDS, Serving

PREFETCH = {"prefetch": "previous_query", "prefetch_similarity": 0.5}


@pytest.fixture(autouse=True)
def naive_kernels():
    with forced_kernels("naive"):
        yield


def two_servings(backend, monkeypatch, **config):
    """The same requests, with prefetch and without."""
    monkeypatch.setenv("HYBRIDKV_TEST_SEED", str(fresh_generator().initial_seed()))
    servings = [Serving(backend, monkeypatch, theta=1.01, **settings) for settings in (PREFETCH | config, {})]
    for serving in servings:
        serving.add(3, 12 * serving.page_size + 3)
        serving.add(5, 9 * serving.page_size)
    return servings


def step(serving, queries):
    batch = serving.next_batch([3, 5])
    serving.backend.init_forward_metadata(batch)
    before = resident(serving)
    outputs = serving.forward(batch, queries)
    return outputs, before, resident(serving)


def resident(serving):
    """Chunks that each dynamic head's buffer holds."""
    table, views = serving.cache.memory.table, serving.cache.memory.views
    held = {}
    for row in (3, 5):
        for layer in range(len(serving.layers)):
            for head in range(serving.heads):
                count = table.num_head_pages[row, layer, head]
                ids = table.buffer_page_ids(row, layer, torch.tensor([head]), count[None])[0]
                held[row, layer, head] = set(views.held_chunks[ids].flatten().tolist())
    return held


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_queries_jump_nothing_changes(backend, monkeypatch):
    """Every request is corrected: outputs and buffers are those without prefetch, step by step."""
    mine, plain = two_servings(backend, monkeypatch, prefetch_similarity=1.0)
    for _ in range(4):
        queries = mine.queries(2)
        ours, theirs = step(mine, queries), step(plain, queries)
        assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
        assert ours[1:] == theirs[1:]
    assert mine.compression.server_info()["prefetch_correction_rate"] == 1.0
    assert "prefetch_correction_rate" not in plain.compression.server_info()


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_queries_are_alike_a_step_uses_the_chunks_of_the_one_before(backend, monkeypatch):
    mine, plain = two_servings(backend, monkeypatch)
    queries, moved = mine.queries(2), False
    for _ in range(5):
        _, before, after = step(mine, queries)
        _, _, expected = step(plain, queries)
        assert after == expected, "after a step the buffers are those of its own query"
        moved = moved or before != after
        queries = [(q + 0.4 * mine.randn(*q.shape), k, v) for q, k, v in queries]
    assert moved, "no chunk was swapped: the test shows nothing"
    # Both layers of both requests were corrected in the first step and in no other.
    assert mine.cache.prefetch.counters.tolist() == [5 * 4, 4]


def test_without_retrieval_there_is_no_prefetch(monkeypatch):
    assert Serving("triton", monkeypatch, compressor="snapkv").cache.prefetch is None
    assert Serving("triton", monkeypatch).cache.prefetch is None
