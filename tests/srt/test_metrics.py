import subprocess
import sys

import pytest
import torch

pytest.importorskip("sglang")

from sglang_hybridkv.cache.stopwatch import Stopwatch
from sglang_hybridkv.requests.admission import DenseReason
from sglang_hybridkv.srt.metrics import DeviceTotals
from tests.conftest import ON_CUDA


@pytest.fixture(params=["cpu", ON_CUDA])
def device(request):
    return torch.device(request.param)


def test_a_stopwatch_has_no_time_before_it_stops_and_a_longer_one_for_more(device):
    clocks = []
    for repeats in (1, 30):
        clock, numbers = Stopwatch(device), torch.rand(256, 256, device=device)
        for _ in range(repeats):
            numbers = numbers @ numbers / 256
        assert clock.seconds() is None
        clock.stop()
        clocks.append(clock)
    if device.type == "cuda":
        torch.cuda.synchronize()
    shorter, longer = (clock.seconds() for clock in clocks)
    assert 0 < shorter < longer < 60


def test_totals_of_a_device_arrive(device):
    """On a CPU at once; on CUDA the question starts the copy that a later one answers."""
    totals = torch.zeros(2, dtype=torch.int64, device=device)
    reader = DeviceTotals(totals)
    for expected in ([0, 0], [5, 3], [2**40, 9]):
        totals.copy_(torch.tensor(expected))
        if device.type == "cuda":
            reader.read()
            torch.cuda.synchronize()
            reader.read()
            torch.cuda.synchronize()
        assert reader.read() == expected


def test_every_outcome_is_there_before_it_happens():
    """Prometheus sees no increase of a series that begins with 1, so that an alert on the first one would be silent."""
    code = """
from prometheus_client import REGISTRY
from sglang_hybridkv.srt.metrics import CompressionMetrics
made = CompressionMetrics({"model_name": "m"}, pool_bytes=1, chunk_bytes=1)
made.show_settings({"budget": 0.2, "request_override": True, "request_budget_min": None, "word": "text"})
for family in REGISTRY.collect():
    for sample in family.samples:
        if sample.name == "sglang:kv_compressor_heads_total":
            print(sample.labels["type"], sample.value)
        if sample.name in ("sglang:kv_compressor_requests_total", "sglang:kv_compressor_setting"):
            print(sample.labels.get("outcome"), sample.labels.get("reason", sample.labels.get("name")), sample.value)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = set(done.stdout.splitlines())
    assert lines == {
        "compressed  0.0",
        "static 0.0",
        "dynamic 0.0",
        *(f"dense {reason.value} 0.0" for reason in DenseReason),
        "None budget 0.2",
        "None request_override 1.0",
        "None request_budget_min nan",
    }
