"""Admission against requests that are played page by page."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sglang")

from tests.builders import LAWS
from tests.srt.serving import make_compression
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
            self.budget.total_offset = self.compression.allocator.available_size() - remaining
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
def test_what_is_admitted_fits_and_what_fits_with_two_pages_to_spare_is_admitted(request, budget):
    prompt_len, num_generated, left, hit_pages = request
    priced = prompt_len, num_generated, left, cached(prompt_len, hit_pages)
    pool = Pool(budget=budget)
    pool.admits(*priced)
    peak = pool.peak(*priced)
    assert not pool.admits(*priced, remaining=peak - 1)
    assert pool.admits(*priced, remaining=peak + 2 * P)


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
def test_an_empty_pool_admits_every_request_that_is_to_be_compressed(request, budget):
    """Else it would wait for ever; what never fits is served dense, and refused by SGLang if that does not fit."""
    prompt_len, num_generated, left, hit_pages = request
    hit = cached(prompt_len, hit_pages)
    pool = Pool(budget=budget)
    admitted = pool.admits(prompt_len, num_generated, left, hit, remaining=POOL - hit)
    assert admitted or pool.budget.geometry is None
