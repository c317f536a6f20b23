"""Device bytes that a compressed prompt keeps, counted by the allocator's pages."""

from __future__ import annotations

import pytest

from benchmarks.harness import Server
from tests.e2e.checks import ask, assert_compressed, assert_nothing_lost
from tests.e2e.prompts import text

pytestmark = pytest.mark.server


@pytest.mark.parametrize("length", [4096, 4103, 8192])
def test_a_tenth_of_a_long_prompt_stays(tenth: Server, length: int) -> None:
    answer = ask(tenth, text(length, length), 16)
    assert_compressed(answer)
    assert answer.record["resident_ratio"] <= 0.14
    state = tenth.compressor_state()
    assert state["peak_device_kv_bytes"] / state["peak_stock_kv_bytes"] <= 0.14
    # Keys and values of the dynamic heads, whole pages; at most one host page more for rounding.
    page_bytes = 2 * 16 * 16 * 32 * 4
    exact = answer.record["dynamic_heads"] * (length // 16 * 16) * 2 * 32 * 4
    assert exact <= answer.record["host_bytes"] < exact + page_bytes
    assert_nothing_lost(tenth)
