import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_kernels.score_heads import score_heads
from sglang_hybridkv.cache.observation import PromptObserver, QueryPart
from sglang_hybridkv.compressors import base
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
        observer.score([QueryPart(1, rows[0], 0, torch.arange(64))], keys, keys, 0.25)


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
        observer.score([QueryPart(4, observed, 0, slots)], k_rows, k_rows, 0.25)
    seen_slots, observed = observer.finish(4)
    assert torch.equal(seen_slots, slots)
    statistic, salience = observed.statistic, observed.salience
    assert observed.spans == spans
    assert statistic.shape == (LAYERS, 2)
    assert salience.shape == (LAYERS, 2, 64)
    for layer in range(LAYERS):
        expected = score_heads(q[layer, -rows:], keys[layer], scaling=0.25)
        torch.testing.assert_close((statistic[layer], salience[layer]), expected)
        by_head = q[layer, -rows:].unflatten(1, (2, 2))  # [W, H, G, D]
        assert torch.equal(observed.query_rms[layer], by_head.square().mean(dim=(0, 2)).sqrt())
    assert not observer.is_final(4)
    assert not observer.is_interested(4)


def test_methods_of_the_last_window_observe_it_whatever_it_shows():
    observer = PromptObserver(make_compressor("snapkv", LAYERS, 2, observation_rows=W), LAYERS)
    generator = fresh_generator()
    q, keys = torch.randn(64, 4, 16, generator=generator), torch.randn(64, 2, 16, generator=generator)
    begin(observer, (VisualSpan(10, 60, "image"),))
    for _ in range(LAYERS):
        observer.score([QueryPart(4, observer.gather(4, 0, q, 0), 0, torch.arange(64))], keys, keys, 0.25)
    torch.testing.assert_close(observer.finish(4)[1].salience[0], score_heads(q[-W:], keys, scaling=0.25)[1])


def test_methods_are_told_which_tokens_are_text_and_which_layer_it_is():
    seen = []

    class Spy(HybridKV):
        def score_layer(self, layer):
            seen.append((layer.is_text.tolist(), layer.layer_idx))
            return super().score_layer(layer)

    observer, q = PromptObserver(Spy(HybridKVConfig()), LAYERS), torch.randn(64, 4, 16, generator=fresh_generator())
    begin(observer, (VisualSpan(10, 59, "image"),))
    for layer in range(LAYERS):
        part = QueryPart(4, observer.gather(4, layer, q, 0), 0, torch.arange(64))
        observer.score([part], q[:, :2], q[:, :2], 0.25)
    mask = [not 10 <= token < 59 for token in range(64)]
    assert seen == [(mask, 0), (mask, 1)]


class Own(HybridKV):
    """Scores prompts by itself, and each by its own settings."""

    def score_layer(self, layer):
        statistic, salience = super().score_layer(layer)
        return statistic * self.config.budget, salience


def config(**fields):
    return HybridKVConfig(observation_rows=W, **fields)


def make_prompts(compressors):
    """Keys of each layer, and of a prompt for each compressor: row, compressor, queries of each layer, slots."""
    generator, prompts = fresh_generator(), []
    for row, compressor in enumerate(compressors, 1):
        q = torch.randn(LAYERS, 20 + 7 * row, 4, 16, generator=generator)
        prompts.append((row, compressor, q, torch.randperm(100, generator=generator)[: q.shape[1]].int()))
    return torch.randn(LAYERS, 100, 2, 16, generator=generator), prompts


def score_together(keys, prompts):
    """What was seen of each of `prompts`, the part of a batch."""
    observer = make_observer()
    for row, compressor, q, _ in prompts:
        observer.watch(row, range(q.shape[1] - row, q.shape[1]))
        observer.begin(row, (VisualSpan(0, row, "image"),), compressor)
    for layer in range(LAYERS):
        parts = [QueryPart(row, observer.gather(row, layer, q[layer], 0), 0, slots) for row, _, q, slots in prompts]
        observer.score(parts, keys[layer], keys[layer], 0.25)
    return [observer.finish(row) for row, *_ in prompts]


@pytest.mark.parametrize(
    ("compressors", "calls"),
    [
        ([HybridKV(config())] * 4, [4]),
        ([HybridKV(config(budget=0.1)), HybridKV(config(budget=0.7, theta=0.5))], [2]),
        ([HybridKV(config()), HybridKV(config(statistic="hit_cv")), HybridKV(config())], [2, 1]),
        ([HybridKV(config()), Own(config()), HybridKV(config())], [2]),
        ([Own(config(budget=0.1)), Own(config(budget=0.2))], []),
        ([make_compressor("tgv-kv", LAYERS, 2), make_compressor("snapkv", LAYERS, 2)], [1]),
    ],
    ids=["server", "requests", "settings", "methods", "own", "other"],
)
def test_prompts_that_score_alike_share_a_call_and_are_what_they_are_alone(compressors, calls, monkeypatch):
    keys, prompts = make_prompts(compressors)
    alone = [score_together(keys, [prompt])[0] for prompt in prompts]
    seen, score = [], base.score_heads_batch
    monkeypatch.setattr(
        base, "score_heads_batch", lambda prompts, *k, **kw: seen.append(len(prompts)) or score(prompts, *k, **kw)
    )
    together = score_together(keys, prompts)
    assert seen == calls * LAYERS
    for (slots, got), (own_slots, expected), prompt in zip(together, alone, prompts, strict=True):
        assert torch.equal(slots, own_slots)
        assert torch.equal(slots, prompt[3].long())
        for field in ("statistic", "salience", "query_rms"):
            assert torch.equal(getattr(got, field), getattr(expected, field)), field


@pytest.mark.parametrize(
    ("mine", "other", "alike"),
    [
        (HybridKV(config(budget=0.1)), HybridKV(config(budget=0.7, theta=0.5)), True),
        (HybridKV(config()), HybridKV(config(capture_fraction=0.2)), False),
        (Own(config()), HybridKV(config()), False),
        (Own(config()), Own(config()), False),
    ],
)
def test_settings_of_scores_tell_who_scores_alike(mine, other, alike):
    assert mine.scores_like(mine)
    assert mine.scores_like(other) == other.scores_like(mine) == alike


def test_after_an_error_no_prompt_has_been_scored():
    """So that each can be scored alone."""

    class Faulty(HybridKV):
        def score_layer(self, layer):
            raise RuntimeError("injected")

    observer, q = make_observer(), torch.randn(9, 4, 16, generator=fresh_generator())
    for row, compressor in ((1, None), (2, Faulty(config()))):
        observer.watch(row, range(3, 9))
        observer.begin(row, (), compressor)
    parts = [QueryPart(row, observer.gather(row, 0, q, 0), 0, torch.arange(9)) for row in (1, 2)]
    with pytest.raises(RuntimeError, match="injected"):
        observer.score(parts, q[:, :2], q[:, :2], 0.25)
    observer.score(parts[:1], q[:, :2], q[:, :2], 0.25)
    assert len(observer.finish(1)[1].salience) == 1
