"""Two ranks: stock's tokens at budget 1.0, one plan for each prompt, and the same pages on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from benchmarks.harness import Server, parallel
from tests.e2e.checks import Reference, ask, assert_compressed, assert_nothing_lost, assert_same, request_body
from tests.e2e.conftest import CHUNK_TOKENS, VL, make_server, run_servers
from tests.e2e.preloaded import CPU_RANKS
from tests.e2e.prompts import Prompt, Vision, text

pytestmark = pytest.mark.server

EXACT = {"sampling_params": {"custom_params": {"kv_compressor": {"budget": 1.0}}}}
TWO_RANKS = ("--tp-size", "2")
ADMIN = ("--admin-api-key", "of-the-operator")
CORES = {CPU_RANKS: "0|1"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = make_server(VL, 0.1, None, *TWO_RANKS, *ADMIN, env=CORES, name="ranks")
    for _ in run_servers(server):
        server.client.headers["authorization"] = f"Bearer {ADMIN[1]}"
        yield server
        assert_nothing_lost(server)
        first, second = server.compressor_state()["ranks"]
        assert first == second
        assert first["requests"] == 0


SHOWN = {
    "text": lambda vision: text(7001, 333),
    "parts": lambda vision: text(7002, 2 * CHUNK_TOKENS + 20),
    "image": lambda vision: text(7003, 20) + vision.images(71, 2) + text(7004, 40),
    "video": lambda vision: text(7005, 15) + vision.video(72, 8) + text(7006, 40),
}


@pytest.mark.parametrize("show", SHOWN.values(), ids=SHOWN)
def test_budget_one_gives_the_tokens_of_one_rank_of_stock(
    server: Server, stock: Reference, vision: Vision, show: Callable[[Vision], Prompt]
) -> None:
    prompt = show(vision)
    for _ in range(2):  # the second time from the cache
        answer = ask(server, prompt, **EXACT)
        assert_compressed(answer)
        assert_same(answer, stock.ask(prompt))


def test_a_prompt_has_one_plan_over_the_heads_of_both_ranks(server: Server, stock: Reference) -> None:
    # None ends with a page: the record would count the page of the first token, or not, by when the commit comes.
    prompts = [text(7100 + i, 701 + 60 * i) for i in range(6)]
    alone = [ask(server, prompt) for prompt in prompts]
    together = parallel(lambda prompt: ask(server, prompt), prompts)
    for first, second in zip(alone, together, strict=True):
        assert second.cached > 0
        assert first.record == second.record
        assert first.ids == second.ids
        assert first.record["static_heads"] + first.record["dynamic_heads"] == 16
        assert first.record["resident_ratio"] < 0.3
    assert len({answer.record["plan"] for answer in alone}) == len(prompts)
    for prompt in prompts:
        assert_same(ask(server, prompt, **EXACT), stock.ask(prompt))


def test_both_ranks_hold_the_same_pages_while_requests_run_and_are_aborted(server: Server) -> None:
    bodies = [request_body(text(7200 + i, 650 + 40 * i), 200) | {"rid": f"ranks-{i}"} for i in range(6)]

    def start_and_leave(body: dict) -> list[dict]:
        with server.stream("/generate", body) as answers:
            next(answers)
            return server.compressor_state()["ranks"]

    seen = parallel(start_and_leave, bodies)
    for first, second in seen:
        assert first == second
    assert max(first["requests"] for first, _ in seen) > 1
    assert_nothing_lost(server)


def test_both_ranks_change_settings_at_the_same_request(server: Server) -> None:
    """While requests come in; each has the plan of the budget that its record names."""
    prompts = [text(7400 + i, 701 + 60 * i) for i in range(8)]

    def change_often() -> None:
        for budget in (0.3, 0.5, 0.1) * 6:
            server.client.put("/kv_compressor/settings", json={"budget": budget}).raise_for_status()

    *answers, _ = parallel(lambda call: call(), [*(partial(ask, server, prompt) for prompt in prompts), change_often])
    for prompt, answer in zip(prompts, answers, strict=True):
        own = {"custom_params": {"kv_compressor": {"budget": answer.record["budget"]}}}
        assert ask(server, prompt, sampling_params=own).record["plan"] == answer.record["plan"]
    assert_nothing_lost(server)


def test_ranks_that_share_one_kv_head() -> None:
    shared = make_server("tiny-mistral", 1.0, None, *TWO_RANKS, env=CORES, name="shared")
    for ours, stock in run_servers(shared, make_server("tiny-mistral")):
        for prompt in (text(7301, 160), text(7302, 2 * CHUNK_TOKENS + 20)):
            answer = ask(ours, prompt)
            assert_compressed(answer)
            assert_same(answer, ask(stock, prompt))
        assert_nothing_lost(ours)
