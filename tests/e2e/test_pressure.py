"""Pools and host stores that are too small: dense or retracted, never stuck, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.harness import Server, parallel
from tests.e2e.checks import (
    Reference,
    ask,
    assert_compressed,
    assert_dense,
    assert_nothing_lost,
    assert_same,
    assert_same_first_token,
)
from tests.e2e.conftest import VL, make_server, run_servers
from tests.e2e.prompts import Prompt, text

pytestmark = pytest.mark.server

SMALL_POOL = 2048
PAGE_BYTES = 2 * 16 * 16 * 32 * 4  # K and V, 16 heads, 16 tokens, head size 32, fp32
OPTIMISTIC = ("--schedule-conservativeness", "0.1")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """Both with a small pool and overlap on; host stores for two prompts of 400 tokens, and for none.

    On the first, 14 of 16 heads are dynamic whatever the prompt is.
    """
    dense = {"host_store_bytes": 64 * PAGE_BYTES, "theta": 1.01, "max_dynamic_heads": 0.9}
    static = {"host_store_bytes": PAGE_BYTES, "on_host_store_full": "static"}
    sizes = {"max_total_tokens": SMALL_POOL, "chunked_prefill_size": 256}
    yield from run_servers(
        make_server(VL, 0.1, dense, *OPTIMISTIC, **sizes, name="small-dense"),
        make_server(VL, 0.1, static, *OPTIMISTIC, **sizes, name="small-static"),
    )


@pytest.fixture(scope="module")
def goes_dense(servers: list[Server]) -> Iterator[Server]:
    yield servers[0]
    assert_nothing_lost(servers[0], largest_prompt=text(9000, SMALL_POOL - 50))


@pytest.fixture(scope="module")
def goes_static(servers: list[Server]) -> Iterator[Server]:
    yield servers[1]
    assert_nothing_lost(servers[1], largest_prompt=text(9000, SMALL_POOL - 50))


def test_pool_too_small_for_prompt_and_compressed_pages(goes_dense: Server, stock: Reference) -> None:
    prompt = text(9001, 1900)
    answer = ask(goes_dense, prompt, 24)
    assert_dense(answer, "pool_too_small")
    assert_same(answer, stock.ask(prompt, 24))
    assert_nothing_lost(goes_dense)


def test_full_host_store_serves_dense(goes_dense: Server, stock: Reference) -> None:
    fits, never_fits = text(9002, 400), text(9003, 1200)
    assert_compressed(ask(goes_dense, fits, 24))
    answer = ask(goes_dense, never_fits, 24)
    assert_dense(answer, "host_store_full")
    assert_same(answer, stock.ask(never_fits, 24))
    assert_compressed(ask(goes_dense, fits, 24))
    assert_nothing_lost(goes_dense)


def test_full_host_store_makes_all_heads_static(goes_static: Server, stock: Reference) -> None:
    prompt = text(9004, 1200)
    answer = ask(goes_static, prompt, 24)
    assert_compressed(answer, both_types=False)
    assert (answer.record["static_heads"], answer.record["dynamic_heads"]) == (16, 0)
    assert answer.record["host_bytes"] == 0
    assert_same_first_token(answer, stock.ask(prompt, 24))
    assert_nothing_lost(goes_static)


def test_dense_neighbours_of_compressed_requests_stay_exact(goes_dense: Server, stock: Reference) -> None:
    """The pool overflows as well: some are retracted and prefilled again."""
    prompts = [text(9010 + i, 400 + 3 * i) for i in range(10)]
    answers = parallel(lambda prompt: ask(goes_dense, prompt, 160), prompts)
    reasons = [answer.record["reason"] for answer in answers]
    assert None in reasons
    assert "host_store_full" in reasons
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.meta["completion_tokens"] == 160
        never_compressed = not answer.record["compressed"] and not answer.meta["num_retractions"]
        if never_compressed:
            assert_same(answer, stock.ask(prompt, 160))
    assert_nothing_lost(goes_dense)


def test_more_requests_than_the_pool_can_hold(goes_static: Server, stock: Reference) -> None:
    prompts = [text(9030 + i, 340 + 20 * i) for i in range(12)]
    answers = parallel(lambda prompt: ask(goes_static, prompt, 300), prompts)
    assert all(answer.meta["completion_tokens"] == 300 for answer in answers)
    assert sum(answer.meta["num_retractions"] for answer in answers) > 0
    assert "KV cache pool is full. Retract requests." in goes_static.log_text()
    assert_nothing_lost(goes_static)
    # What the tree holds by now is exact: also of requests that were retracted.
    for prompt, answer in zip(prompts[:4], answers[:4], strict=True):
        longer = prompt + Prompt(tuple(answer.ids)) + text(9050, 20)
        assert_same(ask(goes_static, longer, 1), stock.ask(longer, 1))


@pytest.mark.parametrize("length", [1500, 1700, 1790, SMALL_POOL - 17, SMALL_POOL - 16, SMALL_POOL - 7])
def test_prompts_that_just_fit_are_not_refused_for_ever(goes_static: Server, length: int) -> None:
    prompts = [text(9060 + length + i, length) for i in range(3)]
    answers = parallel(lambda prompt: ask(goes_static, prompt, 40), prompts)
    # As stock, which leaves two tokens of the pool free.
    assert all(answer.meta["completion_tokens"] == min(40, SMALL_POOL - 2 - length) for answer in answers)
    assert_nothing_lost(goes_static)
