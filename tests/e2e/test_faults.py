"""Errors that are injected: who is contained is served dense, the others go on, and nothing is held.

An error of an attention kernel in a decode step, or in what a scheduler decides, ends the scheduler with a traceback,
as it does on stock SGLang. An error while a prompt is compressed does not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import httpx
import psutil
import pytest

from benchmarks.harness import Server
from tests.e2e.checks import request_body
from tests.e2e.conftest import make_server
from tests.e2e.prompts import text
from tests.e2e.stepped import Crashed, SteppedScheduler, Steps, make_scheduler, prompt

pytestmark = pytest.mark.server

DENSE = {"kv_compressor": {"enabled": False}}
# Its observed queries are in two parts of its prefill.
PROMPTS = {"runs": (1, 200, 30), "first": (2, 270, 12), "second": (3, 90, 12)}
COMPRESSION = [
    ("cache.observation.PromptObserver.gather", 6),  # in the part before the last
    ("cache.observation.PromptObserver.gather", 10),
    ("compressors.base.score_heads_batch", 1),
    ("compressors.hybridkv.HybridKV.plan", 1),
    ("compressors.hybridkv.HybridKV.rank_tokens", 2),
    ("cache.compress.place_heads", 1),
    ("cache.compress.compact_kv", 2),
    ("cache.offload.summarize_heads", 1),
    ("cache.compress.digest_plan", 1),
]


def small_scheduler(*flags: str) -> SteppedScheduler:
    return make_scheduler(0.2, 1200, *flags, page_size=8, min_head_pages=1, min_prompt_tokens=32)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[SteppedScheduler]:
    scheduler = small_scheduler()
    yield scheduler
    scheduler.stop()


@pytest.fixture(scope="module")
def no_overlap() -> Iterator[SteppedScheduler]:
    scheduler = small_scheduler("--disable-overlap-schedule")
    yield scheduler
    scheduler.stop()


@pytest.fixture(scope="module")
def expected(scheduler: SteppedScheduler) -> dict[str, list[int]]:
    """Tokens of each prompt, exact, and compressed with a mark behind its name."""
    return scheduler.run(quiet)


class Breaking:
    """Calls `function`, and on the n-th call raises afterwards, when what it does is done."""

    def __init__(self, function, nth_call: int):
        self.function, self.left = function, nth_call

    def __call__(self, *args, **kwargs):
        result = self.function(*args, **kwargs)
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("injected")
        return result


class BreakingForOne(Breaking):
    """Calls a function of several prompts, and raises afterwards whenever the one of "second" is among them."""

    def __call__(self, prompts, *args, **kwargs):
        result = self.function(prompts, *args, **kwargs)
        if any(len(slots) == PROMPTS["second"][1] for _, slots in prompts):
            raise RuntimeError("injected")
        return result


def breaking(name: str, nth_call: int) -> mock._patch:
    """`sglang_hybridkv.{name}` for a `with` block, broken."""
    import pkgutil

    kind = BreakingForOne if name.endswith("_batch") else Breaking
    breaking = kind(pkgutil.resolve_name(f"sglang_hybridkv.{name}"), nth_call)
    # A function, so that a method of that name is bound.
    return mock.patch(f"sglang_hybridkv.{name}", lambda *args, **kwargs: breaking(*args, **kwargs))


@contextmanager
def disk_full() -> Iterator[None]:
    """Nothing that this process logs can be written."""
    kept, full = os.dup(2), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(full)


def asked(steps: Steps, suffix: str, *rids: str, **fields) -> None:
    for rid in rids or PROMPTS:
        seed, length, new_tokens = PROMPTS[rid]
        steps.submit(rid + suffix, prompt(seed, length), new_tokens, **fields)


def quiet(steps: Steps) -> Iterator[None]:
    asked(steps, "", custom_params=DENSE)
    asked(steps, "!")
    yield from steps.until(steps.all_ended)
    return dict(steps.tokens)


def breaks(steps: Steps, name: str, nth_call: int, is_disk_full: bool) -> Iterator[None]:
    """One is decoding, compressed, while of two others one fails; then they are asked again."""
    steps.breaks = True
    asked(steps, "", "runs")
    yield from steps.until(lambda: len(steps.in_hands()["runs"].output_ids) > 3)
    with breaking(name, nth_call), disk_full() if is_disk_full else nullcontext():
        asked(steps, "", "first", "second")
        yield from steps.until(steps.all_ended)
    asked(steps, "!")
    yield from steps.until(steps.all_ended)
    return steps.tokens, {rid: record["reason"] for rid, record in steps.records.items()}


@pytest.mark.parametrize(
    ("which", "name", "nth_call"),
    [*(("scheduler", *row) for row in COMPRESSION), *(("no_overlap", *row) for row in COMPRESSION[::4])],
)
def test_a_prompt_that_cannot_be_compressed_is_served_dense(
    request: pytest.FixtureRequest, expected: dict[str, list[int]], which: str, name: str, nth_call: int
) -> None:
    """Exactly as one that asks not to be compressed; the one beside it and the one that runs notice nothing.

    Without overlap the disk is full as well, so that the log cannot take the traceback.
    """
    scheduler = request.getfixturevalue(which)
    tokens, reasons = scheduler.run(breaks, name, nth_call, which == "no_overlap")
    failed = [rid for rid, reason in reasons.items() if reason is not None]
    assert failed in (["first"], ["second"]), reasons
    assert reasons[failed[0]] == "compressor_failed"
    for rid, generated in tokens.items():
        assert generated == expected[rid if rid in failed else rid.rstrip("!") + "!"], rid
    if which == "scheduler":
        assert "RuntimeError: injected" in scheduler.log.read_text()


def breaks_for_all(steps: Steps, name: str) -> Iterator[None]:
    asked(steps, "")
    yield from steps.until(lambda: len(steps.in_hands()["runs"].output_ids) > 3)
    with breaking(name, 1):
        asked(steps, "!")
        yield from steps.until(steps.all_ended)


def test_an_error_in_a_decode_step_ends_the_scheduler(scheduler: SteppedScheduler) -> None:
    """It concerns the whole batch: nobody is answered with what may be wrong."""
    with pytest.raises(Crashed, match="RuntimeError: injected"):
        scheduler.run(breaks_for_all, "cache.compressed_cache.decode_attn")


def kill_amid_a_stream(server: Server, scheduler: psutil.Process) -> None:
    with server.stream("/generate", request_body(text(1, 600), 9000)) as answers:
        assert next(answers)["meta_info"]["kv_compressor"]["compressed"]
        scheduler.kill()
        list(answers)


def test_a_scheduler_that_is_killed_ends_the_server() -> None:
    """As on stock: each client's connection ends, and no process is left."""
    with make_server("tiny-qwen2", 0.1, name="killed", server_class=Server) as server:
        assert server.process is not None
        family = psutil.Process(server.process.pid).children(recursive=True)
        [scheduler] = [process for process in family if "scheduler" in process.name()]
        with pytest.raises(httpx.RemoteProtocolError):
            kill_amid_a_stream(server, scheduler)
        assert server.process.wait(30) != 0
        assert not psutil.wait_procs(family, timeout=10)[1]
