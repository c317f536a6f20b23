"""Forced retractions: a retracted request is prefilled and compressed again, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.harness import Server, parallel
from tests.e2e.checks import Answer, Reference, ask, assert_nothing_lost, assert_same, request_body
from tests.e2e.conftest import VL, make_server, run_servers
from tests.e2e.prompts import Prompt, Vision, text

pytestmark = pytest.mark.server

POOL = 6000
RETRACT_ENV = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
NO_OVERLAP = "--disable-overlap-schedule"


@pytest.fixture(scope="module", params=[(), (NO_OVERLAP,)], ids=["overlap", "no-overlap"])
def servers(request: pytest.FixtureRequest) -> Iterator[dict[float, Server]]:
    """By budget; both retract a request every fifth step, whose refill then needs several chunks."""
    sizes = {"max_total_tokens": POOL, "chunked_prefill_size": 256}
    made = {
        budget: make_server(VL, budget, None, *request.param, **sizes, env=RETRACT_ENV, name=f"retract-{budget}")
        for budget in (1.0, 0.1)
    }
    for _ in run_servers(*made.values()):
        yield made
        for server in made.values():
            assert_nothing_lost(server, largest_prompt=text(9500, POOL - 50))


def ask_together(server: Server, prompts: list[Prompt], new_tokens: int) -> list[Answer]:
    answers = parallel(lambda prompt: ask(server, prompt, new_tokens), prompts)
    assert sum(answer.meta["num_retractions"] for answer in answers) >= 3
    assert all(answer.meta["completion_tokens"] == new_tokens for answer in answers)
    assert_nothing_lost(server)
    return answers


def test_retracted_answers_at_full_budget_equal_stock(
    servers: dict[float, Server], stock: Reference, vision: Vision
) -> None:
    prompts = [text(9501 + i, 200 + 61 * i) for i in range(3)]
    prompts += [vision.images(95, 1) + text(9510, 50), text(9511, 20) + vision.images(96, 3) + text(9512, 20)]
    before = servers[1.0].compressor_state()["compressed_requests"]
    for prompt, answer in zip(prompts, ask_together(servers[1.0], prompts, 48), strict=True):
        assert_same(answer, stock.ask(prompt, 48))
    assert servers[1.0].compressor_state()["compressed_requests"] > before


def test_retraction_at_a_tenth_leaves_an_exact_tree_and_the_plan_of_the_prompt(
    servers: dict[float, Server], tenth: Server, stock: Reference, vision: Vision
) -> None:
    prompts = [text(9520 + i, 400 + 37 * i) for i in range(6)]
    prompts += [text(9526, 20) + vision.images(97, 5) + text(9527, 12)]
    prompts += [text(9528, 200) + vision.video(98, 24) + text(9529, 30)]
    for prompt, answer in zip(prompts, ask_together(servers[0.1], prompts, 60), strict=True):
        assert answer.record["plan"] == ask(tenth, prompt, 2).record["plan"] is not None
        longer = prompt + Prompt(tuple(answer.ids)) + text(9530, 40)
        later = ask(servers[0.1], longer, 1)
        assert later.cached >= len(prompt.ids) // 16 * 16
        assert_same(later, stock.ask(longer, 1))


# Whether a retraction falls before a commit or leaves one token depends on its moment.
def test_retracted_requests_count_once_and_say_that_they_were_compressed(servers: dict[float, Server]) -> None:
    """Also when retracted before the commit, or with one token left, which is then served dense."""
    server = servers[0.1]
    before = server.compressor_state()
    with server.stream("/generate", request_body(text(9540, 400), 600)) as beside:
        next(beside)
        answers = [ask(server, text(9541 + i, 400), 6 + i) for i in range(16)]
    after = server.compressor_state()
    assert sum(answer.meta["num_retractions"] for answer in answers) >= 3
    assert_nothing_lost(server)
    reasons = [answer.record["reason"] for answer in answers]
    counted = after["compressed_requests"] - before["compressed_requests"]
    assert (reasons, counted, after["dense_requests"]) == ([None] * 16, 17, before["dense_requests"])
