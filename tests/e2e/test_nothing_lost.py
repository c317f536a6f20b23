"""Whatever ends a request, every device and host page is free again afterwards and the server answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

from benchmarks.harness import Server
from tests.e2e.checks import ask, assert_dense, assert_nothing_lost, flush_cache, loads, request_body
from tests.e2e.conftest import OBSERVED_ROWS, POOL_TOKENS, VL, make_server, run_servers
from tests.e2e.prompts import Prompt, text

pytestmark = pytest.mark.server

MAX_RUNNING = 8


@pytest.fixture(scope="module")
def no_overlap() -> Iterator[Server]:
    for [server] in run_servers(make_server(VL, 0.1, None, "--disable-overlap-schedule", name="tenth-no-overlap")):
        yield server


@pytest.fixture(scope="module", params=["tenth", "no_overlap"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = request.getfixturevalue(request.param)
    yield server
    assert_nothing_lost(server, largest_prompt=text(8000, POOL_TOKENS - 50))


def generate(server: Server, prompt: Prompt, new_tokens: int, **body: Any) -> dict[str, Any] | None:
    """meta_info, also of an aborted request; None when SGLang answers with an error status."""
    response = server.client.post("/generate", json=request_body(prompt, new_tokens, **body))
    return response.json()["meta_info"] if response.status_code == 200 else None


def abort(server: Server, rid: str) -> None:
    server.client.post("/abort_request", json={"rid": rid}).raise_for_status()


def wait_for(server: Server, condition: Any) -> None:
    """Until the scheduler's own account satisfies `condition`."""
    deadline = time.monotonic() + 30
    while not condition(loads(server)):
        assert time.monotonic() < deadline, loads(server)
        time.sleep(0.02)


def is_aborted(meta: dict[str, Any] | None) -> bool:
    return meta is None or meta["finish_reason"]["type"] == "abort"


def test_first_token_ends_the_request(server: Server) -> None:
    """Its pages are reserved, filled and never committed."""
    prompt = text(8010, 601)
    first = ask(server, prompt, 2).ids[0]
    flush_cache(server)
    stop = {"ignore_eos": False, "stop_token_ids": [first]}
    answer = ask(server, prompt, 50, sampling_params=stop)
    assert answer.meta["completion_tokens"] == 1
    assert_dense(answer, "no_decode")
    assert_nothing_lost(server)
    assert ask(server, prompt, 2).cached == (601 - OBSERVED_ROWS) // 16 * 16


def test_abort_while_waiting(server: Server) -> None:
    with ThreadPoolExecutor(MAX_RUNNING + 1) as pool:
        running = [pool.submit(generate, server, text(8020 + i, 400), 400, rid=f"run-{i}") for i in range(MAX_RUNNING)]
        wait_for(server, lambda load: load["num_running_reqs"] == MAX_RUNNING)
        waiting = pool.submit(generate, server, text(8030, 400), 400, rid="waits")
        wait_for(server, lambda load: load["num_waiting_reqs"] == 1)
        abort(server, "waits")
        meta = waiting.result(timeout=30)
        for i in range(MAX_RUNNING):
            abort(server, f"run-{i}")
        ended = [future.result() for future in running]
    assert is_aborted(meta)
    assert meta["completion_tokens"] == 0
    record = meta["kv_compressor"]
    assert (record["compressed"], record["reason"], record["prompt_tokens"]) == (False, "not_prefilled", 400)
    assert server.compressor_state()["dense_requests"]["not_prefilled"] >= 1
    assert any(is_aborted(meta) for meta in ended)
    assert_nothing_lost(server)


def test_abort_in_prefill(server: Server) -> None:
    done = loads(server)["total_prefill_uncached_tokens"]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(generate, server, text(8040, 8000), 50, rid="long")
        wait_for(server, lambda load: load["total_prefill_uncached_tokens"] >= done + 1000)
        abort(server, "long")
        meta = future.result()
    assert loads(server)["total_prefill_uncached_tokens"] < done + 8000, "the prefill ended before the abort"
    assert is_aborted(meta)
    assert_nothing_lost(server)


def test_abort_in_decode(server: Server) -> None:
    with server.stream("/generate", request_body(text(8050, 700), 2000, rid="decodes")) as answers:
        assert next(answers)["meta_info"]["kv_compressor"]["compressed"]
        next(answers)
        abort(server, "decodes")
        *_, last = answers
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert_nothing_lost(server)


def test_client_disconnects_while_streaming(server: Server) -> None:
    with server.stream("/generate", request_body(text(8060, 700), 2000)) as answers:
        for _ in range(5):
            next(answers)
    wait_for(server, lambda load: load["num_running_reqs"] == 0)
    assert_nothing_lost(server)


def test_client_disconnects_in_prefill(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/generate", json=request_body(text(8070, 6000), 400), timeout=0.5)
    assert_nothing_lost(server)


def test_aborts_at_any_moment(server: Server) -> None:
    """One abort every 40 ms, so that some fall between reservation and commit."""

    def ask_and_abort(i: int) -> bool:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(generate, server, text(8080 + i, 330 + 60 * i), 200, rid=f"any-{i}")
            time.sleep(0.04 * i)
            abort(server, f"any-{i}")
            return is_aborted(future.result())

    with ThreadPoolExecutor(16) as pool:
        aborted = list(pool.map(ask_and_abort, range(16)))
    assert any(aborted)
    assert_nothing_lost(server)


def test_abort_all(server: Server) -> None:
    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(generate, server, text(8100 + i, 500), 500) for i in range(12)]
        wait_for(server, lambda load: load["num_running_reqs"] >= 4)
        with suppress(httpx.HTTPStatusError):
            server.client.post("/abort_request", json={"rid": "", "abort_all": True}).raise_for_status()
        assert any(is_aborted(future.result()) for future in futures)
    assert_nothing_lost(server)
