"""Admission against requests that are played page by page."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from tests.builders import LAWS
from tests.srt.serving import make_compression
from tests.srt.test_allocator import make_allocator
from tests.srt.test_compression import P

POOL = 40 * P
# Tokens of a prompt, generated before a retraction, still to be generated, and pages of the prompt that are cached.
REQUESTS = st.tuples(st.integers(1, 30 * P), st.integers(0, 3 * P), st.integers(1, 20 * P), st.integers(0, 29))


class Pool:
    """An otherwise empty pool; prefix hits lie outside of it, as they are locked while their request is priced."""

    def __init__(self, num_tokens=POOL, **config):
        self.compression = make_compression(num_pages=num_tokens // P, **config)
        tree = SimpleNamespace(evictable_size=lambda: 0, supports_mamba=lambda: False)
        self.budget = self.compression.allocator.create_prefill_budget(tree)

    def admits(self, prompt_len, num_generated, left, hit, *, remaining=None):
        """As PrefillAdder prices a request: tokens that are not cached, the answer, and a page."""
        req = SimpleNamespace(
            origin_input_ids=range(prompt_len),
            output_ids=range(num_generated),
            sampling_params=SimpleNamespace(max_new_tokens=num_generated + left, custom_params=None),
        )
        extend = prompt_len + num_generated - hit
        self.budget.consider(req)
        if remaining is not None:
            self.budget._available_and_evictable = lambda: remaining
        lengths = {"extend_input_len": extend, "max_new_tokens": left, "input_tokens": extend + hit}
        total = extend + left + P
        return self.budget.check_prefill(**lengths, total_tokens=total, swa_host_hit_length=0, chunk_limit=None)[0]

    def peak(self, prompt_len, num_generated, left, hit):
        """Most tokens' worth of pages that are neither free nor evictable; pages of the hit become so at the commit."""
        geometry, prefilled = self.budget.geometry, prompt_len + num_generated
        reserved = 0 if geometry is None else geometry.num_pages
        given_back, own_from = (0, hit) if geometry is None else (hit // P, geometry.covered)
        held = [reserved + len({token // P for token in range(hit, prefilled)})]
        own = {token // P for token in range(own_from, prefilled)}
        for token in range(prefilled, prefilled + left):
            own.add(token // P)
            held.append(reserved + len(own) - given_back)
        return max(held) * P


def cached(prompt_len, hit_pages):
    """Tokens of a prefix hit: whole pages, and never all of the prompt."""
    return min(hit_pages, (prompt_len - 1) // P) * P


@LAWS
@given(REQUESTS, st.sampled_from([0.2, 0.5, 1.0]))
def test_alone_what_fits_is_admitted_and_nothing_else(request, budget):
    prompt_len, num_generated, left, hit_pages = request
    priced = prompt_len, num_generated, left, cached(prompt_len, hit_pages)
    pool = Pool(budget=budget)
    pool.admits(*priced)
    peak = pool.peak(*priced)
    assert not pool.admits(*priced, remaining=peak - 1)
    assert pool.admits(*priced, remaining=peak)


@LAWS
@given(st.lists(REQUESTS, min_size=2, max_size=6), st.sampled_from([0.2, 0.5]), st.booleans())
def test_requests_that_are_admitted_together_fit_together(requests, budget, have_short_answers):
    pool, peaks = Pool(2 * POOL, budget=budget), 0
    for prompt_len, num_generated, left, hit_pages in requests:
        left = min(left, P) if have_short_answers else left
        priced = prompt_len, num_generated, left, cached(prompt_len, hit_pages)
        if pool.admits(*priced):
            peaks += pool.peak(*priced)
            pool.budget.reserve(prompt_len + num_generated - priced[-1], left)
    assert peaks <= 2 * POOL


@LAWS
@given(REQUESTS, st.sampled_from([0.2, 0.5, 1.0]))
def test_an_empty_pool_admits_every_request_that_is_accepted(request, budget):
    """Compressed or dense: else it would wait for ever, and everybody behind it."""
    prompt_len, num_generated, left, hit_pages = request
    pool = Pool(budget=budget)
    allowed = pool.budget.allocator.max_new_tokens_for_memory(prompt_len, num_generated + left, token_capacity=POOL)
    hit = cached(prompt_len, hit_pages)
    assert pool.admits(
        prompt_len, min(num_generated, allowed), max(allowed - num_generated, 0), hit, remaining=POOL - hit
    )


@pytest.mark.parametrize("page_size", [1, 8, 16, 64, 128])
def test_the_longest_prompts_are_accepted_and_admitted_with_stock_s_answer(page_size):
    """Law: a pool of C tokens serves what stock serves with pages of one token, whatever the size of ours."""
    capacity = 10 * page_size + 1000 // page_size * page_size
    tree = SimpleNamespace(evictable_size=lambda: 0, supports_mamba=lambda: False)
    allocator, stock = make_allocator(capacity // page_size, page_size=page_size), make_allocator(capacity, page_size=1)
    allocator.compression = SimpleNamespace(planned=lambda req: None)
    for length in range(capacity - 3 * page_size - 20, capacity):
        asked = {"input_tokens": length, "max_new_tokens": 50, "token_capacity": capacity}
        unused = {"sliding_window_size": None, "chunk_size": None}
        allowed = allocator.max_new_tokens_for_memory(**asked, **unused)
        assert allowed == PagedTokenToKVPoolAllocator.max_new_tokens_for_memory(stock, **asked, **unused)
        budget = allocator.create_prefill_budget(tree)
        budget.consider(None)
        total = length + allowed + page_size  # as PrefillAdder makes it
        lengths = {"extend_input_len": length, "max_new_tokens": allowed, "input_tokens": length}
        fits, _ = budget.check_prefill(**lengths, total_tokens=total, swa_host_hit_length=0, chunk_limit=None)
        assert fits, length
