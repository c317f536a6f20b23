import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.compressors.token_order import chunk_salience, pool_salience, text_first_order
from tests.builders import LAWS, fresh_generator

seeds = st.integers(0, 2**31 - 1)


@st.composite
def prompts(draw):
    """Salience [1, 2, N], text mask and settings of a prompt."""
    num_tokens = draw(st.integers(8, 80))
    generator = torch.Generator().manual_seed(draw(seeds))
    salience = torch.rand(1, 2, num_tokens, generator=generator)
    if draw(st.booleans()):
        salience = (salience * 3).round() / 3  # ties
    is_text = torch.tensor(draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    num_kept = torch.tensor([[draw(st.integers(1, num_tokens)), draw(st.integers(1, num_tokens))]])
    settings = {
        "num_sink_tokens": draw(st.integers(0, 6)),
        "recent_window": draw(st.integers(0, 12)),
        "text_share": draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    }
    return salience, is_text, num_kept, settings


def kept_sets(salience, is_text, num_kept, settings):
    order = text_first_order(salience, is_text, num_kept, **settings)
    sorted_tokens = order.sorted()
    assert torch.equal(sorted_tokens.sort(-1).values, torch.arange(salience.shape[-1]).expand_as(sorted_tokens))
    kept = [set(order.first(num_kept)[0, h].nonzero().flatten().tolist()) for h in range(2)]
    assert kept == [set(sorted_tokens[0, h, : num_kept[0, h]].tolist()) for h in range(2)]
    known = text_first_order(salience, is_text, num_kept, **settings, least_kept=int(num_kept.min()))
    assert torch.equal(known.first(num_kept), order.first(num_kept)), "what the host knows changes nothing"
    return kept


def forced_tokens(num_tokens, settings):
    recent = range(max(num_tokens - settings["recent_window"], 0), num_tokens)
    return set(range(min(settings["num_sink_tokens"], num_tokens))) | set(recent)


@LAWS
@given(prompts())
def test_sinks_and_the_recent_window_are_always_kept(prompt):
    _salience, is_text, num_kept, settings = prompt
    forced = forced_tokens(len(is_text), settings)
    for head, kept in enumerate(kept_sets(*prompt)):
        assert forced <= kept if len(forced) <= num_kept[0, head] else kept <= forced


@LAWS
@given(prompts())
def test_text_is_never_dropped_while_a_visual_token_is_kept(prompt):
    salience, is_text, num_kept, settings = prompt
    settings = settings | {"text_share": 1.0}
    forced = forced_tokens(len(is_text), settings)
    text = set(is_text.nonzero().flatten().tolist())
    for kept in kept_sets(salience, is_text, num_kept, settings):
        if text - kept - forced:
            assert kept - text <= forced, "a visual token holds a place that text wanted"


@LAWS
@given(prompts())
def test_each_tier_is_ranked_by_salience(prompt):
    """Among the text that competes, among visual tokens, and where text overruns the budget: the salient stay."""
    salience, is_text, _num_kept, settings = prompt
    forced = forced_tokens(len(is_text), settings)
    for head, kept in enumerate(kept_sets(*prompt)):
        for tier in (is_text, ~is_text):
            tokens = set(tier.nonzero().flatten().tolist()) - forced
            in_tier, out = kept & tokens, tokens - kept
            if in_tier and out:
                assert min(salience[0, head, list(in_tier)]) >= max(salience[0, head, list(out)])


@LAWS
@given(prompts())
def test_text_takes_no_more_than_its_share_ahead_of_more_salient_visual_tokens(prompt):
    salience, is_text, num_kept, settings = prompt
    forced = forced_tokens(len(is_text), settings)
    for head, kept in enumerate(kept_sets(*prompt)):
        dropped = set((~is_text).nonzero().flatten().tolist()) - kept
        if not dropped or kept <= forced:
            continue
        best_dropped = max(salience[0, head, list(dropped)])
        favoured = [t for t in kept - forced if is_text[t] and salience[0, head, t] < best_dropped]
        assert len(favoured) <= math.ceil(settings["text_share"] * int(num_kept[0, head]))


def test_ranking_still_works_at_the_salience_of_long_prompts():
    """Probabilities of a 16k prompt are of the order 1e-5 and differ by less than fp32 resolves above 1."""
    generator = fresh_generator()
    num_tokens, num_kept = 16384, 512
    salience = torch.rand(1, 1, num_tokens, generator=generator) * 2e-6
    text = torch.zeros(num_tokens, dtype=torch.bool)
    num_kept = torch.tensor([[num_kept]])
    order = text_first_order(salience, ~text, num_kept, num_sink_tokens=4, recent_window=16, text_share=1.0)
    kept = order.first(num_kept)[0, 0]
    assert salience[0, 0, 4:-16][kept[4:-16]].min() >= salience[0, 0, ~kept].max()


@LAWS
@given(seeds, st.integers(1, 20), st.sampled_from([1, 3, 5, 7, 9]))
def test_pooling_is_the_mean_of_the_real_neighbours(seed, num_tokens, kernel):
    salience = torch.rand(2, 3, num_tokens, generator=torch.Generator().manual_seed(seed))
    half = kernel // 2
    around = [salience[..., max(i - half, 0) : i + half + 1].mean(-1) for i in range(num_tokens)]
    torch.testing.assert_close(pool_salience(salience, kernel), torch.stack(around, -1))


def test_pooling_of_nothing_is_nothing():
    assert pool_salience(torch.empty(2, 3, 0), 5).shape == (2, 3, 0)


@pytest.mark.parametrize("page_size", [8, 16])
def test_chunk_salience_is_the_sum_over_the_chunk(page_size):
    salience = torch.rand(2, 3, 5 * page_size, generator=fresh_generator())
    sums = chunk_salience(salience, page_size)
    for chunk in range(5):
        torch.testing.assert_close(sums[..., chunk], salience[..., chunk * page_size : (chunk + 1) * page_size].sum(-1))
