"""Decode steps of dynamic heads below budget 1.0, against brute force over the exact keys."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hybridkv_kernels.chunks import CHUNK_SCORES, CODED_SCORES, ESTIMATING_SCORES
from hybridkv_kernels.head_pages import HeadPageTable
from hybridkv_kernels.host_pages import HOST_DTYPES
from hybridkv_kernels.retrieve_chunks import naive, retrieve_chunks
from tests.builders import (
    LAWS,
    NAN,
    NAN_BYTE,
    TinyPool,
    eager_config,
    fill_host,
    fresh_generator,
    full_attention,
    poisoned_memory,
    seeded,
)
from tests.kernels.plain import plain_forced, plain_scores
from tests.kernels.shapes import DTYPES, FEW_SHAPES, each_model_shape
from tests.kernels.test_decode_attn import TOLERANCE, changed

P = 8
# Chunk score and size; None is the default, for codes single tokens and for the others pages.
CODED_CHUNKS = [("key_codes", P), ("half_codes", 2)]
SCORED = [*((score, None) for score in CHUNK_SCORES), *CODED_CHUNKS, ("mean2_max", 4), ("quest", 4)]

each_implementation = pytest.mark.usefixtures("kernels")


def check_attention(pool, prompt, layer, q, out):
    """Each head attends exactly to the rows it holds and to the tail; of a dense request, to everything."""
    keep = torch.ones(pool.layout.num_kv_heads, prompt.seq_len, dtype=torch.bool)
    keys, values = prompt.keys[layer].clone(), prompt.values[layer].clone()
    if prompt.reservation:
        keep[:, : prompt.reservation.geometry.covered] = False
        for head in range(pool.layout.num_kv_heads):
            held = pool.held_tokens(prompt, layer, head)
            keep[head, held] = True
            keys[head, held], values[head, held] = pool.held_rows(prompt, layer, head)
    expected = full_attention(q, keys, values, pool.scaling, keep)
    rtol, atol = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


def held_by(pool, prompt, layer):
    """Chunks that each dynamic head of a layer holds."""
    heads = [head for head in range(pool.layout.num_kv_heads) if pool.is_dynamic(prompt, layer, head)]
    return {head: set(pool.mapped_chunks(prompt, layer, head)) for head in heads}


def check_selection(pool, prompt, layer, q, before=None):
    """A dynamic head holds the forced chunks and, of the rest, the best for this query.

    With hysteresis those that it held `before` count more.
    """
    config, covered = pool.config, prompt.reservation.geometry.covered
    size, sinks, recent = windows_of(config)
    grouped = q.view(pool.layout.num_kv_heads, -1, q.shape[-1])
    for head in range(pool.layout.num_kv_heads):
        if not pool.is_dynamic(prompt, layer, head):
            continue
        held = set(pool.mapped_chunks(prompt, layer, head))
        forced = plain_forced(covered // size, len(held), sinks, recent)
        assert forced <= held
        chunks = prompt.keys[layer, head, :covered].view(-1, size, pool.shape.head_dim)
        scores = plain_scores(chunks, grouped[head], config.chunk_score, prompt.query_rms[layer, head])
        had = (before or {}).get(head, set())
        scores = [score + config.retrieval.hysteresis * (chunk in had) for chunk, score in enumerate(scores)]
        chosen, dropped = held - forced, set(range(covered // size)) - held
        if chosen and dropped:
            assert min(scores[c] for c in chosen) >= max(scores[c] for c in dropped) - 1e-4


def windows_of(config):
    """Tokens of a chunk, and chunks of sinks and of the recent window, as the settings have it in tokens."""
    size = config.tokens_per_chunk
    return size, -(-config.num_sink_tokens // size), -(-config.recent_window // size)


def check_buffer(pool, prompt, layer, head):
    """The head holds rows of the prompt, each once, and the residency map of a dynamic one says which chunks."""
    held = pool.held_tokens(prompt, layer, head)
    assert len(set(held)) == len(held)
    if pool.is_dynamic(prompt, layer, head):
        mapped, size = pool.mapped_chunks(prompt, layer, head), pool.config.tokens_per_chunk
        assert held == [chunk * size + i for chunk in mapped for i in range(size)]


class DecodeAgainstBruteForce(RuleBasedStateMachine):
    """Two compressed requests and a dense one that decode in turns, with random and with repeated queries."""

    @initialize(
        seed=st.integers(0, 2**31 - 1),
        kept=st.tuples(st.sampled_from([0.15, 0.3, 0.6, 1.0]), st.sampled_from(HOST_DTYPES)),
        scored=st.sampled_from([*((score, None) for score in CHUNK_SCORES), *CODED_CHUNKS]),
        theta=st.sampled_from([0.0, 0.5, 1.01]),
        windows=st.sampled_from([(0, 0), (4, 16), (20, 40)]),
        group_size=st.sampled_from([1, 7]),
        hysteresis=st.sampled_from([0.0, None, 16.0]),
    )
    def build(self, seed, kept, scored, theta, windows, group_size, hysteresis):
        how = {"budget": kept[0], "host_dtype": kept[1], "theta": theta}
        how |= {"chunk_score": scored[0], "chunk_size": scored[1]}
        how |= {"hysteresis": hysteresis} if scored[0] in CODED_SCORES else {}
        config = eager_config(**how, num_sink_tokens=windows[0], recent_window=windows[1])
        generator = seeded(seed)
        self.pool = TinyPool(generator, config, head_dim=32, group_size=group_size)
        self.prompts = [self.pool.add_prompt(n) for n in (17 * P + 3, 25, 9 * P)]
        for i in (0, 2):
            self.pool.compress(self.prompts[i])
        self.last_q = self.pool.queries(1)[0]

    @rule(which=st.sampled_from([0, 2]), layer=st.integers(0, 1), again=st.booleans())
    def query(self, which, layer, again):
        pool, prompt = self.pool, self.prompts[which]
        if not again:
            self.last_q = pool.queries(1)[0]
        heads = [h for h in range(2) if pool.is_dynamic(prompt, layer, h)]
        before = {h: dict(zip(*self._places(prompt, layer, h), strict=True)) for h in heads}
        state = State.of(pool)
        out = self.pool.decode([prompt], layer, self.last_q[None])[0]
        chosen, hit = (pool.counters - state.counters).tolist()
        self.check_other_pages(state, prompt, layer, heads)
        size, sinks, recent = windows_of(pool.config)
        expected_chosen = expected_missing = 0
        for h in heads:
            after = dict(zip(*self._places(prompt, layer, h), strict=True))
            forced = plain_forced(prompt.reservation.geometry.covered // size, len(after), sinks, recent)
            expected_chosen += len(set(after.values()) - forced)
            expected_missing += len(set(after.values()) - set(before[h].values()))
            for place, chunk in before[h].items():
                assert after[place] == chunk or chunk not in after.values(), "what stays does not move"
        assert (chosen, hit) == (expected_chosen, expected_chosen - expected_missing)
        check_selection(pool, prompt, layer, self.last_q, {h: set(before[h].values()) for h in heads})
        check_attention(pool, prompt, layer, self.last_q, out)

    @rule(layer=st.integers(0, 1))
    def query_all(self, layer):
        pool = self.pool
        q = pool.queries(3)
        before = [held_by(pool, prompt, layer) if prompt.reservation else {} for prompt in self.prompts]
        out = self.pool.decode(self.prompts, layer, q)
        for prompt, query, mine, had in zip(self.prompts, q, out, before, strict=True):
            if prompt.reservation:
                check_selection(pool, prompt, layer, query, had)
            check_attention(pool, prompt, layer, query, mine)

    @rule(which=st.integers(0, 2))
    def append(self, which):
        self.pool.append_token(self.prompts[which])

    @invariant()
    def the_map_says_what_the_buffers_hold(self):
        if not hasattr(self, "pool"):
            return
        for prompt, layer, head in itertools.product((self.prompts[0], self.prompts[2]), range(2), range(2)):
            check_buffer(self.pool, prompt, layer, head)

    def check_other_pages(self, before, prompt, layer, heads):
        """Retrieval has written to the buffers of one layer's dynamic heads, and nowhere else."""
        views, table = self.pool.views, self.pool.table
        others = torch.ones(len(views.held_chunks), dtype=torch.bool)
        if heads:
            counts = table.num_head_pages[prompt.row, layer, heads]
            others[table.buffer_page_ids(prompt.row, layer, torch.tensor(heads), counts)] = False
        shape = views.k_pages.shape
        for now, then in ((views.k_pages, before.keys), (views.v_pages, before.values)):
            assert torch.equal(now[others].nan_to_num(7.0), then.view(shape)[others].nan_to_num(7.0))
        assert torch.equal(views.held_chunks[others], before.held_chunks[others])

    def _places(self, prompt, layer, head):
        in_page = range(P // self.pool.config.tokens_per_chunk)
        places = itertools.product(self.pool.head_pages_of(prompt, layer, head), in_page)
        return list(places), self.pool.mapped_chunks(prompt, layer, head)


@pytest.mark.usefixtures("fast_kernels")
def test_decode_against_brute_force():
    run_state_machine_as_test(DecodeAgainstBruteForce, settings=settings(LAWS, max_examples=30, stateful_step_count=12))


def dynamic_pool(dtype=torch.float32, **config):
    return TinyPool(fresh_generator(), eager_config(**{"budget": 0.3} | config), dtype=dtype)


@each_implementation
def test_resident_chunks_are_not_read_from_the_host():
    """Poison the host rows of what is resident: a query that wants just that must not notice."""
    pool = dynamic_pool()
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    q = pool.queries(1)
    before = pool.decode([prompt], 0, q)
    fill_host(pool.store.pages, NAN_BYTE)
    state = State.of(pool)
    chosen = int(pool.counters[0])
    assert torch.equal(pool.decode([prompt], 0, q), before)
    assert (pool.counters - state.counters).tolist() == [chosen, chosen], "every chosen chunk was a hit"
    pool.counters.copy_(state.counters)
    State.of(pool).check_equal(state)


def arguments_of(pool, prompts, layer, q):
    return {
        "q": q,
        "views": pool.views,
        "table": pool.table,
        "host_pages": pool.store.pages,
        "counters": pool.counters,
        "layer_idx": layer,
        "req_rows": torch.tensor([prompt.row for prompt in prompts]),
        "retrieval": pool.config.retrieval,
    }


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda t: t[0]),
        ("q", lambda t: t[:0]),
        ("q", lambda t: t.double()),
        ("q", lambda t: t[:, :3]),
        ("views.k_flat", torch.Tensor.half),
        ("views.v_flat", torch.Tensor.half),
        ("views.v_flat", lambda t: t[1:]),
        ("views.k_pages", lambda t: t[:, :4]),
        ("views.held_chunks", lambda t: t.long()),
        ("host_pages.page_size", lambda page_size: 4),
        ("host_pages.head_dim", lambda head_dim: 16),
        ("host_pages.dtype", lambda dtype: torch.float16),
        ("host_pages.host_dtype", lambda host_dtype: "fp8"),
        ("counters", lambda t: t[:1]),
        ("counters", lambda t: t.int()),
        ("req_rows", lambda t: t[:0]),
        ("layer_idx", lambda layer: 2),
        ("layer_idx", lambda layer: -1),
        ("retrieval.chunk_score", lambda name: "mean"),
        ("retrieval.chunk_size", lambda size: 3),
        ("retrieval.chunk_size", lambda size: 0),
        ("retrieval.hysteresis", lambda hysteresis: -0.5),
        ("views.held_chunks", lambda t: t[:, :1]),
    ],
)
def test_bad_arguments_are_named(name, change):
    pool = dynamic_pool()
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    arguments = arguments_of(pool, [prompt], 0, pool.queries(1))
    with pytest.raises(ValueError, match=rf"^{name.removeprefix('retrieval.')}: expected .*, got "):
        retrieve_chunks(**changed(arguments, name, change))


# Every fast implementation against the reference: from the same state to the same state, bit by bit.


@dataclasses.dataclass
class State:
    """Everything that a retrieval may write."""

    keys: torch.Tensor
    values: torch.Tensor
    held_chunks: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def of(cls, pool):
        return cls(*(t.clone() for t in (pool.keys, pool.values, pool.views.held_chunks, pool.counters)))

    def restore(self, pool):
        pool.keys.copy_(self.keys)
        pool.values.copy_(self.values)
        pool.views.held_chunks.copy_(self.held_chunks)
        pool.counters.copy_(self.counters)

    def check_equal(self, other):
        for field in dataclasses.fields(State):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0)), field.name


def chunks_of(pool, prompts, layer):
    heads = range(pool.layout.num_kv_heads)
    return {
        (prompt.row, head): set(pool.mapped_chunks(prompt, layer, head))
        for prompt, head in itertools.product(prompts, heads)
        if pool.is_dynamic(prompt, layer, head)
    }


def check_only_ties_differ(pool, prompt, layer, head, q, chosen, expected):
    """Chunks that only one implementation chose have scores that are equal but for rounding."""
    config, one = pool.config, torch.tensor([head])
    grouped = q.view(pool.layout.num_kv_heads, -1, q.shape[-1])[head : head + 1]
    scores = naive.score_row(grouped, pool.views, pool.table, prompt.row, layer, one, config.retrieval)[0]
    unequal = scores[sorted(chosen ^ expected)]
    assert unequal.max() - unequal.min() <= 1e-5 * scores.abs().max()


def check_same_step(pool, compressed, prompts, layer, q):
    """The reference and what is in use, from one state; what the latter leaves stays. Are all chunks the same?"""
    before, arguments = State.of(pool), arguments_of(pool, prompts, layer, q)
    naive.retrieve_chunks(**arguments)
    expected, expected_chunks = State.of(pool), chunks_of(pool, compressed, layer)
    before.restore(pool)
    with poisoned_memory(integers=(-2, 9)):  # scratch is as an earlier owner left it, places and images alike
        retrieve_chunks(**arguments)
    chunks = chunks_of(pool, compressed, layer)
    rows = {prompt.row: (prompt, query) for prompt, query in zip(prompts, q, strict=True)}
    for (row, head), mine in chunks.items():
        if mine != expected_chunks[row, head]:
            prompt, query = rows[row]
            check_only_ties_differ(pool, prompt, layer, head, query, mine, expected_chunks[row, head])
    for prompt, other, head in itertools.product(compressed, range(pool.layout.num_layers), range(2)):
        check_buffer(pool, prompt, other, head)
    if chunks != expected_chunks:
        return False
    State.of(pool).check_equal(expected)
    return True


def mixed_pool(dtype=torch.float32, **config):
    """Requests with static and dynamic heads and a dense one, which share one pool."""
    shape = {"dtype": dtype, "group_size": 3, "pages": 220, "host_pages": 120}
    pool = TinyPool(fresh_generator(), eager_config(**{"theta": 0.7} | config), **shape)
    prompts = [pool.add_prompt(n) for n in (37 * P + 5, 3 * P, 18 * P, 25 * P + 1)]
    compressed = [prompts[0], prompts[2], prompts[3]]
    for prompt in compressed:
        pool.compress(prompt)
    return pool, prompts, compressed


@pytest.mark.parametrize("scored", SCORED)
def test_equals_naive_over_many_steps(twin, scored):
    """Each of the windows with a type in turn, or one of them where the kernels are interpreted."""
    turn = SCORED.index(scored)
    windows, dtypes = [(0, 0), (4, 2 * P), (3 * P, 50 * P)], DTYPES[turn % 3 :] + DTYPES[: turn % 3]
    cases = list(zip(windows, dtypes, strict=True))
    if twin == "triton":
        cases = [cases[turn // 3 % 3]]
    same, steps = 0, 4 if twin == "triton" else 8
    config = {"chunk_score": scored[0], "chunk_size": scored[1]}
    for number, ((sinks, recent), dtype) in enumerate(cases):
        config |= {"num_sink_tokens": sinks, "recent_window": recent, "host_dtype": HOST_DTYPES[(turn + number) % 2]}
        pool, prompts, compressed = mixed_pool(dtype, budget=0.3, **config)
        for step in range(steps):
            batch = [prompts[i] for i in torch.randperm(4, generator=pool.generator)[: 1 + step % 4]]
            q = pool.queries(len(batch)) * min(step, 1)  # among the equal scores of a query of zeros the earlier wins
            same += check_same_step(pool, compressed, batch, step % 2, q)
    assert same >= (steps - 1) * len(cases), "ties are rare"


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("hysteresis", [0.5, 16.0])
@pytest.mark.parametrize("scored", [("key_codes", None), *CODED_CHUNKS])
def test_equals_naive_with_hysteresis(scored, hysteresis):
    how = {"budget": 0.3, "chunk_score": scored[0], "chunk_size": scored[1], "hysteresis": hysteresis}
    pool, prompts, compressed = mixed_pool(**how)
    for q in pool.queries(12).split(4):
        assert check_same_step(pool, compressed, prompts, 0, q)


@pytest.mark.usefixtures("fast_kernels")
def test_more_hysteresis_fetches_less_and_a_great_deal_of_it_nothing():
    moved = []
    for hysteresis in (0.0, 1.0, 16.0):
        pool = dynamic_pool(theta=1.01, chunk_score="half_codes", hysteresis=hysteresis)
        prompt = pool.add_prompt(20 * P)
        pool.compress(prompt)
        for q in pool.queries(6).split(1):
            pool.decode([prompt], 0, q)
        moved.append(int(pool.counters[0] - pool.counters[1]))
    assert moved[0] > moved[1] > moved[2] == 0


@pytest.mark.parametrize("budget", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("num_programs", [1, 10_000])
@pytest.mark.parametrize(("block", "chunk_score"), [(32, "mean_spread"), (2048, "mean_spread"), (64, "half_codes")])
def test_equals_naive_however_the_work_is_shared(twin, monkeypatch, block, chunk_score, num_programs, budget):
    """By few or many programs, over blocks of any size, or by one to four threads."""
    if twin in ("triton", "cuda"):
        from hybridkv_kernels.retrieve_chunks import triton, triton_choose

        monkeypatch.setattr(triton_choose, "MOST_KEPT", block)
        monkeypatch.setattr(triton_choose, "PLACES_PER_WARP", max(2, block // 32))
        monkeypatch.setattr(triton_choose, "_REST_ROWS", 2)
        monkeypatch.setattr(triton, "_FETCH_PROGRAMS", num_programs)
        monkeypatch.setattr(triton, "_TARGET_SCORE_WARPS", 4 * num_programs)
    config = eager_config(budget=budget, chunk_score=chunk_score)
    pool = TinyPool(fresh_generator(), config, num_layers=1, num_kv_heads=2, pages=220, host_pages=80)
    prompt, before = pool.add_prompt(51 * P), torch.get_num_threads()
    pool.compress(prompt)
    torch.set_num_threads(min(num_programs, 4))
    try:
        for q in (pool.queries(1), torch.zeros(1, 4, 32)):
            assert check_same_step(pool, [prompt], [prompt], 0, q)
    finally:
        torch.set_num_threads(before)


SCORED_SHAPES = ["mean_spread", *CODED_SCORES, "single tokens", "rounded tokens"]


@each_model_shape
def test_equals_naive_for_model_shapes(twin, shape):
    """With all of SCORED_SHAPES, or two of them in turn where the kernels are interpreted."""
    dtype, page_size, group_size, head_dim = shape
    turn = 2 * FEW_SHAPES.index(shape) % len(SCORED_SHAPES) if twin == "triton" else 0
    for scored in (2 * SCORED_SHAPES)[turn : turn + 2] if twin == "triton" else SCORED_SHAPES:
        single = scored.endswith("tokens")
        how = {"chunk_score": "half_codes" if single else scored, "chunk_size": 1 if single else page_size}
        how["host_dtype"] = "int8" if scored in ("rounded tokens", "key_codes") else "same"
        config = eager_config(page_size=page_size, budget=0.3, **how)
        sizes = {"head_dim": head_dim, "group_size": group_size, "pages": 60, "host_pages": 40, "dtype": dtype}
        pool = TinyPool(fresh_generator(), config, **sizes)
        prompt = pool.add_prompt((21 if page_size < 64 else 9) * page_size)
        pool.compress(prompt)
        same = check_same_step(pool, [prompt], [prompt], 1, pool.queries(1))
        assert same or single, f"with so few chunks there is no tie; {scored}"


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_records_of_any_codes_and_scales_are_widened_alike(twin, dtype):
    """Also where a scale is NaN or 0, as of rows that were broken or zero; the types differ in what overflows."""
    pool = dynamic_pool(dtype, budget=0.5, theta=1.01, chunk_score="half_codes", host_dtype="int8")
    prompt, host = pool.add_prompt(20 * P), pool.store.pages
    pool.compress(prompt)
    for segment in host.segments:
        codes = torch.randint(0, 256, segment.shape, generator=pool.generator).to(torch.uint8)
        exponents = torch.randint(-106, 121, (*segment.shape[:2], 2), generator=pool.generator)
        scales = (1 + torch.rand(exponents.shape, generator=pool.generator)) * 2.0**exponents
        scales[:, ::3, 0], scales[:, 1::4, 1] = NAN, 0.0
        segment.copy_(codes)
        segment[..., 2 * host.head_dim :][..., :8] = scales.view(torch.uint8).to(segment.device)
    before, arguments = State.of(pool), arguments_of(pool, [prompt], 0, pool.queries(1))
    naive.retrieve_chunks(**arguments)
    expected = State.of(pool)
    assert int(expected.counters[0] - expected.counters[1]) > 8, "hardly anything was fetched"
    before.restore(pool)
    retrieve_chunks(**arguments)
    State.of(pool).check_equal(expected)


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("num_tokens", [P, 2 * P - 1, 2 * P, 2 * P + 1, 3 * P])
@pytest.mark.parametrize("chunk_score", ["mean_spread", *CODED_SCORES])
def test_equals_naive_for_few_chunks(chunk_score, num_tokens):
    pool = dynamic_pool(budget=1.0, chunk_score=chunk_score)
    prompts = [pool.add_prompt(n) for n in (num_tokens, 1, P - 1)]
    pool.compress(prompts[0])
    assert check_same_step(pool, prompts[:1], prompts, 0, pool.queries(3))


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("chunk_score", ESTIMATING_SCORES)
def test_mean_values_in_the_summaries_are_skipped(chunk_score):
    pool, prompts, compressed = mixed_pool(budget=0.4, chunk_score=chunk_score, unretrieved="estimate")
    assert check_same_step(pool, compressed, prompts, 1, pool.queries(4))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("chunk_score", CHUNK_SCORES)
def test_queries_that_are_no_numbers_leave_the_buffers_sound(twin, chunk_score):
    """All kinds of them, or one in turn where the kernels are interpreted."""
    kinds, turn = (NAN, float("inf"), -float("inf")), CHUNK_SCORES.index(chunk_score) % 3
    for broken in kinds[turn : turn + 1] if twin == "triton" else kinds:
        check_buffers_after(twin, chunk_score, broken)


def check_buffers_after(twin, chunk_score, broken):
    pool, prompts, compressed = mixed_pool(budget=0.3, chunk_score=chunk_score, num_sink_tokens=P, recent_window=P)
    q = pool.queries(4)
    q[..., 1::7] = broken
    pool.retrieve(prompts, 0, q)
    for prompt, head in itertools.product(compressed, range(2)):
        check_buffer(pool, prompt, 0, head)
        # To C++ and the reference a forced chunk is worth infinity, as others are to such a query.
        if twin in ("triton", "cuda") and pool.is_dynamic(prompt, 0, head):
            mapped, size = pool.mapped_chunks(prompt, 0, head), pool.config.tokens_per_chunk
            last = prompt.reservation.geometry.covered // size - 1
            assert len(mapped) < 2 * P // size + 1 or {0, last} <= set(mapped)


@each_implementation
@pytest.mark.parametrize("theta", [0.0, 1.01])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_rows_dense_requests_and_static_heads_are_left_alone(dtype, theta):
    """A CUDA graph's batch is padded with row 0, which is all zero; rows are of either integer type."""
    pool = dynamic_pool(theta=theta)
    compressed, dense = pool.add_prompt(20 * P), pool.add_prompt(6 * P)
    pool.compress(compressed)
    q, had = pool.queries(4), held_by(pool, compressed, 0)
    pool.retrieve([compressed], 0, q[1:2])
    check_selection(pool, compressed, 0, q[1], had)
    before, chosen = State.of(pool), int(pool.counters[0])
    assert (chosen > 0) == (theta > 0)
    q[0] = NAN
    rows = torch.tensor([0, compressed.row, dense.row, 0], dtype=dtype)
    retrieve_chunks(**arguments_of(pool, [], 0, q) | {"req_rows": rows})
    assert (pool.counters - before.counters).tolist() == [chosen, chosen], "the same query again: all hits"
    pool.counters.copy_(before.counters)
    State.of(pool).check_equal(before)


@each_implementation
def test_a_table_without_host_pages_has_nothing_to_retrieve():
    pool = TinyPool(fresh_generator(), eager_config(), host_pages=0)
    prompt, table = pool.add_prompt(4 * P), HeadPageTable(9, 8, 0, pool.layout, torch.get_default_device())
    before = State.of(pool)
    retrieve_chunks(**arguments_of(pool, [prompt], 0, pool.queries(1)) | {"table": table})
    State.of(pool).check_equal(before)


@each_implementation
def test_the_tests_above_can_fail():
    """A host row that is not the prompt's is seen once its chunk was fetched."""
    pool = dynamic_pool(budget=0.1)
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    fill_host(pool.store.pages, 3)
    retrieve_chunks(**arguments_of(pool, [prompt], 0, torch.ones(1, 4, 32)))
    assert int(pool.counters[0] - pool.counters[1]) > 0, "something was fetched"
    with pytest.raises(AssertionError, match="holds rows that are not the prompt's"):
        check_same_step(pool, [prompt], [prompt], 0, pool.queries(1))
