"""The arithmetic of bench_wall, and what it asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_wall
from benchmarks.bench_serving import Stream
from benchmarks.bench_wall import Load, draw, gaps_ms, most_at_once, ratio_rows, summary


def stream(first: float, step: float, tokens: int, **meta: Any) -> Stream:
    events = tuple((first + i * step, i + 1) for i in range(tokens))
    return Stream(1000 * first, events, {"prompt_tokens": 100, **meta})


def test_requests_that_follow_one_another_are_not_at_once() -> None:
    assert most_at_once([stream(0, 1, 11), stream(10, 1, 11), stream(20.5, 1, 5)]) == 1
    assert most_at_once([stream(0, 1, 11), stream(9, 1, 11), stream(9.5, 0.1, 3)]) == 3


def test_tokens_that_come_together_share_the_time() -> None:
    together = Stream(0, ((0.0, 1), (0.3, 4), (0.4, 5)), {})
    assert gaps_ms([together]) == pytest.approx([100.0] * 4)


def test_a_run_is_summed_up() -> None:
    row = summary([stream(0, 0.1, 11, cached_tokens=50), stream(0.5, 0.1, 11, num_retractions=2)], 2.0)
    assert row["tok_s"] == 11.0
    assert (row["retractions"], row["cached_share"], row["most_at_once"]) == (2, 0.25, 2)
    assert (row["itl_ms_p50"], row["ttft_ms_p50"], row["resident_ratio"]) == (100.0, 250.0, None)


def test_prompts_are_of_their_own_or_begin_alike() -> None:
    for prefix, shared in (("distinct", 0), ("shared", 40)):
        prompts = Load(prefix, 3, 0).prompts(50, 40)
        assert {len(ids) for ids in prompts} == {50}
        assert len(prompts) == 6
        assert len({tuple(ids[:40]) for ids in prompts}) == (1 if shared else 6)
        assert len({tuple(ids[shared:]) for ids in prompts}) == 6
        for other in (Load(prefix, 3, 1), Load(prefix, 2, 0)):
            assert not {tuple(ids[:40]) for ids in prompts} & {tuple(ids[:40]) for ids in other.prompts(50, 40)}


def row(server: str, clients: int, repeat: int, rate: float) -> dict[str, Any]:
    point = {"server": server, "budget": 0.1 if server == "hybridkv" else None, "prefix": "distinct"}
    return {**point, "clients": clients, "repeat": repeat, "tok_s": rate, "ttft_ms_p50": 100.0 * clients}


ROWS = [
    row(server, 4, repeat, rate)
    for server, rates in (("stock", (10, 20)), ("hybridkv", (20, 30)))
    for repeat, rate in enumerate(rates)
]


def test_a_ratio_is_of_the_same_run() -> None:
    [ratio] = ratio_rows([*ROWS, row("hybridkv", 8, 0, 40.0)])
    assert (ratio["of"], ratio["clients"], ratio["tok_s_over_stock"], ratio["range"]) == (
        "hybridkv",
        4,
        1.75,
        [1.5, 2.0],
    )


def test_rows_are_drawn(tmp_path: Path) -> None:
    draw([*ROWS, *ratio_rows(ROWS)], tmp_path / "wall.png")
    assert (tmp_path / "wall.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_other_settings_are_not_gone_on_with(tmp_path: Path, capsys, monkeypatch) -> None:
    given = tmp_path / "rows.jsonl"
    origin = {"engine": "cpu", "threads": 1, "prompt_tokens": 64, "shared_tokens": 32, "new_tokens": 8}
    origin |= {"pool_tokens": 9216, "max_running": 16, "chunked_prefill_size": 2048, "dtype": None}
    given.write_text(json.dumps({**row("stock", 1, 0, 1.0), **origin}))
    command = [
        "bench_wall",
        "--resume",
        str(given),
        "--prompt-tokens",
        "128",
        "--shared-tokens",
        "32",
        "--threads",
        "1",
    ]
    monkeypatch.setattr("sys.argv", [*command, "--new-tokens", "8"])
    assert bench_wall.main() == 1
    assert "it has prompt_tokens 64, not 128" in capsys.readouterr().err
