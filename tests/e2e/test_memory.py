"""Device bytes that a compressed prompt keeps, counted by the allocator's pages."""

from __future__ import annotations

import pytest

from benchmarks.bench_memory import AdmissionLoad, admission_row
from benchmarks.harness import Server
from benchmarks.models.make_models import make_model
from sglang_hybridkv.cli.capacity import Load, Machine, plan_compressed, read_shape
from sglang_hybridkv.compressors.hybridkv import HybridKVConfig
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


@pytest.mark.usefixtures("preloaded_benchmarks")
def test_as_many_requests_run_at_once_as_hybridkv_capacity_says() -> None:
    load = AdmissionLoad(requests=60, prompt_tokens=1024, new_tokens=96, stock_requests=6)
    model = make_model("tiny-qwen2")
    row = admission_row(model, 0.1, load, "float32")
    machine, kind = Machine(load.pool_tokens(), 1.0, 1.0), Load(load.prompt_tokens, load.new_tokens)
    plan = plan_compressed(read_shape(model), machine, [kind], HybridKVConfig(), 0.0)
    assert row["max_running"] == pytest.approx(plan.requests_at_once, rel=0.05)
    assert row["compressed_requests"] == load.requests
    assert row["retractions"] == 0
