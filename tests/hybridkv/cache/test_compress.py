"""compress_prompt, seen through the pool's plain layout and through attention.

A prompt's own slots are NaN once it is compressed, as is all that belongs to nobody, so a result without NaN was
read from the compressed copy.
"""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridkv_kernels.chunks import CODED_SCORES, encode_keys
from hybridkv_kernels.head_pages import HeadPageLayout
from sglang_hybridkv.cache import offload
from sglang_hybridkv.cache.compress import ObservedPrompt, digest_plan, rows_by_place, salience_kept
from sglang_hybridkv.cache.observation import QueryPart
from sglang_hybridkv.compressors.base import HeadPlan
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.compressors.snapkv import SnapKV
from sglang_hybridkv.requests.spans import VisualSpan
from tests.builders import LAWS, NAN_BYTE, TinyPool, fresh_generator, full_attention, host_bytes, make_compressor

P = 16
CHUNK_SCORES = ["mean_max", "mean_mean", "quest", "arkvale", *CODED_SCORES]
THETA = {"static": 0.0, "dynamic": 1.01, "mixed": 0.5}


def pool_of(generator, *, heads="mixed", pool=None, **config):
    values = {"min_prompt_tokens": 1, "min_head_pages": 1, "theta": THETA[heads], "max_dynamic_heads": 1.0} | config
    return TinyPool(generator, HybridKVConfig(**values), **pool or {})


def mixed_statistic(pool):
    """Both types in each layer, in an order that differs from layer to layer."""
    shape = (len(pool.layout.full_layers), pool.layout.num_kv_heads)
    flat = (torch.arange(shape[0] * shape[1]) + torch.arange(shape[0]).repeat_interleave(shape[1])) % 2
    return flat.view(shape).float()


def check_equals_full_attention(pool, prompts, steps=3, rtol=1e-4, atol=1e-5):
    for _ in range(steps):
        for prompt in prompts:
            pool.append_token(prompt)
        for layer in range(pool.layout.num_layers):
            q = pool.queries(len(prompts))
            out = pool.decode(prompts, layer, q)
            for i, prompt in enumerate(prompts):
                window = pool.layout.window(layer)
                keys, values = prompt.keys[layer, :, -window:], prompt.values[layer, :, -window:]  # -0: all
                expected = full_attention(q[i], keys, values, pool.scaling)
                torch.testing.assert_close(out[i].double(), expected, rtol=rtol, atol=atol)


# Budget 1.0: nothing may be lost.


@pytest.mark.parametrize("heads", list(THETA))
@pytest.mark.parametrize("prompt_len", [P, P + 1, 2 * P - 1, 2 * P, 5 * P + 7])
def test_budget_one_equals_full_attention(kernels, prompt_len, heads):
    """With each score, or two of them in turn where the kernels are interpreted."""
    turn = 2 * (prompt_len + list(THETA).index(heads)) % len(CHUNK_SCORES)
    for chunk_score in (2 * CHUNK_SCORES)[turn : turn + 2] if kernels == "triton" else CHUNK_SCORES:
        pool = pool_of(fresh_generator(), heads=heads, budget=1.0, chunk_score=chunk_score)
        prompt = pool.add_prompt(prompt_len)
        pool.compress(prompt, mixed_statistic(pool) if heads == "mixed" else None)
        assert torch.equal(prompt.reservation.head_counts_on_host(), pool.table.num_head_pages[prompt.row])
        static, dynamic = prompt.reservation.outcome.tolist()
        assert (static > 0, dynamic > 0) == (heads != "dynamic", heads != "static")
        check_equals_full_attention(pool, [prompt], steps=1 if kernels == "triton" else 3)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-4)])
@pytest.mark.parametrize("chunk_score", ["mean_max", "quest", "half_codes"])
def test_budget_one_in_each_precision(dtype, tolerance, chunk_score):
    pool = pool_of(fresh_generator(), budget=1.0, chunk_score=chunk_score, pool={"dtype": dtype})
    prompt = pool.add_prompt(4 * P + 3)
    pool.compress(prompt, mixed_statistic(pool))
    check_equals_full_attention(pool, [prompt], rtol=tolerance, atol=tolerance)


SHAPES = [{"group_size": group, "head_dim": head_dim} for group in (1, 2, 4, 7, 8) for head_dim in (32, 64, 128)]
SHAPES += [{"num_layers": layers, "num_kv_heads": heads} for layers, heads in ((1, 1), (3, 1), (1, 5), (4, 3))]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("shape", "page_size"), [*((shape, P) for shape in SHAPES), ({}, 8), ({}, 32), ({}, 64)])
def test_budget_one_for_model_shapes_and_page_sizes(shape, page_size):
    pool = pool_of(fresh_generator(), budget=1.0, page_size=page_size, pool=shape)
    prompt = pool.add_prompt(3 * page_size + 5)
    pool.compress(prompt, mixed_statistic(pool))
    check_equals_full_attention(pool, [prompt], steps=1)


def test_compressed_and_dense_requests_share_a_batch(kernels):
    pool = pool_of(fresh_generator(), budget=1.0)
    prompts = [pool.add_prompt(length) for length in (3 * P, 2 * P + 1, 5 * P - 1, 7, 2 * P)]
    for i in (0, 2, 4):
        pool.compress(prompts[i], mixed_statistic(pool), most_dynamic=None if i != 4 else 0)
    assert prompts[4].reservation.outcome.tolist() == [4, 0], "without retrieval every head is static"
    # Far enough for all tails to open pages, or for one of them where the kernels are interpreted.
    check_equals_full_attention(pool, prompts, steps=3 if kernels == "triton" else P + 2)


WINDOWS = (P + 3, 0, 0, 3 * P)


@pytest.mark.usefixtures("fast_kernels")
@pytest.mark.parametrize("heads", ["static", "dynamic", "mixed"])
@pytest.mark.parametrize("prompt_len", [P + 1, 2 * P, 7 * P + 5])
def test_layers_with_a_window_are_exact_beside_layers_of_budget_one(prompt_len, heads):
    pool = pool_of(fresh_generator(), heads=heads, budget=1.0, pool={"num_layers": 4, "windows": WINDOWS})
    prompts = [pool.add_prompt(prompt_len), pool.add_prompt(3 * P + 1)]
    pool.compress(prompts[0], mixed_statistic(pool) if heads == "mixed" else None)
    assert prompts[0].reservation.outcome.sum() == 4, "heads with a window are none of the two types"
    check_equals_full_attention(pool, prompts, steps=P + 2)


@pytest.mark.parametrize("windows", [(), (0, 0, P), (P, 0, 0)])
def test_a_prompt_is_compressed_once_after_its_last_layer_though_that_has_a_window(windows, monkeypatch):
    """Before it the last layer's rows are not in the pool."""
    pool = pool_of(fresh_generator(), budget=0.5, pool={"num_layers": 3, "windows": windows})
    prompt = pool.add_prompt(6 * P + 3)
    pool.cache.observer.watch(prompt.row, range(5 * P, prompt.seq_len))
    pool.cache.bind(prompt.row, pool._reserve(prompt.seq_len, ()))
    after, seen = [], []
    monkeypatch.setattr(pool.cache, "compress", lambda row, slots, observed: seen.append((after[-1], observed)))
    for layer in range(3):
        after.append(layer)
        part = QueryPart(prompt.row, pool.queries(prompt.seq_len), 0, pool.req_to_token[prompt.row])
        pool.cache.observe(layer, [part], pool.scaling)
    [(last, observed)] = seen
    assert last == 2
    assert len(observed.statistic) == len(observed.salience) == len(observed.query_rms) == 3 - sum(map(bool, windows))


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_the_budget_is_a_share_of_the_layers_without_a_window(budget):
    config = {"budget": budget, "num_sink_tokens": 0, "recent_window": 0, "page_size": P}
    pool = pool_of(fresh_generator(), pool={"num_layers": 4, "windows": WINDOWS}, **config)
    prompt = pool.add_prompt(20 * P + 5)
    pool.compress(prompt, mixed_statistic(pool))
    geometry = prompt.reservation.geometry
    for layer, pages in ((0, 2), (3, 3)):  # as many of the last pages as the window reaches
        for head in range(2):
            assert pool.held_tokens(prompt, layer, head) == list(range((20 - pages) * P, 20 * P))
    assert geometry.window_head_pages == 2 * (2 + 3)
    assert geometry.budget_head_pages == int(budget * 20 * 4)
    assert int(pool.table.num_head_pages[prompt.row, 1:3].sum()) == geometry.budget_head_pages
    assert prompt.reservation.outcome.tolist() == [2, 2]


@pytest.mark.usefixtures("kernels")
def test_summaries_longer_than_a_page_and_its_twin():
    """2 vectors for each of 45 chunks are 90; a head page and its twin hold 16 at 8 tokens a page."""
    pool = pool_of(
        fresh_generator(), heads="dynamic", budget=1.0, chunk_score="quest", page_size=8, pool={"pages": 300}
    )
    prompt = pool.add_prompt(45 * 8)
    pool.compress(prompt)
    assert prompt.reservation.geometry.summary_pages_per_head == 6
    check_equals_full_attention(pool, [prompt], steps=1)


# Below 1.0: what is kept, told from the rows that the pages really hold.

budgets = st.sampled_from([0.1, 0.25, 0.5, 0.8])


@st.composite
def compressed(draw):
    """A compressed prompt with images, and everything it was compressed with."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    config = {
        "budget": draw(budgets),
        "pool_kernel": draw(st.sampled_from([1, 5])),
        "num_sink_tokens": draw(st.sampled_from([0, 4, 20])),
        "recent_window": draw(st.sampled_from([0, 16, 40])),
        "text_share": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "dynamic_share": draw(st.sampled_from([0.0, 0.32, 1.0])),
        "chunk_score": draw(st.sampled_from(CHUNK_SCORES)),
        "page_size": 8,
    }
    pool = pool_of(generator, pool={"head_dim": 8}, **config)
    chunks = draw(st.integers(int(1 / config["budget"]) + 1, 24))
    prompt = pool.add_prompt(chunks * 8 + draw(st.integers(0, 7)))
    statistic, salience = pool.rand(2, 2), pool.rand(2, 2, prompt.seq_len)
    borders = sorted(draw(st.sets(st.integers(0, prompt.seq_len), max_size=6)))
    spans = [VisualSpan(a, b, "image") for a, b in zip(borders[::2], borders[1::2], strict=False)]
    pool.compress(prompt, statistic, salience, spans=spans)
    return pool, prompt, statistic, salience, spans


def plain_pooled(salience, kernel):
    half = kernel // 2
    n = salience.shape[-1]
    return torch.stack([salience[..., max(i - half, 0) : i + half + 1].mean(-1) for i in range(n)], -1)


def plain_kept(pool, salience, is_text, count):
    """Tokens that one static head keeps: the tiers of METHOD 3, one after the other."""
    config, n = pool.config, len(is_text)
    best_first = sorted(range(n), key=lambda t: (-float(salience[t]), t))
    forced = [t for t in range(n) if t < config.num_sink_tokens or t >= n - config.recent_window]
    text = [t for t in best_first if is_text[t]]
    preferred = {t for rank, t in enumerate(text) if rank < config.text_share * count}
    order = [t for t in best_first if t in forced and t in preferred]
    order += [t for t in best_first if t in forced and t not in preferred]
    order += [t for t in best_first if t in preferred and t not in forced]
    order += [t for t in best_first if t not in forced and t not in preferred]
    return order[:count]


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(compressed())
def test_static_heads_hold_exactly_the_text_first_rows(case):
    pool, prompt, statistic, salience, spans = case
    covered = prompt.reservation.geometry.covered
    is_text = [not any(s.start <= t < s.end for s in spans) for t in range(covered)]
    pooled = plain_pooled(salience[..., :covered], pool.config.pool_kernel)
    for layer, head in itertools.product(range(2), range(2)):
        assert pool.is_dynamic(prompt, layer, head) == bool(statistic[layer, head] < 0.5)
        held = pool.held_tokens(prompt, layer, head)
        assert len(set(held)) == len(held), "no row twice"
        if pool.is_dynamic(prompt, layer, head):
            continue
        assert held == sorted(held), "rows lie in prompt order"
        expected = plain_kept(pool, pooled[layer, head], is_text, len(held))
        differing = set(held) ^ set(expected)  # only where two saliences are equal but for rounding
        values = pooled[layer, head, sorted(differing)]
        assert len(differing) == 0 or values.max() - values.min() < 1e-5


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(compressed())
def test_rows_on_the_device_are_the_budget(case):
    pool, prompt, *_ = case
    geometry = prompt.reservation.geometry
    rows = [len(pool.held_tokens(prompt, layer, head)) for layer, head in itertools.product(range(2), range(2))]
    assert sum(rows) == geometry.total_head_pages * 8 <= pool.config.budget * geometry.covered * 4 + 1e-6
    assert min(rows) >= 8


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(compressed())
def test_dynamic_heads_start_with_whole_chunks_that_the_map_names(case):
    pool, prompt, _, salience, _ = case
    covered = prompt.reservation.geometry.covered
    pooled = plain_pooled(salience[..., :covered], pool.config.pool_kernel)
    for layer, head in itertools.product(range(2), range(2)):
        if not pool.is_dynamic(prompt, layer, head):
            continue
        held, mapped = pool.held_tokens(prompt, layer, head), pool.mapped_chunks(prompt, layer, head)
        size = pool.config.tokens_per_chunk
        assert held == [chunk * size + i for chunk in mapped for i in range(size)]
        sums = pooled[layer, head].view(-1, size).sum(-1)
        num_chunks, sinks = covered // size, -(-pool.config.num_sink_tokens // size)
        recent = pool.config.recent_window // size
        free = [c for c in range(num_chunks) if sinks <= c < num_chunks - recent]
        inside, outside = [c for c in free if c in mapped], [c for c in free if c not in mapped]
        if inside and outside:
            assert sums[inside].min() >= sums[outside].max() - 1e-5, "the most salient chunks"


def stored_rows(pool, head_pages):
    """Keys and values [rows, D] of head pages of the host store."""
    page_size = pool.config.page_size
    records = torch.tensor(head_pages, dtype=torch.int64)[:, None] * page_size + torch.arange(page_size)
    return pool.store.pages.read(records.flatten())


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(compressed())
def test_the_host_store_has_every_row_of_dynamic_heads_and_no_other(case):
    pool, prompt, *_ = case
    geometry, per_page = prompt.reservation.geometry, pool.layout.head_pages_per_page
    dynamic = [i for i in itertools.product(range(2), range(2)) if pool.is_dynamic(prompt, *i)]
    rows = [page * per_page + i for page in prompt.reservation.host_pages.tolist() for i in range(per_page)]
    for rank, (layer, head) in enumerate(dynamic):
        mine = rows[rank * geometry.num_prompt_pages : (rank + 1) * geometry.num_prompt_pages]
        for stored, exact in zip(stored_rows(pool, mine), (prompt.keys, prompt.values), strict=True):
            assert torch.equal(stored, exact[layer, head, : geometry.covered])
    written = set(rows[: len(dynamic) * geometry.num_prompt_pages])
    hosted = host_bytes(pool.store.pages)
    foreign = [row for row in range(len(hosted)) if row not in written]
    assert (hosted[foreign] == NAN_BYTE).all()


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(compressed())
def test_summaries_survive_their_way_through_head_pages(case):
    pool, prompt, *_ = case
    geometry = prompt.reservation.geometry
    score = pool.config.chunk_score
    vectors = pool.config.summary_vectors(geometry.covered)
    for layer in range(2):
        heads = pool.table.is_dynamic[prompt.row, layer].nonzero().squeeze(1)
        if len(heads) == 0:
            continue
        read = pool.table.read_summaries(pool.views, prompt.row, layer, heads, vectors)
        keys = prompt.keys[layer, heads, : geometry.covered]
        if score in CODED_SCORES:
            num_channels = keys.shape[2] // CODED_SCORES[score]
            coded = encode_keys(keys, prompt.query_rms[layer, heads], num_channels)
            assert torch.equal(read.view(torch.int32), coded.view(torch.int32)), "bit by bit"
            continue
        chunks = keys.unflatten(1, (-1, 8))
        plain = [chunks.mean(2)] if score.startswith("mean") else [chunks.amin(2), chunks.amax(2)]
        torch.testing.assert_close(read, torch.stack(plain, 2).flatten(1, 2))


@pytest.mark.usefixtures("fast_kernels")
@LAWS
@given(compressed())
def test_nothing_but_the_reserved_pages_is_written(case):
    """Exact tail and NaN elsewhere; the pages of one request never spill into another's."""
    pool, prompt, *_ = case
    own = torch.zeros(pool.layout.pages_per_layer, dtype=torch.bool)
    own[prompt.reservation.pages] = True
    tail = torch.tensor(
        [prompt.pages[t // 8] * 8 + t % 8 for t in range(prompt.reservation.geometry.covered, prompt.seq_len)]
    )
    own_slots = own.repeat_interleave(8)
    own_slots[tail.long()] = True
    assert pool.keys[:, ~own_slots].isnan().all()
    assert pool.values[:, ~own_slots].isnan().all()


LAWS_OF_A_COMPRESSED_PROMPT = [
    test_static_heads_hold_exactly_the_text_first_rows,
    test_rows_on_the_device_are_the_budget,
    test_dynamic_heads_start_with_whole_chunks_that_the_map_names,
    test_the_host_store_has_every_row_of_dynamic_heads_and_no_other,
    test_summaries_survive_their_way_through_head_pages,
    test_nothing_but_the_reserved_pages_is_written,
]


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@settings(LAWS, max_examples=12)
@given(compressed())
def test_the_laws_above_hold_of_fewer_prompts_where_triton_is_interpreted(kernels, case):
    for law in LAWS_OF_A_COMPRESSED_PROMPT:
        law.hypothesis.inner_test(case)


@pytest.mark.parametrize("windows", [(), (0, 2 * P, 0)])
def test_what_is_offloaded_does_not_depend_on_how_many_heads_are_taken_at_once(windows, monkeypatch):
    """Nor does it matter to dynamic heads what the others leave in pages that go back."""
    found, seed = [], int(fresh_generator().initial_seed())
    for batch_bytes in (1, 1 << 26):
        monkeypatch.setattr(offload, "_BATCH_BYTES", batch_bytes)
        pool = pool_of(torch.Generator().manual_seed(seed), budget=0.5, pool={"num_layers": 3, "windows": windows})
        prompt = pool.add_prompt(6 * P)
        pool.compress(prompt, mixed_statistic(pool))
        assert 0 < prompt.reservation.outcome[1] < prompt.reservation.geometry.max_dynamic_heads
        found.append((pool.keys, pool.values, host_bytes(pool.store.pages)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


class Careless:
    """Beside a compressor: breaks the contract in one way."""

    fault = ""

    def plan(self, observation, total_head_pages, *, most_dynamic):
        plan = super().plan(observation, total_head_pages, most_dynamic=most_dynamic)
        pages, is_dynamic = plan.num_head_pages.clone(), plan.is_dynamic.clone()
        if self.fault == "budget":
            pages += 1
        elif self.fault == "empty head":
            pages[0, 0] = 0
        elif self.fault == "negative":
            pages[0, 0] = -1
        elif self.fault == "prompt":
            pages[0, 0], pages[0, 1:], pages[1:] = observation.num_prompt_pages + 1, 1, 1
        elif self.fault == "dynamic":
            is_dynamic[-1, -1] = True
        return HeadPlan(is_dynamic, pages)

    def rank_tokens(self, observation, plan):
        order = super().rank_tokens(observation, plan).sorted()
        if self.fault == "repeated token":
            order[..., 1] = order[..., 0]
        return order


class CarelessSnapKV(Careless, SnapKV):
    pass


class CarelessHybridKV(Careless, HybridKV):
    pass


EAGER = {"min_prompt_tokens": 1, "min_head_pages": 1, "budget": 0.3, "page_size": P}
CARELESS = [
    CarelessSnapKV(SnapKV.config_class(**EAGER)),
    CarelessHybridKV(HybridKVConfig(preset="paper", theta=0.5, **EAGER)),
]


@pytest.mark.usefixtures("fast_kernels")
@pytest.mark.parametrize("compressor", CARELESS, ids=["snapkv", "hybridkv"])
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("budget", r"num_head_pages = \d+ to \d+, \d+ in all; legal: 1 to 20 a head, at most \d+ in all"),
        ("empty head", "num_head_pages = 0 to "),
        ("negative", "num_head_pages = -1 to "),
        ("prompt", "num_head_pages = 1 to 21, "),
        ("dynamic", r"is_dynamic = \d heads; legal: at most 0"),
        ("repeated token", "rank_tokens must name each token once a head"),
    ],
)
def test_a_plan_that_breaks_the_contract_leaves_the_row_dense(fault, sentence, compressor):
    """Nothing beyond its reserved pages is written, and nothing reads those."""
    pool = TinyPool(fresh_generator(), compressor=compressor, num_layers=3, windows=(0, 2 * P, 0))
    compressor.fault = ""
    neighbour, prompt = pool.add_prompt(20 * P + 3), pool.add_prompt(20 * P + 3)
    pool.compress(neighbour, mixed_statistic(pool))
    before = pool.keys.clone(), pool.values.clone(), pool.views.held_chunks.clone()
    hosted = host_bytes(pool.store.pages)
    compressor.fault = fault
    statistic = pool.rand(2, 2)
    statistic[0, 0] = 1.0  # a static head: the others do not keep what is ranked first
    observed = ObservedPrompt((), statistic, pool.rand(2, 2, prompt.seq_len), pool.rand(2, 2, 32))
    with torch.device("cpu"):  # where a server's tensors are, unless it says otherwise
        reservation = pool._reserve(prompt.seq_len, (), most_dynamic=0 if fault == "dynamic" else None)
        pool.cache.observer.watch(prompt.row, range(prompt.seq_len))
        pool.cache.bind(prompt.row, reservation)
        pool.cache.compress(prompt.row, pool.req_to_token[prompt.row].long(), observed)
    assert re.match(sentence, reservation.refusal())
    assert pool.cache.readable(prompt.row) is None
    pool.cache.check_integrity()
    own, per_layer = reservation.pages.tolist(), (pool.layout.num_layers, pool.layout.pages_per_layer)
    for now, then in zip((pool.keys, pool.values, pool.views.held_chunks), before, strict=True):
        now, then = (x.view(*per_layer, -1).nan_to_num(7.0) for x in (now, then))
        now[:, own] = then[:, own] = 0
        assert torch.equal(now, then)
    now, then = (x.clone().view(pool.store.num_pages, -1) for x in (host_bytes(pool.store.pages), hosted))
    now[reservation.host_pages] = then[reservation.host_pages] = 0
    assert torch.equal(now, then)
    check_equals_full_attention(pool, [prompt])
    compressor.fault = ""


def digest(is_dynamic, kept):
    return int(digest_plan(kept.flatten().nonzero().squeeze(1), is_dynamic, kept.shape[-1]))


@LAWS
@given(st.integers(1, 300), st.integers(0, 2**31 - 1), st.floats(0.0, 1.0))
def test_kept_rows_lie_at_consecutive_places(num_rows, seed, share):
    kept = torch.rand(num_rows, generator=torch.Generator().manual_seed(seed)) < share
    places = kept.cumsum(0, dtype=torch.int32) - 1
    rows = kept.nonzero().squeeze(1).tolist()
    for room in (0, 5):
        found = rows_by_place(places, len(rows) + room).tolist()
        assert found == rows + [-1] * room


@LAWS
@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(2, 40), st.integers(0, 2**31 - 1))
def test_the_digest_tells_plans_apart(data, layers, heads, tokens, seed):
    """By one head's type, and by one token more or less; not by the order of rows."""
    generator = torch.Generator().manual_seed(seed)
    is_dynamic = torch.rand(layers, heads, generator=generator) < 0.5
    kept = torch.rand(layers, heads, tokens, generator=generator) < 0.3
    kept[..., 0] = True  # no head is without rows
    before = digest(is_dynamic, kept)
    rows = torch.cat((kept.flatten().nonzero().squeeze(1), torch.full((3,), -1)))
    order = torch.randperm(len(rows), generator=generator)
    assert int(digest_plan(rows[order], is_dynamic, tokens)) == before, "whatever the order, and whatever is unused"
    head = data.draw(st.integers(0, layers - 1)), data.draw(st.integers(0, heads - 1))
    token = data.draw(st.integers(1, tokens - 1))
    other_types, other_kept = is_dynamic.clone(), kept.clone()
    other_types[head] ^= True
    other_kept[(*head, token)] ^= True
    assert before not in (digest(other_types, kept), digest(is_dynamic, other_kept))


@pytest.mark.usefixtures("kernels")
def test_the_digest_does_not_depend_on_the_pages_that_a_prompt_got():
    pool = pool_of(fresh_generator(), budget=0.5)
    statistic, salience, digests = mixed_statistic(pool), pool.rand(2, 2, 8 * P + 3), []
    for _ in range(2):
        prompt = pool.add_prompt(8 * P + 3)
        pool.compress(prompt, statistic, salience)
        digests.append(int(prompt.reservation.digest))
    assert digests[0] == digests[1] != 0


def test_the_salience_that_is_kept_is_a_share_of_the_covered_prompt():
    salience = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 90.0], [0.0, 0.0, 5.0, 0.0, 7.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    kept = torch.tensor([[[True, False, False, True], [False, True, True, False], [True, True, True, True]]])
    layout = HeadPageLayout(1, 3, 1, 4)
    assert salience_kept(salience, kept, layout).nan_to_num(nan=-1.0).tolist() == [[0.5, 1.0, -1.0]]
    layout = HeadPageLayout(2, 3, 1, 4, windows=(2, 0))
    shares = salience_kept(salience, torch.cat((kept, kept)), layout)
    assert shares.nan_to_num(nan=-1.0).tolist() == [[-1.0] * 3, [0.5, 1.0, -1.0]]


# Without a window and with one, recorded on a CPU when the end of prefill still waited for the device.
DIGESTS = [
    ("hybridkv", {}, (0xAD38B2B85E467E45, 0x254C92D5323599B0)),
    ("snapkv", {}, (0x2CF5B2C098453204, 0x90C7852BD2C9DE47)),
    ("look-m", {}, (0xFB81B9CC7883F394, 0x43E86FFCCCA0D88B)),
    ("madakv", {}, (0x85974BCF02E1812B, 0x7776709AFEA2BA9B)),
    ("sparsemm", {}, (0x94C8703AD7979829, 0x47E9B6B79EC562F0)),
    ("quest", {}, (0x3D5DD8D12DD1BBCE, 0x1E3DF0C7CA6D9DA8)),
    ("tgv-kv", {}, (0xB8C26213A52BB230, 0x0E198F9625AC1EFE)),
    ("adakv", {}, (0xFE26A29C3881B9FD, 0x36FAAC2A4272EA14)),
    ("pyramidkv", {}, (0xD3E68E62B11049DB, 0x1BE7DAA587B307EE)),
    ("expected-attention", {}, (0x8918FFEEA960A25C, 0x10E2CD17CC9A2B3C)),
    ("random", {}, (0xFE961FF3CECDAD09, 0xC83CE152302A19D8)),
    ("full", {}, (0x702DFA3FB091CF41, 0xEBAEFFBE9F8CC47B)),
    ("hybridkv", {"preset": "paper", "theta": 0.5}, (0x79DF64C80241F40C, 0x6A90FCC0759EC451)),
]


@pytest.mark.parametrize(("name", "config", "digests"), DIGESTS)
def test_plans_are_what_they_were(name, config, digests):
    """A change of these numbers is a change of what is kept, and belongs into the changelog."""
    spans = (VisualSpan(20, 90, "image"), VisualSpan(120, 150, "image"))
    for seed, windows, digest_before in zip((1, 2), ((), (0, 24, 0)), digests, strict=True):
        eager = EAGER | {"page_size": 8} if name != "full" else {"page_size": 8, "min_prompt_tokens": 1}
        compressor = make_compressor(name, 3, 2, **eager | config)
        shape = {"num_layers": 3, "windows": windows, "pages": 300, "host_pages": 120}
        pool = TinyPool(torch.Generator().manual_seed(seed), compressor=compressor, **shape)
        compressor.take_layers(pool.layout.full_layers)
        prompt = pool.add_prompt(22 * 8 + 5)
        heads = (len(pool.layout.full_layers), 2)
        observed = pool.rand(*heads), pool.rand(*heads, prompt.seq_len)
        pool.compress(prompt, *observed, spans=spans)
        assert int(prompt.reservation.digest) % 2**64 == digest_before
