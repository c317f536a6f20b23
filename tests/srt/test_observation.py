import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_kernels.score_heads import score_heads

pytest.importorskip("sglang")

from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.geometry import prompt_geometry
from sglang_hybridkv.spans import VisualSpan
from sglang_hybridkv.srt.observation import PromptObserver
from tests.builders import LAWS, fresh_generator, make_compressor, make_reservation

LAYERS, W = 2, 8


def make_observer():
    config = HybridKVConfig(preset="paper", observation_rows=W, min_observation_rows=2)
    return PromptObserver(HybridKV(config), LAYERS)


def reservation(prompt_len=64, spans=()):
    geometry = prompt_geometry(prompt_len, 0.5, page_size=16, head_pages_per_page=4, vectors_per_chunk=1)
    return make_reservation(geometry, range(1, 1 + geometry.num_pages), range(geometry.num_host_pages), spans=spans)


@st.composite
def chunked(draw):
    """Queries of a prompt that starts behind a cached prefix, and the borders of its chunks."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    start = draw(st.integers(0, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    return start, lengths, torch.randn(LAYERS, sum(lengths), 4, 16, generator=generator)


@LAWS
@given(chunked())
def test_the_tail_reaches_back_into_the_chunk_before(case):
    """The last W rows that were computed without a gap, over any number of chunks."""
    start, lengths, queries = case
    observer, done = make_observer(), 0
    for i, length in enumerate(lengths):
        if i == len(lengths) - 1:
            observer.begin(3, reservation())
        else:
            observer.watch(3)
        assert observer.is_interested(3)
        assert observer.is_final(3) == (i == len(lengths) - 1)
        for layer in range(LAYERS):
            tail = observer.keep_tail(3, layer, queries[layer, done : done + length], start + done)
            end = done + length
            assert torch.equal(tail, queries[layer, max(end - W, 0) : end])
        done += length


def test_a_gap_between_chunks_drops_the_kept_rows():
    observer = make_observer()
    q = torch.randn(20, 4, 16, generator=fresh_generator())
    observer.watch(1)
    observer.keep_tail(1, 0, q[:10], 0)
    observer.begin(1, reservation())
    assert torch.equal(observer.keep_tail(1, 0, q[10:13], start=16), q[10:13])


def test_kept_rows_are_a_copy():
    """The queries live in a buffer that the next forward overwrites."""
    observer = make_observer()
    q = torch.randn(4, 4, 16, generator=fresh_generator())
    buffer = q.clone()
    observer.watch(1)
    observer.keep_tail(1, 0, buffer, 0)
    buffer.fill_(float("nan"))
    observer.begin(1, reservation())
    assert torch.equal(observer.keep_tail(1, 0, q[:2], 4), torch.cat((q, q[:2])))


def test_rows_and_layers_do_not_mix():
    observer = make_observer()
    q = torch.randn(2, 2, 3, 4, 16, generator=fresh_generator())
    for row in (1, 2):
        observer.watch(row)
        for layer in range(2):
            observer.keep_tail(row, layer, q[row - 1, layer], 0)
    for row in (1, 2):
        observer.begin(row, reservation())
        for layer in range(2):
            expected = torch.cat((q[row - 1, layer], q[0, 0, :1]))
            assert torch.equal(observer.keep_tail(row, layer, q[0, 0, :1], 3), expected)


@pytest.mark.parametrize("forget", [lambda o: o.drop(1), lambda o: o.clear()])
def test_what_is_dropped_leaves_nothing_to_the_row_s_next_request(forget):
    observer = make_observer()
    q = torch.randn(5, 4, 16, generator=fresh_generator())
    observer.watch(1)
    observer.keep_tail(1, 0, q, 0)
    forget(observer)
    assert not observer.is_interested(1)
    observer.begin(1, reservation())
    assert torch.equal(observer.keep_tail(1, 0, q[:2], 5), q[:2])
    forget(observer)
    assert not observer.is_final(1)
    observer.drop(None)


@pytest.mark.parametrize(
    ("spans", "rows"),
    [
        ((), W),
        ((VisualSpan(10, 59, "image"),), 5),
        ((VisualSpan(10, 64, "image"),), W),
        ((VisualSpan(0, 9, "video"),), W),
    ],
)
def test_scores_are_those_of_the_text_after_the_last_image(spans, rows):
    observer, generator = make_observer(), fresh_generator()
    q, keys = torch.randn(LAYERS, 64, 4, 16, generator=generator), torch.randn(LAYERS, 64, 2, 16, generator=generator)
    mine = reservation(spans=spans)
    observer.begin(4, mine)
    last, slots = [], torch.randperm(100, generator=generator)[:64]
    for layer in range(LAYERS):
        tail, k_rows = observer.keep_tail(4, layer, q[layer], 0), torch.full((100, 2, 16), float("nan"))
        k_rows[slots] = keys[layer]
        last.append(observer.score(4, tail, k_rows, k_rows, slots, 0.25))
    assert last == [False, True]
    got, statistic, salience = observer.finish(4)
    assert got is mine
    assert statistic.shape == (LAYERS, 2)
    assert salience.shape == (LAYERS, 2, 64)
    for layer in range(LAYERS):
        expected = score_heads(q[layer, -rows:], keys[layer], scaling=0.25)
        torch.testing.assert_close((statistic[layer], salience[layer]), expected)
    assert not observer.is_final(4)
    assert not observer.is_interested(4)


def test_methods_of_the_last_window_observe_it_whatever_it_shows():
    observer = PromptObserver(make_compressor("snapkv", LAYERS, 2, observation_rows=W), LAYERS)
    generator = fresh_generator()
    q, keys = torch.randn(64, 4, 16, generator=generator), torch.randn(64, 2, 16, generator=generator)
    observer.begin(4, reservation(spans=(VisualSpan(10, 60, "image"),)))
    for _ in range(LAYERS):
        observer.score(4, observer.keep_tail(4, 0, q, 0), keys, keys, torch.arange(64), 0.25)
    _, _, salience = observer.finish(4)
    torch.testing.assert_close(salience[0], score_heads(q[-W:], keys, scaling=0.25)[1])


def test_methods_are_told_which_tokens_are_text_and_which_layer_it_is():
    seen = []

    class Spy(HybridKV):
        def score_layer(self, layer):
            seen.append((layer.is_text.tolist(), layer.layer_idx))
            return super().score_layer(layer)

    observer, q = PromptObserver(Spy(HybridKVConfig()), LAYERS), torch.randn(64, 4, 16, generator=fresh_generator())
    observer.begin(4, reservation(spans=(VisualSpan(10, 59, "image"),)))
    for layer in range(LAYERS):
        observer.score(4, observer.keep_tail(4, layer, q, 0), q[:, :2], q[:, :2], torch.arange(64), 0.25)
    mask = [not 10 <= token < 59 for token in range(64)]
    assert seen == [(mask, 0), (mask, 1)]
