"""The scheduler step by step: every request ends, and after each step all who hold pages agree.

`Steps.check` is the law, after each step of each script: a request that was accepted is answered, refused or still
counted as running or waiting, and ledger, host store, table and allocator agree. After each script the scheduler is
idle, its cache is flushed and no page is held; SGLang's own checks are on, too. The events are the scheduler's, the
prompts are random tokens, and nothing depends on time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import LAWS
from tests.e2e.stepped import MOST_STEPS, SteppedScheduler, Steps, make_scheduler, prompt

pytestmark = pytest.mark.server

LONG_PAGES = 64
LONG_PROMPTS = (2047, 2048, 2049, 2057)  # of parts of 512 tokens and pages of 16; all from 2,047 to 2,057 passed once
NUM_INTERLEAVINGS = int(os.environ.get("HYBRIDKV_INTERLEAVINGS", 25))  # of each kind; more for a soak


def some(steps: int) -> Iterator[None]:
    for _ in range(steps):
        yield


@pytest.fixture(scope="module")
def long_pages() -> Iterator[SteppedScheduler]:
    """Pages of 64 tokens, where SGLang accepts 58 lengths that do not leave a page free."""
    scheduler = make_scheduler(0.1, 1024, page_size=LONG_PAGES)
    yield scheduler
    scheduler.stop()


@pytest.fixture(scope="module", params=[0.1, 1.0])
def with_priorities(request: pytest.FixtureRequest) -> Iterator[SteppedScheduler]:
    scheduler = make_scheduler(
        request.param, 640, "--enable-priority-scheduling", chunk_tokens=4096, max_running=2, page_size=8
    )
    yield scheduler
    scheduler.stop()


def fills_the_pool(steps: Steps, length: int) -> Iterator[None]:
    for rid, tokens in (("long", length), ("short", 20)):
        steps.submit(rid, prompt(length, tokens), 12)
    yield from steps.until(steps.all_ended, 200)
    return steps.reasons["long"], len(steps.tokens["long"]), len(steps.tokens["short"])


def test_a_prompt_as_long_as_the_pool_is_answered_or_refused(long_pages: SteppedScheduler) -> None:
    """Those that stock serves with as many tokens as there, and who comes behind them is served in any case."""
    last_page = 1024 - LONG_PAGES
    for length in [*range(last_page - 15, 1024, 26), last_page, last_page + 1, 1024 - 8, 1024 - 7, 1024 - 6]:
        reason, num_generated, num_behind = long_pages.run(fills_the_pool, length)
        assert num_behind == 12
        if length <= 1024 - 7:
            assert (reason["type"], num_generated) == ("length", min(12, 1024 - length - 2)), length
        else:
            assert (reason["type"], reason["status_code"]) == ("abort", 400), length


def preempts(steps: Steps, length: int) -> Iterator[None]:
    steps.submit("low", prompt(1, 50), 150, priority=0)
    yield from some(8)
    steps.submit("high", prompt(2, 50), 150, priority=100)
    yield from some(8)
    steps.submit("late", prompt(3, length), 2, priority=100)
    yield from steps.until(steps.all_ended)
    return {rid: len(tokens) for rid, tokens in steps.tokens.items()}, steps.retractions


def test_a_request_that_is_preempted_is_answered(with_priorities: SteppedScheduler) -> None:
    """Also when the one for which it was preempted does not fit after all."""
    preempted = 0
    for length in (120, 370):
        generated, retractions = with_priorities.run(preempts, length)
        assert generated == {"low": 150, "high": 150, "late": 2}, length
        preempted += retractions["low"]
    assert preempted


@pytest.fixture(scope="module")
def small() -> Iterator[SteppedScheduler]:
    """Short prompts are compressed, in parts of eight pages; the host store has room for some of them."""
    scheduler = make_scheduler(
        0.2, 1200, chunk_tokens=64, max_running=40, page_size=8, min_head_pages=1, min_prompt_tokens=32
    )
    yield scheduler
    scheduler.stop()


@pytest.fixture(scope="module")
def narrow() -> Iterator[SteppedScheduler]:
    """Two requests at a time, the more important ones first, a host store for few of them, and no overlap."""
    flags = ("--disable-overlap-schedule", "--enable-priority-scheduling")
    sizes = {"page_size": 8, "min_head_pages": 1, "min_prompt_tokens": 32, "host_store_bytes": 60000}
    scheduler = make_scheduler(0.2, 640, *flags, chunk_tokens=64, max_running=2, **sizes)
    yield scheduler
    scheduler.stop()


@pytest.fixture(scope="module")
def stock_steps() -> Iterator[SteppedScheduler]:
    """Stock SGLang with the same pool."""
    scheduler = make_scheduler(None, 1200, chunk_tokens=64, max_running=40)
    yield scheduler
    scheduler.stop()


def aborts_at(steps: Steps, at_step: int) -> Iterator[None]:
    """Two fill the pool, so that the third waits; of a prompt of five parts, some steps are between two of them."""
    for i in range(2):
        steps.submit(f"runs-{i}", prompt(i, 40), 4)
    yield
    steps.submit("gone", prompt(9, 300), 4)
    for _ in range(at_step):
        yield
        steps.check()
    steps.abort("gone")
    yield from steps.until(steps.all_ended)
    return steps.reasons["gone"]["type"], steps.records["gone"]["reason"]


def test_a_request_that_is_aborted_at_any_step_says_where_it_stood(small: SteppedScheduler) -> None:
    """In the queue, between parts of its prefill, before its commit, and after it."""
    seen = [small.run(aborts_at, at_step) for at_step in range(19)]
    stages = [("abort", "not_prefilled"), ("abort", "aborted"), ("abort", None), ("length", None)]
    assert list(dict.fromkeys(seen)) == stages, seen


@pytest.fixture(scope="module")
def with_parts() -> Iterator[SteppedScheduler]:
    """Prompts of four parts, and a fifth of a few tokens."""
    scheduler = make_scheduler(0.1, 6000, "--enable-return-hidden-states", chunk_tokens=512, page_size=16)
    yield scheduler
    scheduler.stop()


def aborts_after_part(steps: Steps, length: int, num_parts: int, beside: int) -> Iterator[None]:
    """Of two that begin alike, the first is aborted, and the second finds in the tree what there is of it."""
    if beside:
        steps.submit("beside", prompt(8, beside), 2)
    steps.submit("gone", prompt(7, length), 4)
    for _ in range(num_parts):
        yield
        steps.check()
    steps.abort("gone")
    steps.submit("again", prompt(7, length), 4)
    yield from steps.until(steps.all_ended)
    plan = steps.records["again"]["plan"]
    assert plan == steps.plans.setdefault(length, plan)
    return steps.tokens["again"], steps.records["gone"]["reason"]


def test_a_prompt_that_is_aborted_after_any_part_is_served_when_it_comes_again(with_parts: SteppedScheduler) -> None:
    """Also where another one has moved the borders of its parts, and the last part is less than a page.

    The requests that come again have the same plan and the same answer.
    """
    reasons = set()
    for i, length in enumerate(LONG_PROMPTS):
        # The first is done by then; the others are in the queue, and between two parts.
        parts = [(6, 0), *((num_parts, 37 + 10 * num_parts) for num_parts in range(i % 3, 6, 3))]
        outcomes = [with_parts.run(aborts_after_part, length, *how) for how in parts]
        assert all(tokens == outcomes[0][0] for tokens, _ in outcomes), length
        reasons |= {reason for _, reason in outcomes}
    assert reasons >= {"not_prefilled", "aborted"}


def shows_states(steps: Steps) -> Iterator[None]:
    """Three together, twice, and once more each as a dense request."""
    for suffix, params in (("a", None), ("b", None), ("c", {"kv_compressor": {"enabled": False}})):
        for i, length in enumerate((300, 40, 700)):
            steps.submit(f"{i}{suffix}", prompt(20 + i, length), 6, return_hidden_states=True, custom_params=params)
        yield from steps.until(steps.all_ended)
    return steps.hidden_states, steps.tokens


def test_hidden_states_of_a_batch_are_each_request_s_own(with_parts: SteppedScheduler) -> None:
    """The last of the prompt are those of a dense request, and those of the answer the same when it is sent again."""
    states, tokens = with_parts.run(shows_states)
    for i in range(3):
        first, again, dense = (states[f"{i}{suffix}"] for suffix in "abc")
        assert tokens[f"{i}a"] == tokens[f"{i}b"]
        for one in (again, dense):
            np.testing.assert_allclose(first[0][-1], one[0][-1], rtol=0, atol=1e-4)
        assert len(first) == len(again) == 6
        np.testing.assert_allclose(first[1:], again[1:], rtol=0, atol=1e-4)
    assert not np.allclose(states["0a"][0][-1], states["2a"][0][-1], atol=1e-2)


def bootstraps(steps: Steps, host: str | None) -> Iterator[None]:
    steps.submit("bootstraps", prompt(5, 300), 9, bootstrap_host=host, bootstrap_room=None if host is None else 3)
    yield from steps.until(steps.all_ended)
    return steps.tokens, steps.records["bootstraps"]


def test_a_bootstrap_host_that_reaches_the_scheduler_is_nothing_to_it(small: SteppedScheduler) -> None:
    """SGLang would keep its prompt out of the tree, lose its pages, and end."""
    assert small.run(bootstraps, "2.2.2.2") == small.run(bootstraps, None)


def under_pressure(steps: Steps, num_requests: int, length: int, new_tokens: int) -> Iterator[None]:
    steps.expect_short_answers()
    for i in range(num_requests):
        steps.submit(f"{i}", prompt(i, length + 8 * (i % 5)), new_tokens, may_end=True)
    num_steps = 0
    while not steps.all_ended():
        yield
        num_steps += 1
        assert num_steps < MOST_STEPS
    assert {len(tokens) for tokens in steps.tokens.values()} == {new_tokens}
    return num_steps, sorted(steps.retractions.values())


@pytest.mark.parametrize(("length", "new_tokens"), [(100, 150), (200, 100)])
def test_under_memory_pressure_nobody_is_retracted_more_often_than_on_stock(
    small: SteppedScheduler, stock_steps: SteppedScheduler, length: int, new_tokens: int
) -> None:
    """Sixteen requests of which the pool holds four or five, dense; they take no more forwards than there."""
    num_steps, retractions = small.run(under_pressure, 16, length, new_tokens)
    stock_num_steps, stock_retractions = stock_steps.run(under_pressure, 16, length, new_tokens)
    assert sum(retractions) > 0, "the pool was to overflow"
    assert retractions[-1] <= stock_retractions[-1]
    assert num_steps <= stock_num_steps


def forced(steps: Steps, lengths: list[int], new_tokens: int) -> Iterator[None]:
    steps.retract_every(5)
    for i, length in enumerate(lengths):
        steps.submit(f"{i}", prompt(i, length), new_tokens)
    yield from steps.until(steps.all_ended)
    assert {len(tokens) for tokens in steps.tokens.values()} == {new_tokens}
    return sorted(steps.retractions.values())


@pytest.mark.parametrize("lengths", [[120, 160, 200, 240], [300, 420], [40, 50, 60, 300]])
def test_forced_retractions_are_those_of_stock(
    small: SteppedScheduler, stock_steps: SteppedScheduler, lengths: list[int]
) -> None:
    """A refill that is compressed again makes progress: of five forwards it takes one more than on stock, at most."""
    retractions, expected = small.run(forced, lengths, 48), stock_steps.run(forced, lengths, 48)
    assert retractions[-1] > 3
    assert retractions[-1] <= 1.25 * expected[-1] + 1
    assert sum(retractions) <= 1.25 * sum(expected) + 1


PROMPTS = st.tuples(st.integers(0, 3), st.sampled_from([20, 63, 64, 65, 100, 127, 128, 129, 200, 300, 420]))
EVENTS = st.one_of(
    st.tuples(st.just("submit"), PROMPTS, st.sampled_from([0, 1, 2, 9, 40, 90])),
    st.tuples(st.just("submit"), PROMPTS, st.sampled_from([2, 9, 40])),
    st.tuples(st.just("step"), st.integers(1, 9)),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("retract_every"), st.sampled_from([1, 2, 5, None])),
    st.tuples(st.just("pause"), st.sampled_from(["retract", "in_place"])),
    st.tuples(st.sampled_from(["go_on", "flush", "expect_short_answers"])),
)


def interleaved(steps: Steps, events: list[tuple]) -> Iterator[None]:
    asked: dict[str, tuple] = {}
    for name, *args in events:
        if name == "submit":
            (seed, length), new_tokens = args
            rid = f"{len(asked)}."
            asked[rid] = (seed, length, new_tokens)
            steps.submit(rid, prompt(seed, length), new_tokens, priority=length % 3)
        elif name == "step":
            for _ in range(args[0]):
                yield
                steps.check()
        elif name == "abort":
            steps.abort(f"{args[0]}.")
        elif name != "go_on" or steps.scheduler._engine_paused:
            getattr(steps, name)(*args)
        steps.check()
    steps.retract_every(None)
    if steps.scheduler._engine_paused:
        steps.go_on()
    yield from steps.until(steps.all_ended)
    for rid, (seed, length, new_tokens) in asked.items():
        plan, is_aborted = steps.records[rid]["plan"], steps.reasons[rid]["type"] == "abort"
        assert is_aborted or len(steps.tokens[rid]) == new_tokens
        assert plan is None or plan == steps.plans.setdefault((seed, length), plan), "one prompt has two plans"


@settings(LAWS, max_examples=NUM_INTERLEAVINGS)
@given(st.lists(EVENTS, min_size=3, max_size=40))
def test_interleavings(small: SteppedScheduler, events: list[tuple]) -> None:
    small.run(interleaved, events)


@settings(LAWS, max_examples=NUM_INTERLEAVINGS)
@given(st.lists(EVENTS, min_size=3, max_size=40))
def test_interleavings_with_priorities_and_a_full_host_store(narrow: SteppedScheduler, events: list[tuple]) -> None:
    narrow.run(interleaved, events)


# Around the first pages of eight tokens, min_prompt_tokens and the observed window (32), and parts of a prefill (64).
BORDERS = st.builds(
    lambda border, beside: border + beside,
    st.sampled_from([8, 16, 32, 40, 64, 96, 128, 192]),
    st.sampled_from([-7, -1, 0, 1, 7]),
)


def growing(steps: Steps, lengths: list[int], new_tokens: int, budget: float | None) -> Iterator[None]:
    """Prompts of which each begins as the others do, one after another, so that later ones find a part in the tree."""
    own = None if budget is None else {"kv_compressor": {"budget": budget}}
    for place, length in enumerate(lengths):
        steps.submit(f"{place}", prompt(77, 200)[:length], new_tokens, own)
        yield from steps.until(steps.all_ended)
    return [(steps.tokens[f"{place}"], steps.records[f"{place}"]) for place in range(len(lengths))]


@settings(LAWS, max_examples=NUM_INTERLEAVINGS // 2)
@given(st.lists(BORDERS, min_size=1, max_size=4), st.sampled_from([1, 2, 8, 9]))
def test_lengths_around_every_border(
    small: SteppedScheduler, stock_steps: SteppedScheduler, lengths: list[int], new_tokens: int
) -> None:
    """Budget 1 writes stock's tokens, and a prompt has its plan, whatever part of it was cached."""
    exact = small.run(growing, lengths, new_tokens, 1.0)
    assert [tokens for tokens, _ in exact] == [
        tokens for tokens, _ in stock_steps.run(growing, lengths, new_tokens, None)
    ]
    for length, (_, record) in zip(lengths, exact, strict=True):
        reason = "prompt_too_short" if length < 32 else "no_decode" if new_tokens == 1 else None
        assert record["reason"] == reason, length
    pruned = small.run(growing, lengths, new_tokens, None)
    alone = [small.run(growing, [length], new_tokens, None)[0] for length in lengths]
    assert [(tokens, record["plan"]) for tokens, record in pruned] == [
        (tokens, record["plan"]) for tokens, record in alone
    ]
