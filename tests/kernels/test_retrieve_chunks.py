"""Decode steps of dynamic heads below budget 1.0, against brute force over the exact keys."""

import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hybridkv_kernels.retrieve_chunks import cpu, naive, retrieve_chunks
from hybridkv_kernels.select_chunks import CHUNK_SCORES, KEY_CODES
from sglang_hybridkv.cache.retrieval import forced_chunk_counts
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from tests.builders import (
    LAWS,
    NAN,
    NO_CPU_KERNELS,
    TinyPool,
    forced_kernels,
    fresh_generator,
    full_attention,
    instruction_sets,
    plain_forced,
)
from tests.kernels.finer import plain_scores

P = 8

needs_library = pytest.mark.skipif(NO_CPU_KERNELS, reason="the C++ kernels were not compiled; there is no compiler")


def check_attention(pool, prompt, layer, q, out):
    """Each head attends exactly to the rows it holds and to the tail."""
    covered = prompt.reservation.geometry.covered
    keep = torch.zeros(pool.layout.num_kv_heads, prompt.seq_len, dtype=torch.bool)
    keep[:, covered:] = True
    for head in range(pool.layout.num_kv_heads):
        keep[head, pool.held_tokens(prompt, layer, head)] = True
    expected = full_attention(q, prompt.keys[layer], prompt.values[layer], pool.scaling, keep)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def check_selection(pool, prompt, layer, q):
    """A dynamic head holds the forced chunks and, of the rest, the best for this query."""
    config, covered = pool.config, prompt.reservation.geometry.covered
    size = config.tokens_per_chunk
    sinks, recent = -(-config.num_sink_tokens // size), -(-config.recent_window // size)
    grouped = q.view(pool.layout.num_kv_heads, -1, q.shape[-1])
    for head in range(pool.layout.num_kv_heads):
        if not pool.is_dynamic(prompt, layer, head):
            continue
        held = set(pool.mapped_chunks(prompt, layer, head))
        forced = plain_forced(covered // size, len(held), sinks, recent)
        assert forced <= held
        chunks = prompt.keys[layer, head, :covered].view(-1, size, pool.head_dim)
        scores = plain_scores(chunks, grouped[head], config.chunk_score)
        chosen, dropped = held - forced, set(range(covered // size)) - held
        if chosen and dropped:
            assert min(scores[c] for c in chosen) >= max(scores[c] for c in dropped) - 1e-4


class DecodeAgainstBruteForce(RuleBasedStateMachine):
    """Two compressed requests and a dense one that decode in turns, with random and with repeated queries."""

    kernels = "naive"

    def decode(self, prompts, layer, q):
        with forced_kernels(self.kernels):
            return self.pool.decode(prompts, layer, q)

    @initialize(
        seed=st.integers(0, 2**31 - 1),
        budget=st.sampled_from([0.15, 0.3, 0.6, 1.0]),
        scored=st.sampled_from([*((score, None) for score in CHUNK_SCORES), (KEY_CODES, 2), (KEY_CODES, P)]),
        theta=st.sampled_from([0.0, 0.5, 1.01]),
        windows=st.sampled_from([(0, 0), (4, 16), (20, 40)]),
        group_size=st.sampled_from([1, 7]),
    )
    def build(self, seed, budget, scored, theta, windows, group_size):
        config = HybridKVConfig(
            budget=budget,
            chunk_score=scored[0],
            chunk_size=scored[1],
            theta=theta,
            max_dynamic_heads=1.0,
            num_sink_tokens=windows[0],
            recent_window=windows[1],
            page_size=P,
            min_head_pages=1,
            min_prompt_tokens=1,
        )
        generator = torch.Generator().manual_seed(seed)
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
        counters = pool.counters.clone()
        out = self.decode([prompt], layer, self.last_q[None])[0]
        chosen, hit = (pool.counters - counters).tolist()
        size = pool.config.tokens_per_chunk
        sinks, recent = -(-pool.config.num_sink_tokens // size), -(-pool.config.recent_window // size)
        expected_chosen = expected_missing = 0
        for h in heads:
            after = dict(zip(*self._places(prompt, layer, h), strict=True))
            forced = plain_forced(prompt.reservation.geometry.covered // size, len(after), sinks, recent)
            expected_chosen += len(set(after.values()) - forced)
            expected_missing += len(set(after.values()) - set(before[h].values()))
            for place, chunk in before[h].items():
                assert after[place] == chunk or chunk not in after.values(), "what stays does not move"
        assert (chosen, hit) == (expected_chosen, expected_chosen - expected_missing)
        check_selection(pool, prompt, layer, self.last_q)
        check_attention(pool, prompt, layer, self.last_q, out)

    @rule(layer=st.integers(0, 1))
    def query_all(self, layer):
        pool = self.pool
        q = pool.queries(3)
        out = self.decode(self.prompts, layer, q)
        for i in (0, 2):
            check_selection(pool, self.prompts[i], layer, q[i])
            check_attention(pool, self.prompts[i], layer, q[i], out[i])
        dense = self.prompts[1]
        expected = full_attention(q[1], dense.keys[layer], dense.values[layer], pool.scaling)
        torch.testing.assert_close(out[1].double(), expected, rtol=1e-4, atol=1e-5)

    @rule(which=st.integers(0, 2))
    def append(self, which):
        self.pool.append_token(self.prompts[which])

    @invariant()
    def the_map_says_what_the_buffers_hold(self):
        if not hasattr(self, "pool"):
            return
        for prompt, layer, head in itertools.product((self.prompts[0], self.prompts[2]), range(2), range(2)):
            held = self.pool.held_tokens(prompt, layer, head)
            if self.pool.is_dynamic(prompt, layer, head):
                mapped = self.pool.mapped_chunks(prompt, layer, head)
                size = self.pool.config.tokens_per_chunk
                assert held == [chunk * size + i for chunk in mapped for i in range(size)]
                assert len(set(mapped)) == len(mapped)

    def _places(self, prompt, layer, head):
        in_page = range(P // self.pool.config.tokens_per_chunk)
        places = itertools.product(self.pool.head_pages_of(prompt, layer, head), in_page)
        return list(places), self.pool.mapped_chunks(prompt, layer, head)


class CppDecodeAgainstBruteForce(DecodeAgainstBruteForce):
    kernels = "cpu"


for machine in (DecodeAgainstBruteForce, CppDecodeAgainstBruteForce):
    machine.TestCase.settings = settings(LAWS, max_examples=30, stateful_step_count=12)
test_decode_against_brute_force = DecodeAgainstBruteForce.TestCase
test_cpp_decode_against_brute_force = needs_library(CppDecodeAgainstBruteForce.TestCase)


def dynamic_pool(**config):
    values = {"max_dynamic_heads": 1.0, "page_size": P, "min_head_pages": 1, "min_prompt_tokens": 1, "budget": 0.3}
    return TinyPool(fresh_generator(), HybridKVConfig(**values | config))


@pytest.mark.usefixtures("kernels")
def test_resident_chunks_are_not_read_from_the_host():
    """Poison the host rows of what is resident: a query that wants just that must not notice."""
    pool = dynamic_pool()
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    q = pool.queries(1)
    before = pool.decode([prompt], 0, q)
    pool.store.k_pages.fill_(NAN)
    pool.store.v_pages.fill_(NAN)
    chosen, hit = pool.counters.tolist()
    assert torch.equal(pool.decode([prompt], 0, q), before)
    assert (pool.counters - torch.tensor([chosen, hit])).unique().numel() == 1, "every chosen chunk was a hit"


@pytest.mark.usefixtures("kernels")
def test_static_heads_need_no_retrieval():
    pool = dynamic_pool(theta=0.0)
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    keys, counters = pool.keys.clone(), pool.counters.clone()
    pool.retrieve([prompt], 0, pool.queries(1))
    assert torch.equal(pool.keys.nan_to_num(7.0), keys.nan_to_num(7.0))
    assert torch.equal(pool.counters, counters)


@pytest.mark.usefixtures("kernels")
def test_a_layer_s_retrieval_leaves_the_other_layers_alone():
    pool = dynamic_pool()
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    before = [pool.held_tokens(prompt, 1, head) for head in range(2)]
    for _ in range(5):
        pool.retrieve([prompt], 0, pool.queries(1))
    assert before == [pool.held_tokens(prompt, 1, head) for head in range(2)]


@pytest.mark.usefixtures("kernels")
def test_a_query_that_points_at_a_chunk_finds_it():
    pool = dynamic_pool(num_sink_tokens=0, recent_window=0, budget=0.1, chunk_size=P)
    prompt = pool.add_prompt(20 * P)
    prompt.keys[0, :, 6 * P : 7 * P] += 3.0
    slots = pool.req_to_token[prompt.row, : prompt.seq_len].long()
    pool.keys[:, slots] = prompt.keys.transpose(1, 2)
    pool.compress(prompt, salience=torch.zeros(2, 2, prompt.seq_len))
    assert all(6 not in pool.mapped_chunks(prompt, 0, head) for head in range(2))
    pool.retrieve([prompt], 0, torch.ones(1, 4, 32))
    assert all(6 in pool.mapped_chunks(prompt, 0, head) for head in range(2))


@pytest.mark.usefixtures("kernels")
def test_dense_requests_are_left_alone():
    pool = dynamic_pool()
    compressed, dense = pool.add_prompt(20 * P), pool.add_prompt(6 * P)
    pool.compress(compressed)
    q = pool.queries(2)
    pool.retrieve([compressed], 0, q[:1])
    keys, counters = pool.keys.clone(), pool.counters.clone()
    pool.counters.zero_()
    pool.retrieve([dense, compressed], 0, q.flip(0))
    assert torch.equal(pool.keys.nan_to_num(7.0), keys.nan_to_num(7.0))
    assert pool.counters.tolist() == [int(counters[0])] * 2, "the same query again: all hits"


def arguments_of(pool, prompts, layer, q):
    num_sink_chunks, num_recent_chunks = forced_chunk_counts(pool.config)
    return {
        "q": q,
        "views": pool.views,
        "table": pool.table,
        "k_host_pages": pool.store.k_pages,
        "v_host_pages": pool.store.v_pages,
        "counters": pool.counters,
        "layer_idx": layer,
        "req_rows": torch.tensor([prompt.row for prompt in prompts]),
        "num_sink_chunks": num_sink_chunks,
        "num_recent_chunks": num_recent_chunks,
        "chunk_score": pool.config.chunk_score,
        "chunk_size": pool.config.tokens_per_chunk,
    }


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_either_integer_type(dtype):
    pool = dynamic_pool()
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    arguments = arguments_of(pool, [prompt], 0, pool.queries(1))
    retrieve_chunks(**arguments | {"req_rows": arguments["req_rows"].to(dtype)})
    check_selection(pool, prompt, 0, arguments["q"][0])


@pytest.mark.usefixtures("kernels")
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
        ("k_host_pages", lambda t: t[:, :4]),
        ("k_host_pages", torch.Tensor.half),
        ("v_host_pages", lambda t: t[..., :16]),
        ("v_host_pages", lambda t: torch.stack((t, t), -1)[..., 0]),
        ("counters", lambda t: t[:1]),
        ("counters", lambda t: t.int()),
        ("req_rows", lambda t: t[:0]),
        ("layer_idx", lambda layer: 2),
        ("layer_idx", lambda layer: -1),
        ("chunk_score", lambda name: "mean"),
        ("chunk_size", lambda size: 3),
        ("chunk_size", lambda size: 0),
        ("views.held_chunks", lambda t: t[:, :1]),
    ],
)
def test_bad_arguments_are_named(name, change):
    pool = dynamic_pool()
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    arguments = arguments_of(pool, [prompt], 0, pool.queries(1))
    owner, _, view = name.partition(".")
    if view:
        arguments[owner] = dataclasses.replace(arguments[owner], **{view: change(getattr(arguments[owner], view))})
    else:
        arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        retrieve_chunks(**arguments)


# The C++ twin against the reference: from the same state to the same state, bit by bit.


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
    how = (config.chunk_score, config.tokens_per_chunk, config.estimates)
    scores = naive.score_row(grouped, pool.views, pool.table, prompt.row, layer, one, *how)[0]
    unequal = scores[sorted(chosen ^ expected)]
    assert unequal.max() - unequal.min() <= 1e-5 * scores.abs().max()


def check_same_step(pool, compressed, prompts, layer, q, isa=None, twin=None):
    """Naive and `twin`, or C++, from one state; what the twin leaves stays. Returns whether all chunks are the same."""
    before, size = State.of(pool), pool.config.tokens_per_chunk
    arguments = [*arguments_of(pool, prompts, layer, q).values(), pool.config.estimates]
    naive.retrieve_chunks(*arguments)
    expected, expected_chunks = State.of(pool), chunks_of(pool, compressed, layer)
    before.restore(pool)
    (twin or functools.partial(cpu.retrieve_chunks, isa=isa))(*arguments)
    chunks = chunks_of(pool, compressed, layer)
    rows = {prompt.row: (prompt, query) for prompt, query in zip(prompts, q, strict=True)}
    for (row, head), mine in chunks.items():
        if mine != expected_chunks[row, head]:
            prompt, query = rows[row]
            check_only_ties_differ(pool, prompt, layer, head, query, mine, expected_chunks[row, head])
    for prompt, other, head in itertools.product(compressed, range(pool.layout.num_layers), range(2)):
        held = pool.held_tokens(prompt, other, head)
        if pool.is_dynamic(prompt, other, head):
            mapped = pool.mapped_chunks(prompt, other, head)
            assert held == [chunk * size + i for chunk in mapped for i in range(size)]
    if chunks != expected_chunks:
        return False
    for field in dataclasses.fields(State):
        mine, theirs = getattr(State.of(pool), field.name), getattr(expected, field.name)
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0)), field.name
    return True


def mixed_pool(dtype=torch.float32, **config):
    """Requests with static and dynamic heads and a dense one, which share one pool."""
    values = {"page_size": P, "min_head_pages": 1, "min_prompt_tokens": 1, "theta": 0.7, "max_dynamic_heads": 1.0}
    shape = {"dtype": dtype, "group_size": 3, "pages": 220, "host_pages": 120}
    pool = TinyPool(fresh_generator(), HybridKVConfig(**values | config), **shape)
    prompts = [pool.add_prompt(n) for n in (37 * P + 5, 3 * P, 18 * P, 25 * P + 1)]
    compressed = [prompts[0], prompts[2], prompts[3]]
    for prompt in compressed:
        pool.compress(prompt)
    return pool, prompts, compressed


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("chunk_score", "chunk_size"),
    [*((score, None) for score in CHUNK_SCORES), (KEY_CODES, 4), (KEY_CODES, P), ("quest", 4)],
)
@pytest.mark.parametrize("windows", [(0, 0), (4, 2 * P), (3 * P, 50 * P)])
def test_cpp_equals_naive_over_many_steps(windows, chunk_score, chunk_size, dtype):
    windows = {"num_sink_tokens": windows[0], "recent_window": windows[1]}
    config = {**windows, "chunk_score": chunk_score, "chunk_size": chunk_size}
    pool, prompts, compressed = mixed_pool(dtype, budget=0.3, **config)
    same, steps = 0, 24
    for step in range(steps):
        batch = [prompts[i] for i in torch.randperm(4, generator=pool.generator)[: 1 + step % 4]]
        isa = instruction_sets()[step % len(instruction_sets())]
        same += check_same_step(pool, compressed, batch, step % 2, pool.queries(len(batch)), isa)
    assert same >= steps - 2, "ties are rare"


@needs_library
@pytest.mark.parametrize("budget", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_cpp_equals_naive_at_any_budget_and_number_of_threads(threads, budget):
    pool, prompts, compressed = mixed_pool(budget=budget)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for isa in instruction_sets():
            for layer in range(2):
                check_same_step(pool, compressed, prompts, layer, pool.queries(4), isa)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("group_size", [*range(1, 9), 16])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("chunk_score", ["mean_spread", KEY_CODES])
def test_cpp_equals_naive_for_model_shapes(chunk_score, head_dim, group_size, isa):
    page_size = {32: 8, 64: 16, 80: 32, 96: 64, 128: 8}[head_dim]
    values = {"min_head_pages": 1, "min_prompt_tokens": 1, "max_dynamic_heads": 1.0, "budget": 0.3}
    config = HybridKVConfig(**values, page_size=page_size, chunk_score=chunk_score)
    pool = TinyPool(fresh_generator(), config, head_dim=head_dim, group_size=group_size, pages=60, host_pages=40)
    prompt = pool.add_prompt(21 * page_size)
    pool.compress(prompt)
    check_same_step(pool, [prompt], [prompt], 1, pool.queries(1), isa)


@needs_library
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("chunk_score", CHUNK_SCORES)
def test_among_equal_scores_the_earlier_chunk_wins(chunk_score, isa):
    pool = dynamic_pool(chunk_score=chunk_score)
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    assert check_same_step(pool, [prompt], [prompt], 0, torch.zeros(1, 4, 32), isa)


@needs_library
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("chunk_score", CHUNK_SCORES)
@pytest.mark.parametrize("broken", [NAN, float("inf"), -float("inf")])
def test_queries_that_are_no_numbers_leave_the_buffers_sound(broken, chunk_score, isa):
    pool, prompts, compressed = mixed_pool(budget=0.3, chunk_score=chunk_score)
    q = pool.queries(4)
    q[..., 1::7] = broken
    for layer in range(2):
        cpu.retrieve_chunks(*arguments_of(pool, prompts, layer, q).values(), isa=isa)
    for prompt, layer, head in itertools.product(compressed, range(2), range(2)):
        held = pool.held_tokens(prompt, layer, head)
        assert len(set(held)) == len(held)
        if pool.is_dynamic(prompt, layer, head):
            size = pool.config.tokens_per_chunk
            assert held == [chunk * size + i for chunk in pool.mapped_chunks(prompt, layer, head) for i in range(size)]


@needs_library
def test_the_tests_above_can_fail():
    """A host row that is not the prompt's is seen once its chunk was fetched."""
    pool = dynamic_pool(budget=0.1)
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    pool.store.k_pages.fill_(3.0)
    cpu.retrieve_chunks(*arguments_of(pool, [prompt], 0, torch.ones(1, 4, 32)).values())
    assert int(pool.counters[0] - pool.counters[1]) > 0, "something was fetched"
    with pytest.raises(AssertionError, match="holds rows that are not the prompt's"):
        check_same_step(pool, [prompt], [prompt], 0, pool.queries(1), None)
