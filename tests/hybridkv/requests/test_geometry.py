import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.requests.geometry import covered_tokens, prompt_geometry
from tests.builders import LAWS

budgets = st.floats(1e-4, 1.0) | st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.7, 0.9, 1.0])
lengths = st.integers(0, 63) | st.integers(64, 20000)
page_sizes = st.sampled_from([8, 16, 32, 64])
head_counts = st.integers(1, 224)
vectors = st.sampled_from([0, 1, 2, 4])  # 0: without retrieval


def geometry_of(prompt_len, budget, page_size=16, heads=112, vectors_per_chunk=1, max_dynamic_heads=None):
    return prompt_geometry(
        prompt_len,
        budget,
        page_size=page_size,
        head_pages_per_page=heads,
        summary_vectors=prompt_len // page_size * vectors_per_chunk,
        max_dynamic_heads=max_dynamic_heads,
    )


@LAWS
@given(lengths, budgets, page_sizes, head_counts, vectors)
def test_budget_in_head_pages_is_the_exact_share_rounded_down(prompt_len, budget, page_size, heads, vectors_per_chunk):
    geometry = geometry_of(prompt_len, budget, page_size, heads, vectors_per_chunk)
    assert geometry.num_prompt_pages == prompt_len // page_size
    assert geometry.covered == geometry.num_prompt_pages * page_size == covered_tokens(prompt_len, page_size)
    assert geometry.total_head_pages == math.floor(Fraction(str(budget)) * geometry.num_prompt_pages * heads)
    assert geometry.total_head_pages <= geometry.num_prompt_pages * heads


def test_budget_means_what_the_user_wrote():
    assert int(0.29 * 100) == 28  # the trap
    assert geometry_of(1600, 0.29, heads=1).total_head_pages == 29
    assert geometry_of(16 * 1000, 0.7, heads=10).total_head_pages == 7000


@LAWS
@given(lengths, budgets, page_sizes, head_counts, vectors, st.data())
def test_reserved_pages_hold_the_budget_and_summaries_of_any_number_of_dynamic_heads(
    prompt_len, budget, page_size, heads, vectors_per_chunk, data
):
    geometry = geometry_of(prompt_len, budget, page_size, heads, vectors_per_chunk)
    num_dynamic = data.draw(st.integers(0, geometry.max_dynamic_heads))
    summaries = math.ceil(geometry.num_prompt_pages * vectors_per_chunk / (2 * page_size))
    assert geometry.summary_pages_per_head == summaries
    needed = geometry.total_head_pages + num_dynamic * summaries
    used = geometry.pages_used(num_dynamic, heads)
    assert (used - 1) * heads < needed <= used * heads or needed == used == 0
    assert used <= geometry.num_pages
    host_used = geometry.host_pages_used(num_dynamic, heads)
    assert (host_used - 1) * heads < num_dynamic * geometry.num_prompt_pages <= host_used * heads or host_used == 0
    assert host_used <= geometry.num_host_pages


@LAWS
@given(lengths, budgets, page_sizes, head_counts, vectors, st.data())
def test_as_many_dynamic_heads_as_may_be_need_what_was_reserved(
    prompt_len, budget, page_size, heads, vectors_per_chunk, data
):
    """Nothing is reserved that no outcome could use; all heads may be dynamic where no number is given.

    Without retrieval none may, and without a whole page there is nothing to reserve.
    """
    most = data.draw(st.none() | st.integers(0, heads))
    geometry = geometry_of(prompt_len, budget, page_size, heads, vectors_per_chunk, max_dynamic_heads=most)
    expected = heads if most is None else most
    assert geometry.max_dynamic_heads == (expected if geometry.covered and vectors_per_chunk else 0)
    assert geometry.pages_used(geometry.max_dynamic_heads, heads) == geometry.num_pages
    assert geometry.host_pages_used(geometry.max_dynamic_heads, heads) == geometry.num_host_pages


@LAWS
@given(lengths, budgets, budgets, page_sizes, head_counts)
def test_monotone_in_the_budget(prompt_len, one, other, page_size, heads):
    low, high = (geometry_of(prompt_len, rho, page_size, heads) for rho in sorted((one, other)))
    assert low.total_head_pages <= high.total_head_pages
    assert low.num_pages <= high.num_pages
    assert low.num_host_pages == high.num_host_pages


@LAWS
@given(st.integers(0, 15), st.integers(1, 1000), budgets)
def test_tokens_beyond_the_last_page_change_nothing(extra, chunks, budget):
    assert geometry_of(chunks * 16 + extra, budget) == geometry_of(chunks * 16, budget)


def test_resident_bound_at_a_tenth():
    """4k to 16k tokens, every page count between: budget, summaries and rounding stay at 0.14 of the prompt."""
    for chunks in range(4096 // 16, 16384 // 16 + 1):
        geometry = geometry_of(chunks * 16, 0.1)
        assert geometry.num_pages / geometry.num_prompt_pages <= 0.14, chunks
