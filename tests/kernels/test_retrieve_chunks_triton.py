"""The Triton twin, interpreted: from the same state to the same state as the reference, bit by bit."""

import itertools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from hybridkv_kernels.retrieve_chunks import triton as twin
from hybridkv_kernels.select_chunks import CHUNK_SCORES, ESTIMATING_SCORES, KEY_CODES
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from tests.builders import NAN, TinyPool, forced_kernels, fresh_generator
from tests.kernels.test_retrieve_chunks import (
    P,
    State,
    arguments_of,
    check_same_step,
    check_selection,
    dynamic_pool,
    mixed_pool,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Chunk score and size; None is the default, for key codes single tokens and for the others pages.
SCORED = [*((score, None) for score in CHUNK_SCORES), (KEY_CODES, 2), (KEY_CODES, P), ("mean2_max", 4)]


def retrieve_in_used_memory(*arguments):
    """The twin; its scratch comes with plausible numbers of an earlier owner in it, places and images alike."""

    def used(*shape, dtype, device):
        return torch.randint(-2, 9, shape, dtype=dtype, device=device)

    with mock.patch.object(torch, "empty", used):
        twin.retrieve_chunks(*arguments)


def check_step(pool, compressed, prompts, layer, q):
    return check_same_step(pool, compressed, prompts, layer, q, twin=retrieve_in_used_memory)


@pytest.mark.parametrize("scored", SCORED)
@pytest.mark.parametrize("windows", [(0, 0), (4, 2 * P), (3 * P, 50 * P)])
def test_equals_naive_over_many_steps(windows, scored):
    config = {"num_sink_tokens": windows[0], "recent_window": windows[1]}
    dtype = DTYPES[(SCORED.index(scored) + windows[0]) % 3]
    pool, prompts, compressed = mixed_pool(dtype, budget=0.3, chunk_score=scored[0], chunk_size=scored[1], **config)
    same, steps = 0, 4
    for step in range(steps):
        batch = [prompts[i] for i in torch.randperm(4, generator=pool.generator)[: 1 + step % 4]]
        same += check_step(pool, compressed, batch, step % 2, pool.queries(len(batch)))
    assert same >= steps - 1, "ties are rare"


@pytest.mark.parametrize("budget", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("num_programs", [1, 10_000])
@pytest.mark.parametrize(("block", "chunk_score"), [(32, "mean_spread"), (2048, "mean_spread"), (64, KEY_CODES)])
def test_equals_naive_however_the_work_is_shared(monkeypatch, block, chunk_score, num_programs, budget):
    monkeypatch.setattr(twin, "select_block", lambda num_chunks: block)
    monkeypatch.setattr(twin, "_TARGET_PROGRAMS", num_programs)
    values = {"page_size": P, "min_head_pages": 1, "min_prompt_tokens": 1, "max_dynamic_heads": 1.0, "budget": budget}
    config = HybridKVConfig(**values, chunk_score=chunk_score)
    pool = TinyPool(fresh_generator(), config, num_layers=1, num_kv_heads=2, pages=220, host_pages=80)
    prompt = pool.add_prompt(71 * P)
    pool.compress(prompt)
    for q in (pool.queries(1), pool.queries(1), torch.zeros(1, 4, 32)):
        assert check_step(pool, [prompt], [prompt], 0, q)


@pytest.mark.parametrize("scored", ["mean_spread", KEY_CODES, "single tokens"])
@pytest.mark.parametrize(
    ("page_size", "head_dim", "group_size", "dtype"),
    [
        (8, 32, 1, torch.float32),
        (16, 64, 2, torch.bfloat16),
        (32, 80, 3, torch.float32),
        (64, 96, 4, torch.float16),
        (8, 128, 5, torch.bfloat16),
        (16, 80, 6, torch.float16),
        (32, 96, 7, torch.bfloat16),
        (64, 128, 8, torch.float32),
        (8, 64, 16, torch.bfloat16),
    ],
)
def test_equals_naive_for_model_shapes(scored, page_size, head_dim, group_size, dtype):
    values = {"page_size": page_size, "min_head_pages": 1, "min_prompt_tokens": 1, "max_dynamic_heads": 1.0}
    how = {"chunk_score": KEY_CODES} if scored == "single tokens" else {"chunk_score": scored, "chunk_size": page_size}
    config = HybridKVConfig(**values, budget=0.3, **how)
    shape = {"head_dim": head_dim, "group_size": group_size, "pages": 60, "host_pages": 40, "dtype": dtype}
    pool = TinyPool(fresh_generator(), config, **shape)
    prompt = pool.add_prompt(21 * page_size)
    pool.compress(prompt)
    same = check_step(pool, [prompt], [prompt], 1, pool.queries(1))
    assert same or scored == "single tokens", "with so few chunks there is no tie"


@pytest.mark.parametrize("num_tokens", [P, 2 * P - 1, 2 * P, 2 * P + 1, 3 * P])
@pytest.mark.parametrize("chunk_score", ["mean_spread", KEY_CODES])
def test_equals_naive_for_few_chunks(chunk_score, num_tokens):
    pool = dynamic_pool(budget=1.0, chunk_score=chunk_score)
    prompts = [pool.add_prompt(n) for n in (num_tokens, 1, P - 1)]
    pool.compress(prompts[0])
    assert check_step(pool, prompts[:1], prompts, 0, pool.queries(3))


@pytest.mark.parametrize("chunk_score", ESTIMATING_SCORES)
def test_mean_values_in_the_summaries_are_skipped(chunk_score):
    pool, prompts, compressed = mixed_pool(budget=0.4, chunk_score=chunk_score, unretrieved="estimate")
    assert check_step(pool, compressed, prompts, 1, pool.queries(4))


@pytest.mark.parametrize("chunk_score", CHUNK_SCORES)
def test_among_equal_scores_the_earlier_chunk_wins(chunk_score):
    pool = dynamic_pool(chunk_score=chunk_score)
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    assert check_step(pool, [prompt], [prompt], 0, torch.zeros(1, 4, 32))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("chunk_score", ["mean_max", "mean_mean", "quest", "arkvale", KEY_CODES])
@pytest.mark.parametrize("broken", [NAN, float("inf"), -float("inf")])
def test_queries_that_are_no_numbers_leave_the_buffers_sound(broken, chunk_score):
    pool, prompts, compressed = mixed_pool(budget=0.3, chunk_score=chunk_score, num_sink_tokens=P, recent_window=P)
    q = pool.queries(4)
    q[..., 1::7] = broken
    with forced_kernels("triton"):
        pool.retrieve(prompts, 0, q)
    for prompt, head in itertools.product(compressed, range(2)):
        held = pool.held_tokens(prompt, 0, head)
        assert len(set(held)) == len(held)
        if pool.is_dynamic(prompt, 0, head):
            mapped, size = pool.mapped_chunks(prompt, 0, head), pool.config.tokens_per_chunk
            assert held == [chunk * size + i for chunk in mapped for i in range(size)]
            last = prompt.reservation.geometry.covered // size - 1
            assert len(mapped) < 2 * P // size + 1 or {0, last} <= set(mapped)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("chunk_score", ["mean_max", "mean_mean", "quest", "arkvale", KEY_CODES])
def test_the_chosen_chunks_are_the_best_ones_by_the_published_formulas(chunk_score):
    pool, prompts, compressed = mixed_pool(budget=0.25, chunk_score=chunk_score, max_dynamic_heads=1.0)
    q = pool.queries(4)
    pool.retrieve(prompts, 0, q)
    for prompt, query in zip(prompts, q, strict=True):
        if prompt in compressed:
            check_selection(pool, prompt, 0, query)


@pytest.mark.usefixtures("triton_kernels")
def test_only_what_is_missing_moves():
    """The same query again: the host store is poison, and nothing changes."""
    pool = dynamic_pool()
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    q = pool.queries(1)
    pool.retrieve([prompt], 0, q)
    before, chosen = State.of(pool), int(pool.counters[0])
    pool.store.k_pages.fill_(NAN)
    pool.store.v_pages.fill_(NAN)
    pool.retrieve([prompt], 0, q)
    assert (pool.counters - before.counters).tolist() == [chosen, chosen]
    assert torch.equal(pool.keys.nan_to_num(7.0), before.keys.nan_to_num(7.0))
    assert torch.equal(pool.values.nan_to_num(7.0), before.values.nan_to_num(7.0))
    assert torch.equal(pool.views.held_chunks, before.held_chunks)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_rows_dense_requests_and_static_heads_are_left_alone(dtype):
    """A CUDA graph's batch is padded with row 0, which is all zero."""
    pool = dynamic_pool(theta=0.0)
    static, dense = pool.add_prompt(20 * P), pool.add_prompt(6 * P)
    pool.compress(static)
    before = State.of(pool)
    q = pool.queries(4)
    q[0] = NAN
    arguments = list(arguments_of(pool, [static, dense], 0, q).values())
    arguments[7] = torch.tensor([0, static.row, dense.row, 0], dtype=dtype)
    retrieve_in_used_memory(*arguments)
    for name in ("keys", "values", "held_chunks", "counters"):
        assert torch.equal(getattr(State.of(pool), name).nan_to_num(7.0), getattr(before, name).nan_to_num(7.0)), name


def test_a_table_without_host_pages_has_nothing_to_retrieve():
    pool = TinyPool(fresh_generator(), HybridKVConfig(min_prompt_tokens=1, page_size=P), host_pages=0)
    prompt = pool.add_prompt(4 * P)
    before = State.of(pool)
    twin.retrieve_chunks(*arguments_of(pool, [prompt], 0, pool.queries(1)).values())
    assert torch.equal(pool.keys.nan_to_num(7.0), before.keys.nan_to_num(7.0))


def test_the_tests_above_can_fail():
    """A host row that is not the prompt's is seen once its chunk was fetched."""
    pool = dynamic_pool(budget=0.1)
    prompt = pool.add_prompt(20 * P)
    pool.compress(prompt)
    pool.store.k_pages.fill_(3.0)
    twin.retrieve_chunks(*arguments_of(pool, [prompt], 0, torch.ones(1, 4, 32)).values())
    assert int(pool.counters[0] - pool.counters[1]) > 0, "something was fetched"
    with pytest.raises(AssertionError, match="holds rows that are not the prompt's"):
        check_step(pool, [prompt], [prompt], 0, pool.queries(1))
