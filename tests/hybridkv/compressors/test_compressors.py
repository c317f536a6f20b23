"""Laws of every registered compressor, and of each method."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.cache.compress import kept_tokens
from sglang_hybridkv.compressors import BUILT_IN, Compressor, HeadPlan, PromptLayer, PromptObservation, get_compressor
from sglang_hybridkv.compressors.madakv import MadaKV
from sglang_hybridkv.config import RetrievalConfig
from sglang_hybridkv.requests.spans import VisualSpan
from tests.builders import ALL_HEADS, LAWS, TinyPool, forced_kernels, fresh_generator, make_compressor

every_compressor = pytest.mark.parametrize("name", BUILT_IN)
P = 16


def make_spans(num_tokens):
    """Text, an image, text."""
    return (VisualSpan(num_tokens // 8, num_tokens * 3 // 4, "image"),) if num_tokens >= 8 else ()


@st.composite
def observed(draw):
    """An observation and a legal budget in head pages, as any method could meet them."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    num_heads, num_pages = shape[0] * shape[1], draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    salience = torch.rand(*shape, num_pages * P, generator=generator) / (num_pages * P)
    if draw(st.booleans()):
        salience = (salience * num_pages * P * 3).round() / 3  # ties, and zeros
    is_text = torch.rand(num_pages * P, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    statistic = torch.rand(shape, generator=generator) * draw(st.sampled_from([0.0, 1.0]))
    if draw(st.booleans()):
        statistic = (statistic * 4).round() / 4  # ties, and values at a threshold
    floor = min(2, num_pages)
    total = draw(st.integers(num_heads * floor, num_heads * num_pages))
    return PromptObservation(statistic, salience, is_text, num_pages), total


# Of the only method that has so many; others are tried with their defaults.
HYBRIDKV_SETTINGS = st.fixed_dictionaries(
    {
        "theta": st.sampled_from([0.0, 0.5, 0.9, 1.01]),
        "max_dynamic_heads": st.sampled_from([0.0, 0.29, 0.35, 1.0]),
        "dynamic_share": st.none() | st.floats(0.0, 1.0),
        "dynamic_ratio": st.sampled_from([0.1, 1.0, 3.0]),
        "min_head_pages": st.integers(1, 2),
        "static_weight": st.sampled_from(["sparsity", "density", "uniform"]),
    }
)


def drawn_for(name, observation, data):
    config = data.draw(HYBRIDKV_SETTINGS) if name == "hybridkv" else {}
    return made_for(name, observation, **config)


def made_for(name, observation, **config):
    return make_compressor(name, *observation.statistic.shape, **config)


def kept_rows(compressor, observation, plan):
    """[L, H, N], bool, by the definition of `rank_tokens`."""
    order = compressor.rank_tokens(observation, plan).sorted()
    everything = torch.arange(observation.salience.shape[-1]).expand_as(observation.salience)
    assert torch.equal(order.sort(dim=-1).values, everything), "each head ranks every token once"
    taken = everything < (plan.num_head_pages * P).unsqueeze(-1)
    return torch.zeros_like(taken).scatter_(-1, order, taken)


@every_compressor
@LAWS
@given(observed(), st.data())
def test_pages_are_the_budget_and_types_are_allowed(name, case, data):
    observation, total = case
    most_dynamic = data.draw(st.integers(0, observation.statistic.numel()) | st.just(ALL_HEADS))
    compressor = drawn_for(name, observation, data)
    plan = compressor.plan(observation, total, most_dynamic=most_dynamic)
    pages = plan.num_head_pages
    assert pages.shape == plan.is_dynamic.shape == observation.statistic.shape
    assert pages.dtype == torch.int64
    assert int(pages.sum()) == total
    assert int(pages.min()) >= min(compressor.config.min_head_pages, observation.num_prompt_pages)
    assert int(pages.max()) <= observation.num_prompt_pages
    assert int(plan.is_dynamic.sum()) <= (most_dynamic if compressor.may_retrieve else 0)
    wanted = compressor.plan(observation, total, most_dynamic=ALL_HEADS).is_dynamic
    assert int(plan.is_dynamic.sum()) == min(int(wanted.sum()), most_dynamic), "no more heads are static than must be"
    assert (wanted | ~plan.is_dynamic).all(), "those that stay dynamic would be so with more room"
    fewest = compressor.config.fewest_dynamic_heads(wanted.numel(), len(observation.is_text))
    assert fewest <= int(wanted.sum())
    dynamic = pages[plan.is_dynamic]
    assert len(dynamic) == 0 or int(dynamic.max() - dynamic.min()) <= 1


@every_compressor
@LAWS
@given(observed(), st.data())
def test_the_whole_budget_keeps_everything(name, case, data):
    observation, _ = case
    compressor = drawn_for(name, observation, data)
    everything = observation.statistic.numel() * observation.num_prompt_pages
    plan = compressor.plan(observation, everything, most_dynamic=ALL_HEADS)
    assert (plan.num_head_pages == observation.num_prompt_pages).all()
    assert kept_tokens(compressor, observation, plan).all()


@every_compressor
@LAWS
@given(observed(), st.data())
def test_each_head_ranks_every_token_once_and_forced_ones_first(name, case, data):
    observation, total = case
    compressor = drawn_for(name, observation, data)
    kept_rows(compressor, observation, compressor.plan(observation, total, most_dynamic=ALL_HEADS))
    plan = compressor.plan(observation, total, most_dynamic=0)
    kept, num_tokens = kept_rows(compressor, observation, plan), observation.salience.shape[-1]
    assert torch.equal(kept, kept_tokens(compressor, observation, plan))
    forced = {*range(min(compressor.config.num_sink_tokens, num_tokens))}
    forced |= {*range(max(num_tokens - compressor.config.recent_window, 0), num_tokens)}
    room = (plan.num_head_pages * P).min() >= len(forced)
    assert not room or kept[..., sorted(forced)].all()


@every_compressor
@LAWS
@given(observed(), st.data())
def test_a_larger_budget_takes_nothing_where_weights_do_not_follow_it(name, case, data):
    if name in ("adakv", "sparsemm", "pyramidkv"):
        return  # their formulas split the budget beyond the window, so the proportions move with it
    observation, total = case
    compressor = drawn_for(name, observation, data)
    more = data.draw(st.integers(total, observation.statistic.numel() * observation.num_prompt_pages))
    small, large = (compressor.plan(observation, t, most_dynamic=ALL_HEADS) for t in (total, more))
    assert (large.num_head_pages >= small.num_head_pages).all()
    assert torch.equal(large.is_dynamic, small.is_dynamic)


@every_compressor
def test_dynamic_heads_need_a_config_for_retrieval(name):
    assert get_compressor(name).may_retrieve == issubclass(get_compressor(name).config_class, RetrievalConfig)
    assert get_compressor(name).name == name


@every_compressor
@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_scores_are_finite_and_read_the_prompt_only(name, num_rows):
    """Foreign slots are NaN, so a score without NaN was read from the prompt's own."""
    generator, heads, head_dim, num_tokens = fresh_generator(), 2, 32, 70
    compressor = make_compressor(name, 3, heads)
    slots = torch.randperm(200, generator=generator)[:num_tokens]
    k_rows, v_rows = (torch.full((200, heads, head_dim), float("nan")) for _ in range(2))
    k_rows[slots] = torch.randn(num_tokens, heads, head_dim, generator=generator)
    v_rows[slots] = torch.randn(num_tokens, heads, head_dim, generator=generator)
    q = torch.randn(num_rows, heads * 3, head_dim, generator=generator)
    is_text = torch.rand(num_tokens, generator=generator) < 0.4
    statistic, salience = compressor.score_layer(
        PromptLayer(q, k_rows, v_rows, slots, head_dim**-0.5, is_text, layer_idx=1)
    )
    assert statistic.shape in ((heads,), (heads, 2))
    assert salience.shape == (heads, num_tokens)
    assert statistic.dtype == salience.dtype == torch.float32
    assert statistic.isfinite().all()
    assert salience.isfinite().all()
    assert (salience >= 0).all()


def make_pool(name, prompt_len, **config):
    compressor = make_compressor(name, 2, 2, page_size=8, min_prompt_tokens=1, min_head_pages=1, **config)
    pool = TinyPool(fresh_generator(), compressor=compressor)
    return pool, pool.add_prompt(prompt_len)


def compressed_pool(name, *, prompt_len, **config):
    pool, prompt = make_pool(name, prompt_len, **config)
    pool.compress(prompt, spans=make_spans(prompt_len))
    return pool, prompt


@every_compressor
@pytest.mark.parametrize("prompt_len", [8, 43, 96])
def test_budget_one_is_the_full_cache_bit_for_bit(name, prompt_len):
    """The same naive attention reads the prompt's own rows before, and the compressed copy afterwards."""
    with forced_kernels("naive"):
        pool, prompt = make_pool(name, prompt_len, budget=1.0)
        queries = [pool.queries(1) for _ in range(2)]
        before = [pool.decode([prompt], layer, q) for layer, q in enumerate(queries)]
        pool.compress(prompt, spans=make_spans(prompt_len))
        for layer, q in enumerate(queries):
            assert torch.equal(pool.decode([prompt], layer, q), before[layer])


@every_compressor
def test_a_third_keeps_real_rows_only(name):
    """Whatever nobody wrote is NaN; kept rows are rows of the prompt, but where a method merges."""
    if name == "full":
        return
    pool, prompt = compressed_pool(name, prompt_len=120, budget=0.34)
    rows = 0
    for layer in range(2):
        for head in range(2):
            keys, values = pool.held_rows(prompt, layer, head)
            rows += len(keys)
            assert keys.isfinite().all()
            assert values.isfinite().all()
            if not pool.compressor.merges:
                pool.held_tokens(prompt, layer, head)
        assert pool.decode([prompt], layer, pool.queries(1)).isfinite().all()
    assert rows <= 0.34 * prompt.reservation.geometry.covered * 4
    if not pool.compressor.may_retrieve:
        assert len(prompt.reservation.host_pages) == 0
        assert len(prompt.reservation.pages) == -(-rows // (8 * 4)), "nothing but the budget, in whole pages"


# SnapKV and what is made of it.


@LAWS
@given(observed())
def test_snapkv_keeps_the_window_and_the_most_salient(case):
    observation, total = case
    compressor = made_for("snapkv", observation)
    plan = compressor.plan(observation, total, most_dynamic=0)
    assert int(plan.num_head_pages.max() - plan.num_head_pages.min()) <= 1
    kept, window = kept_rows(compressor, observation, plan), compressor.config.recent_window
    assert kept[..., -window:].all()
    before, taken = observation.salience[..., :-window], kept[..., :-window]
    worst = before.masked_fill(~taken, float("inf")).amin(-1) if before.shape[-1] else torch.zeros(1)
    best = before.masked_fill(taken, -1.0).amax(-1) if before.shape[-1] else torch.zeros(1)
    assert (worst >= best).all()


@LAWS
@given(observed(), st.floats(1.0, 50.0))
def test_pyramidkv_never_gives_a_higher_layer_more(case, beta):
    observation, total = case
    pages = made_for("pyramidkv", observation, beta=beta).plan(observation, total, most_dynamic=0).num_head_pages
    assert (pages.diff(dim=0) <= 0).all()


def test_pyramidkv_is_a_pyramid():
    observation = PromptObservation(torch.zeros(4, 2), torch.rand(4, 2, 1600), torch.ones(1600).bool(), 100)
    pages = made_for("pyramidkv", observation, beta=20.0).plan(observation, 160, most_dynamic=0).num_head_pages
    assert (pages.sum(1).diff() < -5).all()


@LAWS
@given(observed(), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_adakv_leaves_every_head_the_safeguard(case, alpha):
    observation, total = case
    pages = made_for("adakv", observation, safeguard=alpha).plan(observation, total, most_dynamic=0).num_head_pages
    mean = total / pages.numel()
    assert int(pages.min()) >= int(alpha * mean)
    assert alpha < 1.0 or int(pages.max() - pages.min()) <= 1


def test_adakv_gives_the_head_with_more_of_the_best_tokens_more():
    salience = torch.rand(1, 2, 640, generator=fresh_generator())
    salience[0, 0] *= 0.1
    observation = PromptObservation(torch.zeros(1, 2), salience, torch.ones(640).bool(), 40)
    pages = made_for("adakv", observation).plan(observation, 16, most_dynamic=0).num_head_pages[0]
    assert pages.tolist() == [3, 13], "window 2 + 0.2 * 6 pages, and the rest"


@LAWS
@given(observed(), st.integers(0, 2**31 - 1))
def test_sparsemm_follows_the_visual_head_scores(case, seed):
    observation, total = case
    scores = torch.rand(observation.statistic.shape, generator=torch.Generator().manual_seed(seed)) + 0.01
    compressor = made_for("sparsemm", observation, scores=scores.tolist())
    pages = compressor.plan(observation, total, most_dynamic=0).num_head_pages.flatten()
    by_score = pages[scores.flatten().argsort()]
    assert (by_score.diff() >= 0).all()


# Methods that know text from images.


@LAWS
@given(observed(), st.sampled_from(["look-m", "tgv-kv"]))
def test_text_first_methods_drop_no_text_while_they_keep_an_image(case, name):
    observation, total = case
    compressor = made_for(name, observation)
    plan = compressor.plan(observation, total, most_dynamic=0)
    kept, is_text, config = kept_rows(compressor, observation, plan), observation.is_text, compressor.config
    num_tokens = len(is_text)
    for layer, head in torch.cartesian_prod(*map(torch.arange, plan.num_head_pages.shape)).tolist():
        rows = int(plan.num_head_pages[layer, head]) * P
        recent = max(config.recent_window, int(getattr(config, "recent_share", 0.0) * rows))
        free = torch.arange(config.num_sink_tokens, num_tokens - recent)
        mine, text = kept[layer, head, free], is_text[free]
        assert not (text & ~mine).any() or not (~text & mine).any()


@LAWS
@given(observed(), st.sampled_from([0.0, 0.3, 0.8]))
def test_look_m_keeps_its_recent_share(case, share):
    observation, total = case
    compressor = made_for("look-m", observation, recent_share=share)
    plan = compressor.plan(observation, total, most_dynamic=0)
    kept = kept_rows(compressor, observation, plan)
    for layer, head in torch.cartesian_prod(*map(torch.arange, plan.num_head_pages.shape)).tolist():
        recent = int(share * int(plan.num_head_pages[layer, head]) * P)
        assert kept[layer, head, len(observation.is_text) - recent :].all()


@st.composite
def layers_to_merge(draw):
    num_tokens = draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    keys, values = torch.randn(2, 2, num_tokens, 8, generator=generator)
    kept, is_text = torch.rand(2, num_tokens, generator=generator) < 0.3, torch.rand(num_tokens) < 0.3
    kept[:, 0] = True
    return keys, values, kept, is_text


@LAWS
@given(layers_to_merge(), st.sampled_from(["averaged", "pivotal", "weighted"]))
def test_merging_is_the_published_mean(case, merging):
    keys, values, kept, is_text = case
    before = keys.clone(), values.clone()
    merged = make_compressor("look-m", 1, 2, merging=merging, budget=1.0).merge(keys, values, kept, is_text)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
    for head in range(2):
        joined = {int(c): [] for c in kept[head].nonzero()}
        for e in (~kept[head] & ~is_text).nonzero().flatten().tolist():
            cosines = {c: torch.cosine_similarity(keys[head, e], keys[head, c], dim=0) for c in joined}
            target = max(cosines, key=lambda c: float(cosines[c]))
            joined[target].append((e, max(float(cosines[target]), 0.0)))
        for rows, after in zip((keys, values), merged, strict=True):
            for c, members in joined.items():
                entering = {
                    "averaged": [rows[head, e] for e, _ in members],
                    "pivotal": [(rows[head, e] + rows[head, c]) / 2 for e, _ in members],
                    "weighted": [s * rows[head, e] for e, s in members],
                }[merging]
                expected = torch.stack([rows[head, c], *entering]).mean(0)
                torch.testing.assert_close(after[head, c], expected, rtol=1e-4, atol=1e-5)
                assert members or torch.equal(after[head, c], rows[head, c])


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.34])
def test_merging_looks_at_as_many_rows_as_a_budget_keeps(budget):
    """How many those are the host knows by the budget alone: 0.3 of 20 pages are 6, 0.34 of them at most 7."""
    generator, num_pages = fresh_generator(), 20
    keys, values = torch.randn(2, 2, num_pages * P, 8, generator=generator)
    is_text = torch.rand(num_pages * P, generator=generator) < 0.3
    most = math.ceil(round(budget * num_pages, 6)) * P
    kept = torch.rand(2, num_pages * P, generator=generator).argsort(-1) < torch.tensor([[most], [most - P]])
    one, two = (
        make_compressor("look-m", 1, 2, budget=b, page_size=P).merge(keys, values, kept, is_text) for b in (budget, 1)
    )
    for some, all_ in zip(one, two, strict=True):
        torch.testing.assert_close(some[kept], all_[kept])


@pytest.mark.parametrize("merging", ["averaged", "pivotal", "weighted", "none"])
def test_a_head_that_keeps_everything_merges_nothing(merging):
    generator = fresh_generator()
    keys, values = torch.randn(2, 2, 64, 8, generator=generator).to(torch.bfloat16)
    kept, is_text = torch.ones(2, 64, dtype=torch.bool), torch.arange(64) < 20
    compressor = make_compressor("look-m", 1, 2, merging=merging, budget=1.0)
    for merged, rows in zip(compressor.merge(keys, values, kept, is_text), (keys, values), strict=True):
        assert torch.equal(merged, rows)


def test_look_m_writes_what_it_merges_to_the_kept_rows():
    pool, prompt = compressed_pool("look-m", prompt_len=160, budget=0.3)
    rows = [pool.held_rows(prompt, layer, head) for layer in range(2) for head in range(2)]
    exact = [(prompt.keys[layer, head], prompt.values[layer, head]) for layer in range(2) for head in range(2)]
    changed = [~(keys[:, None] == mine[None]).all(-1).any(1) for (keys, _), (mine, _) in zip(rows, exact, strict=True)]
    assert all(some.any() for some in changed), "each head merges something"
    assert not all(some.all() for some in changed), "and leaves most text as it is"
    plain, same = compressed_pool("look-m", prompt_len=160, budget=0.3, merging="none")
    for layer in range(2):
        for head in range(2):
            plain.held_tokens(same, layer, head)


@LAWS
@given(observed())
def test_madakv_splits_by_preference(case):
    observation, total = case
    compressor = made_for("madakv", observation, num_sink_tokens=0, recent_window=0)
    assert isinstance(compressor, MadaKV)
    plan = compressor.plan(observation, total, most_dynamic=0)
    kept, is_text = kept_rows(compressor, observation, plan), observation.is_text
    for layer, head in torch.cartesian_prod(*map(torch.arange, plan.num_head_pages.shape)).tolist():
        rows, salience = int(plan.num_head_pages[layer, head]) * P, observation.salience[layer, head].double()
        share = float(salience[is_text].sum() / salience.sum()) if salience.sum() > 0 else 0.5
        num_text = min(max(share * rows, rows - int((~is_text).sum())), int(is_text.sum()))
        assert abs(int(kept[layer, head, is_text].sum()) - num_text) <= 0.51


def test_madakv_gives_layers_that_need_more_tokens_more():
    salience = torch.full((2, 2, 320), 1e-6)
    salience[0, :, 30:50] = 0.05  # ten tokens of text and ten of an image hold all
    salience[1] = 1 / 320
    observation = PromptObservation(torch.zeros(2, 2), salience, torch.arange(320) < 40, 20)
    pages = made_for("madakv", observation).plan(observation, 30, most_dynamic=0).num_head_pages
    assert pages[0].tolist() == [2, 2]
    assert pages[1].tolist() == [13, 13]


def test_tgv_kv_weighs_layers_by_attention_to_images_and_heads_alike():
    generator = fresh_generator()
    compressor = make_compressor("tgv-kv", 1, 2)
    q, k = torch.randn(6, 4, 32, generator=generator), torch.randn(40, 2, 32, generator=generator)
    is_text = torch.arange(40) >= 30
    mass, salience = compressor.score_layer(PromptLayer(q, k, k, torch.arange(40), 0.2, is_text, layer_idx=0))
    q_HGWD = q.view(6, 2, 2, 32).permute(1, 2, 0, 3)
    logits = q_HGWD @ k.permute(1, 2, 0)[:, None] * 0.2
    future = torch.arange(40) > torch.arange(34, 40)[:, None]
    attention = logits.masked_fill(future, float("-inf")).softmax(-1).mean((0, 1))
    weights = [attention[i:, 34 + i].mean() for i in range(6)]
    expected = sum(w * attention[i, :30] for i, w in enumerate(weights))
    torch.testing.assert_close(salience[:, :30], expected.expand(2, -1))
    torch.testing.assert_close(mass, attention[:, :30].sum().expand(2))


def test_expected_attention_is_the_mean_over_gaussian_queries():
    """Against sampling: E[exp(q . k)] over queries of the same mean and covariance."""
    generator = fresh_generator()
    q, keys = torch.randn(64, 1, 4, generator=generator) * 0.5 + 0.3, torch.randn(20, 1, 4, generator=generator)
    compressor = make_compressor("expected-attention", 1, 1, num_sink_tokens=0)
    ones = torch.full_like(keys, 0.5)
    _, salience = compressor.score_layer(
        PromptLayer(q, keys, ones, torch.arange(20), 0.5, torch.ones(20).bool(), layer_idx=0)
    )
    mean, covariance = q[:, 0].mean(0), torch.cov(q[:, 0].T, correction=0)
    root = torch.linalg.cholesky(covariance)
    samples = mean + torch.randn(200_000, 4, generator=generator) @ root.T
    sampled = (samples @ keys[:, 0].T * 0.5).exp().mean(0)
    torch.testing.assert_close(salience[0], sampled / sampled.sum(), rtol=0.03, atol=1e-3)


def test_quest_retrieves_with_every_head_and_prunes_where_it_cannot():
    observation = PromptObservation(torch.rand(2, 3), torch.rand(2, 3, 160), torch.ones(160).bool(), 10)
    compressor = made_for("quest", observation)
    assert compressor.config.chunk_score == "quest"
    assert compressor.plan(observation, 30, most_dynamic=ALL_HEADS).is_dynamic.all()
    assert not compressor.plan(observation, 30, most_dynamic=0).is_dynamic.any()
    sparsest = observation.statistic.flatten().topk(4).indices
    assert not compressor.plan(observation, 30, most_dynamic=2).is_dynamic.flatten()[sparsest].any()


def test_random_agrees_with_itself_and_not_with_another_seed():
    observation = PromptObservation(torch.zeros(2, 2), torch.zeros(2, 2, 320), torch.arange(320) % 7 == 0, 20)
    plan = HeadPlan(torch.zeros(2, 2).bool(), torch.full((2, 2), 5))
    one, two, other = (kept_rows(made_for("random", observation, seed=seed), observation, plan) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0, 0], one[0, 1]), "each head draws for itself"


def test_what_a_method_leaves_alone_is_snapkv():
    class Plain(Compressor):
        name = "plain"

    observation = PromptObservation(torch.zeros(1, 2), torch.rand(1, 2, 96), torch.ones(96).bool(), 6)
    plain = Plain(get_compressor("snapkv").config_class())
    plan = plain.plan(observation, 6, most_dynamic=ALL_HEADS)
    snapkv = made_for("snapkv", observation)
    assert torch.equal(kept_rows(plain, observation, plan), kept_rows(snapkv, observation, plan))
