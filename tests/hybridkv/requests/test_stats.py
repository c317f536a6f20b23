import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hybridkv.requests.admission import EXPLANATIONS, DenseReason
from sglang_hybridkv.requests.stats import CompressionStats, HeldBytes, RequestRecord
from tests.builders import LAWS


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_counts_by_reason(clock):
    stats = CompressionStats(clock)
    for _ in range(3):
        stats.count_compressed()
    for reason, times in ((DenseReason.NO_DECODE, 2), (DenseReason.HOST_STORE_FULL, 1)):
        for _ in range(times):
            stats.count_dense(reason, 100)
    report = stats.as_dict(HeldBytes(10, 100, 7), 0, 0)
    assert report["compressed_requests"] == 3
    assert report["dense_requests"] == {"no_decode": 2, "host_store_full": 1}
    assert (report["device_kv_bytes"], report["stock_kv_bytes"], report["host_kv_bytes"]) == (10, 100, 7)


def test_each_reason_is_logged_once_a_minute(clock, caplog):
    stats = CompressionStats(clock)
    caplog.set_level(logging.WARNING)
    logged = []
    for second in range(0, 150, 10):
        clock.now = float(second)
        caplog.clear()
        stats.count_dense(DenseReason.NO_DECODE, 1000 + second)
        logged += [(second, record.getMessage()) for record in caplog.records]
    assert [second for second, _ in logged] == [0, 60, 120]
    assert "1060 prompt tokens" in logged[1][1]
    assert "no_decode" in logged[1][1]
    assert EXPLANATIONS[DenseReason.NO_DECODE] in logged[1][1]
    assert "7 so far" in logged[1][1]


def test_reasons_do_not_silence_each_other(clock, caplog):
    stats = CompressionStats(clock)
    for reason in DenseReason:
        stats.count_dense(reason, 5)
        stats.count_dense(reason, 5)
    assert len(caplog.records) == len(DenseReason)


@LAWS
@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 3), max_size=20))
def test_peak_is_one_observed_moment_with_the_most_stock_bytes(moments):
    stats = CompressionStats()
    for moment in moments:
        stats.observe(HeldBytes(*moment))
    report = stats.as_dict(HeldBytes())
    peak = (report["peak_device_kv_bytes"], report["peak_stock_kv_bytes"], report["peak_host_kv_bytes"])
    assert peak in [*moments, (0, 0, 0)]
    assert peak[1] == max((moment[1] for moment in moments), default=0)


def test_held_bytes_add_up():
    assert sum([HeldBytes(1, 2, 3), HeldBytes(10, 20, 30)], HeldBytes()) == HeldBytes(11, 22, 33)


@pytest.mark.parametrize(
    ("num_requests", "stock", "beyond"), [(0, 0, 0), (3, 30, 0), (3, 100, 0), (3, 101, 1), (4, 200, 2), (10, 1000, 9)]
)
def test_requests_beyond_what_stock_could_hold(num_requests, stock, beyond):
    assert HeldBytes(stock=stock).beyond_stock(num_requests, 100) == beyond


@pytest.mark.parametrize(("chosen", "hit", "rate"), [(0, 0, None), (4, 0, 0.0), (4, 3, 0.75), (4, 4, 1.0)])
def test_hit_rate_and_bytes_over_the_host_link(chosen, hit, rate):
    report = CompressionStats().as_dict(HeldBytes(), chosen, hit, 4096)
    assert report["chunk_fetch_hit_rate"] == rate
    assert report["chunk_fetch_bytes"] == (chosen - hit) * 4096


def test_record_is_plain_data():
    record = RequestRecord(False, DenseReason.NO_DECODE, 700, 0.1)
    assert json.loads(json.dumps(record.as_dict())) == {
        "compressed": False,
        "reason": "no_decode",
        "prompt_tokens": 700,
        "budget": 0.1,
        "resident_ratio": 1.0,
        "host_bytes": 0,
        "static_heads": 0,
        "dynamic_heads": 0,
        "plan": None,
        "request_settings": None,
    }
