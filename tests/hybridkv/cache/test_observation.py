import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_kernels.score_heads import score_heads
from sglang_hybridkv.cache.observation import PromptObserver
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.requests.spans import VisualSpan, observed_window
from tests.builders import LAWS, fresh_generator, make_compressor

LAYERS, W = 2, 8


def make_observer():
    return PromptObserver(HybridKV(HybridKVConfig(preset="paper", observation_rows=W)), LAYERS)


def run_chunk(observer, row, queries, start, *, length, final=False, window):
    """One chunk of `queries` [LAYERS, N, ...] as the engine shows it: the observed rows of each layer."""
    observer.watch(row, window)
    if final:
        observer.begin(row, ())
    assert observer.is_interested(row)
    assert observer.is_final(row) == final
    return [observer.gather(row, layer, queries[layer, start : start + length], start) for layer in range(len(queries))]


@st.composite
def chunked(draw):
    """A prompt with its window, what was generated after it, a cached prefix before the window, borders of chunks."""
    prompt_len = draw(st.integers(W + 1, 80))
    window = range(prompt_len - draw(st.integers(1, W)), prompt_len)
    end = prompt_len + draw(st.sampled_from([0, 0, 1, 7, 30]))
    start = draw(st.integers(0, window.start))
    inner = draw(st.sets(st.integers(start + 1, end - 1), max_size=6)) if end - start > 1 else set()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    return window, [start, *sorted(inner), end], torch.randn(LAYERS, end, 4, 16, generator=generator)


@LAWS
@given(chunked())
def test_the_window_is_observed_whatever_was_cached_and_wherever_chunks_end(case):
    """Also when its queries are those of several chunks, or of earlier ones than the last."""
    window, borders, queries = case
    observer = make_observer()
    for start, end in itertools.pairwise(borders):
        final = end == borders[-1]
        rows = run_chunk(observer, 3, queries, start, length=end - start, final=final, window=window)
        seen = queries[:, window.start : max(min(end, window.stop), window.start)]
        assert torch.equal(torch.stack(rows), seen)
    assert torch.equal(torch.stack(rows), queries[:, window.start : window.stop])


def test_kept_rows_are_a_copy():
    """The queries live in a buffer that the next forward overwrites."""
    observer = make_observer()
    q = torch.randn(6, 4, 16, generator=fresh_generator())
    buffer = q.clone()
    observer.watch(1, range(1, 6))
    observer.gather(1, 0, buffer[:4], 0)
    buffer.fill_(float("nan"))
    assert torch.equal(observer.gather(1, 0, q[4:], 4), q[1:])


def test_rows_and_layers_do_not_mix():
    observer, window = make_observer(), range(1, 4)
    q = torch.randn(2, LAYERS, 4, 4, 16, generator=fresh_generator())
    for start, length in ((0, 3), (3, 1)):
        rows = [run_chunk(observer, row, q[row], start, length=length, window=window) for row in range(2)]
    assert torch.equal(torch.stack([torch.stack(layers) for layers in rows]), q[:, :, 1:])


@pytest.mark.parametrize("forget", [lambda o: o.drop(1), lambda o: o.clear()])
def test_what_is_dropped_leaves_nothing_to_the_row_s_next_request(forget):
    observer, window = make_observer(), range(0, 7)
    q = torch.randn(LAYERS, 7, 4, 16, generator=fresh_generator())
    run_chunk(observer, 1, q, 0, length=5, window=window)
    forget(observer)
    assert not observer.is_interested(1)
    rows = run_chunk(observer, 1, q, 0, length=7, final=True, window=window)
    assert torch.equal(torch.stack(rows), q)
    forget(observer)
    assert not observer.is_final(1)


def test_a_window_with_a_gap_is_an_error():
    """A prefix hit that swallows observed queries would give the prompt another plan."""
    observer = make_observer()
    q, keys = torch.randn(LAYERS, 64, 4, 16, generator=fresh_generator()), torch.zeros(64, 2, 16)
    rows = run_chunk(observer, 1, q, 60, length=4, final=True, window=range(56, 64))
    with pytest.raises(AssertionError, match="4 queries of range"):
        observer.score(1, rows[0], keys, keys, torch.arange(64), 0.25)


def begin(observer, spans):
    """A prompt of 64 tokens in row 4, all of it in one chunk."""
    compressor = observer.compressor
    wanted = compressor.config.observation_rows
    observer.watch(4, observed_window(compressor.observed_rows, spans, 64, wanted))
    observer.begin(4, spans)


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
    begin(observer, spans)
    slots = torch.randperm(100, generator=generator)[:64]
    for layer in range(LAYERS):
        observed, k_rows = observer.gather(4, layer, q[layer], 0), torch.full((100, 2, 16), float("nan"))
        k_rows[slots] = keys[layer]
        observer.score(4, observed, k_rows, k_rows, slots, 0.25)
    observed = observer.finish(4)
    statistic, salience = observed.statistic, observed.salience
    assert observed.spans == spans
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
    begin(observer, (VisualSpan(10, 60, "image"),))
    for _ in range(LAYERS):
        observer.score(4, observer.gather(4, 0, q, 0), keys, keys, torch.arange(64), 0.25)
    torch.testing.assert_close(observer.finish(4).salience[0], score_heads(q[-W:], keys, scaling=0.25)[1])


def test_methods_are_told_which_tokens_are_text_and_which_layer_it_is():
    seen = []

    class Spy(HybridKV):
        def score_layer(self, layer):
            seen.append((layer.is_text.tolist(), layer.layer_idx))
            return super().score_layer(layer)

    observer, q = PromptObserver(Spy(HybridKVConfig()), LAYERS), torch.randn(64, 4, 16, generator=fresh_generator())
    begin(observer, (VisualSpan(10, 59, "image"),))
    for layer in range(LAYERS):
        observer.score(4, observer.gather(4, layer, q, 0), q[:, :2], q[:, :2], torch.arange(64), 0.25)
    mask = [not 10 <= token < 59 for token in range(64)]
    assert seen == [(mask, 0), (mask, 1)]
