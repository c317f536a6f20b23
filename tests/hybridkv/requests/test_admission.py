import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
from sglang_hybridkv.requests.admission import DenseReason, PoolShape, decide
from sglang_hybridkv.requests.geometry import PromptGeometry
from tests.builders import LAWS

POOL = PoolShape(page_size=16, head_pages_per_page=8, num_tokens=1_000_000)


def compressed(*args, **kwargs):
    return isinstance(decide(*args, **kwargs), PromptGeometry)


@LAWS
@given(st.integers(0, 3000), st.integers(16, 2000))
def test_prompt_too_short_begins_below_min_prompt_tokens(prompt_len, least):
    config = HybridKVConfig(budget=1.0, min_prompt_tokens=least)
    is_short = decide(prompt_len, 8, config, POOL) is DenseReason.PROMPT_TOO_SHORT
    assert is_short == (prompt_len < least)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64])
def test_less_than_a_page_is_too_short_whatever_the_setting(page_size):
    config = HybridKVConfig(budget=1.0, min_prompt_tokens=1, page_size=page_size)
    pool = PoolShape(page_size, 8, 100_000)
    assert decide(page_size - 1, 8, config, pool) is DenseReason.PROMPT_TOO_SHORT
    assert compressed(page_size, 8, config, pool)


@pytest.mark.parametrize(("left", "reason"), [(0, "prefill_only"), (1, "no_decode"), (2, None)])
def test_one_token_needs_no_compression(left, reason):
    decided = decide(4096, left, HybridKVConfig(), POOL)
    assert decided == reason if reason else isinstance(decided, PromptGeometry)


@LAWS
@given(st.integers(16, 4000), st.floats(0.001, 1.0), st.integers(1, 64))
def test_below_the_floor_exactly_when_some_head_could_not_have_its_pages(prompt_len, budget, min_head_pages):
    config = HybridKVConfig(budget=budget, min_head_pages=min_head_pages, min_prompt_tokens=16)
    decided = decide(prompt_len, 8, config, POOL)
    chunks = prompt_len // 16
    rows_per_head = min(min_head_pages, chunks) * 8
    total = decided.total_head_pages if isinstance(decided, PromptGeometry) else None
    if decided is DenseReason.BUDGET_BELOW_FLOOR:
        assert budget * chunks * 8 < rows_per_head + 1e-6
    elif total is not None:
        assert total >= rows_per_head


def test_floor_boundary_is_exact():
    # 20 chunks of 8 heads: 0.1 gives 2 pages a head.
    config = HybridKVConfig(min_head_pages=2, min_prompt_tokens=16)
    assert compressed(20 * 16, 8, config, POOL)
    assert decide(20 * 16 - 1, 8, config, POOL) is DenseReason.BUDGET_BELOW_FLOOR
    more = config.model_copy(update={"min_head_pages": 3})
    assert decide(20 * 16, 8, more, POOL) is DenseReason.BUDGET_BELOW_FLOOR


@LAWS
@given(st.integers(16, 3000), st.floats(0.5, 1.0), st.sampled_from(["mean_max", "quest"]))
def test_saves_nothing_exactly_when_as_many_pages_remain(prompt_len, budget, chunk_score):
    config = HybridKVConfig(budget=budget, min_prompt_tokens=16, min_head_pages=1, chunk_score=chunk_score)
    decided = decide(prompt_len, 8, config, POOL)
    if isinstance(decided, PromptGeometry):
        assert budget == 1.0 or decided.num_pages < decided.num_prompt_pages
    elif decided is DenseReason.SAVES_NOTHING:
        chunks = prompt_len // 16
        summaries = -(-config.summary_vectors(chunks * 16) // 32)
        assert budget * chunks + 1e-6 > chunks - summaries - 1


@LAWS
@given(st.integers(16, 100_000), st.integers(2, 5000))
def test_budget_one_never_saves_nothing(prompt_len, left):
    config = HybridKVConfig(budget=1.0, min_prompt_tokens=16)
    assert compressed(prompt_len, left, config, POOL)


def test_saves_nothing_boundary():
    config = HybridKVConfig(budget=0.9, min_prompt_tokens=16, min_head_pages=1)
    assert decide(10 * 16, 8, config, POOL) is DenseReason.SAVES_NOTHING  # 9 + 1 of 10
    config = HybridKVConfig(budget=0.8, min_prompt_tokens=16, min_head_pages=1)
    assert compressed(10 * 16, 8, config, POOL)  # 8 + 1 of 10


@LAWS
@given(st.integers(512, 5000), st.integers(2, 6000), st.integers(0, 3000), st.sampled_from([0.1, 0.5, 1.0]))
def test_pool_too_small_begins_where_the_larger_peak_stops_fitting(prompt_len, left, generated, budget):
    """Compressed pages stand beside all that is prefilled first, and beside tail and answer later."""
    config = HybridKVConfig(budget=budget)
    decided = decide(prompt_len, left, config, POOL, num_generated=generated)
    if decided is DenseReason.BUDGET_BELOW_FLOOR:
        return
    tail = prompt_len + generated - decided.covered
    peak = decided.num_pages * 16 + max(prompt_len + generated, tail + left) + 2 * 16
    for pool_size, expected in ((peak, DenseReason.POOL_TOO_SMALL), (peak + 1, decided)):
        assert decide(prompt_len, left, config, PoolShape(16, 8, pool_size), num_generated=generated) == expected


@LAWS
@given(st.integers(1, 5000), st.integers(0, 500), st.integers(0, 3000), st.floats(0.001, 1.0))
def test_what_was_generated_before_a_retraction_changes_no_plan(prompt_len, left, generated, budget):
    config = HybridKVConfig(budget=budget)
    assert decide(prompt_len, left, config, POOL, num_generated=generated) == decide(prompt_len, left, config, POOL)
