"""Every kind of compressor on a real server: at budget 1.0 stock's tokens, below it their memory."""

from __future__ import annotations

import pytest

from benchmarks.harness import Server, compression_flags
from tests.e2e.checks import Reference, ask, assert_nothing_lost, assert_same
from tests.e2e.conftest import VL, make_server
from tests.e2e.prompts import Vision, text

pytestmark = pytest.mark.server

ESTIMATING = {"unretrieved": "estimate", "chunk_score": "mean2_max", "theta": 1.01}
ROUNDED = {"host_dtype": "int8", "theta": 1.01}
# One of each kind: pruned and merged, all heads retrieving, by the engine's own defaults, with estimates, and with rows
# that would come back rounded if they had ever left the device.
KINDS = [("look-m", {}), ("quest", {}), ("hybridkv", {}), ("hybridkv", ESTIMATING), ("hybridkv", ROUNDED)]


def make(name: str, budget: float, config: dict) -> Server:
    flags = compression_flags(budget, {"min_prompt_tokens": 64, **config}, name)
    return make_server(VL, None, None, *flags, name=name)


@pytest.mark.parametrize(("name", "config"), KINDS)
def test_budget_1_is_stock(stock: Reference, vision: Vision, name: str, config: dict) -> None:
    with make(name, 1.0, config) as server:
        for prompt in (text(81, 700), vision.image(82) + text(83, 300)):
            answer = ask(server, prompt, 16)
            assert_same(answer, stock.ask(prompt, 16))
            assert answer.record["compressed"], answer.record["reason"]
        assert_nothing_lost(server)


def test_without_retrieval_a_request_holds_its_budget(vision: Vision) -> None:
    with make("snapkv", 0.25, {}) as server:
        answer = ask(server, vision.image(84) + text(85, 960), 16)
        assert answer.record["dynamic_heads"] == answer.record["host_bytes"] == 0
        # A quarter of 64 chunks, and the dense tail's pages.
        assert 0.25 <= answer.record["resident_ratio"] < 0.29
        assert_nothing_lost(server)
