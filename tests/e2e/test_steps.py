"""The scheduler step by step: every request ends, and after each step all who hold pages agree.

`Steps.check` is the law, after each step of each script: a request that was accepted is answered, refused or still
counted as running or waiting, and ledger, host store, table and allocator agree. After each script the scheduler is
idle, its cache is flushed and no page is held; SGLang's own checks are on, too. The events are the scheduler's, the
prompts are random tokens, and nothing depends on time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.harness import compression_flags, engine_flags
from benchmarks.models.make_models import make_model
from tests.e2e.conftest import CONFIG, STRICT_ENV
from tests.e2e.stepped import SteppedScheduler, Steps

pytestmark = pytest.mark.server

LONG_PAGES = 64


def make_scheduler(budget, pool_tokens, *flags, chunk_tokens=128, max_running=4, env=None, **config):
    recipe = engine_flags(
        "cpu",
        max_total_tokens=pool_tokens,
        max_running_requests=max_running,
        chunked_prefill_size=chunk_tokens,
        dtype="float32",
    )
    # An idle scheduler would wait there for sockets that nobody writes to.
    recipe_flags = [flag for flag in recipe.flags if flag != "--sleep-on-idle"]
    compression = compression_flags(budget, {**CONFIG, **config})
    model = ["--model-path", str(make_model("tiny-qwen2"))]
    return SteppedScheduler([*model, *recipe_flags, *compression, *flags], {**recipe.env, **STRICT_ENV, **(env or {})})


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, 256, num_tokens).tolist()


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
    for length in [*range(last_page - 15, 1024, 13), last_page, last_page + 1, 1024 - 8, 1024 - 7, 1024 - 6]:
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
    for length in range(120, 620, 50):
        generated, retractions = with_priorities.run(preempts, length)
        assert generated == {"low": 150, "high": 150, "late": 2}, length
        preempted += retractions["low"]
    assert preempted


@pytest.fixture(scope="module")
def small() -> Iterator[SteppedScheduler]:
    """Short prompts are compressed, in parts of four pages."""
    scheduler = make_scheduler(0.2, 1600, chunk_tokens=64, page_size=16, min_head_pages=1, min_prompt_tokens=32)
    yield scheduler
    scheduler.stop()


def aborts_at(steps: Steps, at_step: int) -> Iterator[None]:
    """Four run, so that the fifth waits; of a prompt of five parts, some steps are between two of them."""
    for i in range(4):
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
