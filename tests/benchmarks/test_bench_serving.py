"""The arithmetic of bench_serving, and what it refuses to print."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from benchmarks.bench_serving import Stream, Unfit, check_service, decode_rate, ratio_row, server_kinds


def stream(first: float, step: float, tokens: int) -> Stream:
    """A request whose first token comes at `first` and a further one every `step` seconds."""
    return Stream(first * 1000, tuple((first + i * step, i + 1) for i in range(tokens)), {})


def row(server: str, budget: float | None, batch: int, rate: float | None, ttft: float) -> dict[str, Any]:
    return {"server": server, "budget": budget, "batch": batch, "decode_tok_s": rate, "ttft_ms": ttft}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.3])
def test_rate_is_tokens_of_a_step_over_its_time_whenever_the_requests_begin(batch: int, delay: float) -> None:
    streams = [stream(i * delay, 0.05, 64) for i in range(batch)]
    assert decode_rate(streams) == pytest.approx(batch / 0.05)


def test_waiting_for_the_prefill_of_others_is_not_decoding() -> None:
    early = Stream(0.0, ((0.0, 1), *((10 + i * 0.1, i + 1) for i in range(1, 40))), {})
    assert decode_rate([early, stream(10.0, 0.1, 40)]) == pytest.approx(20.0)


def test_tokens_that_come_together_count_as_many() -> None:
    pairs = Stream(0.0, tuple((i * 0.2, 2 * i + 1) for i in range(20)), {})
    assert decode_rate([pairs]) == pytest.approx(10.0)


@pytest.mark.parametrize("late", [2.0, 3.3])
def test_requests_that_did_not_run_together_have_no_rate(late: float) -> None:
    with pytest.raises(Unfit):
        decode_rate([stream(0.0, 0.05, 64), stream(late, 0.05, 64)])


def test_ratios_come_from_the_batch_and_the_ttft_rows() -> None:
    rates = {"stock": 10.0, "none": 9.0, "dense": 40.0, "hybridkv": 100.0}
    rows = []
    for server, rate in rates.items():
        budget = 0.1 if server == "hybridkv" else None
        # The first token of a decode row must not be taken for that of the rows of its own.
        rows += [row(server, budget, 1, 1.0, 7.0), row(server, budget, 4, rate, 7.0)]
        rows.append(row(server, budget, 1, None, 206.0 if budget else 200.0))
    ratios = ratio_row(rows, 4)
    assert (ratios["hybridkv_over_dense"], ratios["dense_over_stock"], ratios["none_over_stock"]) == (2.5, 4.0, 0.9)
    assert (ratios["ttft_growth"], ratios["ttft_over_stock"]) == (0.03, 1.03)
    assert ratios["hybridkv_1_over_dense"] is None


def test_servers_keep_their_order_and_hybridkv_has_one_a_budget() -> None:
    kinds = server_kinds(["hybridkv", "stock", "dense"], [1.0, 0.1], "cpu")
    assert [kind.label for kind in kinds] == ["stock", "dense", "hybridkv 1", "hybridkv 0.1"]
    assert kinds[0].flags == ()


@pytest.mark.parametrize(("engine", "paged"), [("cpu", False), ("cuda", True)])
def test_only_a_gpu_server_without_the_plugin_is_asked_for_its_page_size(engine: str, paged: bool) -> None:
    (none,) = server_kinds(["none"], [], engine)
    assert ("--page-size" in none.flags) == paged


KINDS = {kind.label: kind for kind in server_kinds(["stock", "none", "dense", "hybridkv"], [0.1], "cpu")}
DENSE = {"kv_compressor": {"compressed": False, "reason": "short_prompt"}}
COMPRESSED = {"kv_compressor": {"compressed": True, "reason": None}}


@pytest.mark.parametrize(
    ("label", "metas", "num_compressed", "passes"),
    [
        ("stock", [{}, {}], None, True),
        ("stock", [DENSE], 0, False),
        ("stock", [COMPRESSED], None, False),
        ("none", [{}], None, True),
        ("none", [{}], 0, False),
        ("dense", [DENSE], 0, True),
        ("dense", [{}], None, False),
        ("dense", [DENSE, COMPRESSED], 1, False),
        ("dense", [DENSE], 1, False),
        ("hybridkv 0.1", [COMPRESSED] * 2, 2, True),
        ("hybridkv 0.1", [{}], None, False),
        ("hybridkv 0.1", [COMPRESSED, DENSE], 1, False),
        ("hybridkv 0.1", [COMPRESSED, COMPRESSED], 1, False),
    ],
)
def test_any_service_but_the_expected_one_is_refused(
    label: str, metas: list[dict[str, Any]], num_compressed: int | None, passes: bool
) -> None:
    with contextlib.nullcontext() if passes else pytest.raises(Unfit, match=label.split()[0]):
        check_service(KINDS[label], metas, num_compressed)
