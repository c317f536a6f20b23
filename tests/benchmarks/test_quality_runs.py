"""From questions to rows through an endpoint that knows the answers; nothing that was answered is asked again."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import table
from benchmarks.quality.cases import TASKS, Cell
from benchmarks.quality.cli import main
from benchmarks.quality.runs import RunSettings, plan_keys
from benchmarks.quality.servers import ServerSpec
from benchmarks.quality.store import read_answers
from benchmarks.quality.table import run_plan, smoke_verdict, text_verdict
from tests.benchmarks.fake_endpoint import COMPRESSED, FakeEndpoint

CELLS = [Cell("coherent", 400, 3, TASKS), Cell("page", 400, 2, ("read",))]
KEYS = plan_keys(0, CELLS)
STOCK, HYBRIDKV = ServerSpec("stock"), ServerSpec("hybridkv", 0.1)


@pytest.fixture
def asked() -> list[Cell]:
    return CELLS


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return RunSettings(out=tmp_path, seed=0, concurrency=3, model=Path("model"))


def run(settings: RunSettings, *specs: ServerSpec) -> tuple[list[dict[str, Any]], list[str], Any]:
    rows: list[dict[str, Any]] = []
    results, errors = run_plan(settings, [(spec, CELLS) for spec in specs], rows.extend)
    return rows, errors, results


def test_every_question_is_asked_once_and_scored(launched, endpoint, settings) -> None:
    endpoint.wrong = {"coherent/400/1/list"}
    rows, errors, _ = run(settings, HYBRIDKV)
    assert errors == []
    assert sorted(endpoint.asked) == sorted(KEYS)
    shares = {(row["scene"], row["task"]): (row["n"], row["exact_match"]) for row in rows}
    assert shares["page", "read"] == (2, 1.0)
    assert shares["coherent", "list"] == (3, 0.6667)
    assert shares["coherent", "second_in_place"] == shares["coherent", "second_turn"] == (3, 1.0)
    # second_new and second_turn ask another question first.
    assert endpoint.before == 2 * 3


def test_images_are_new_to_the_server_one_scene_at_a_time(launched, endpoint, settings) -> None:
    endpoint.slow.set()
    run(settings, HYBRIDKV)
    assert endpoint.most_new == 1


def test_rows_have_the_keys_of_the_contract_in_order(launched, settings) -> None:
    rows, _, _ = run(settings, STOCK, HYBRIDKV)
    for row in rows:
        contract = "compressor budget task scene prompt_tokens n exact_match ci_low ci_high"
        assert list(row)[:9] == contract.split()
        assert 0 <= row["ci_low"] <= row["exact_match"] <= row["ci_high"] <= 1
        assert row["prompt_tokens"] == 1610
        assert json.loads(json.dumps(row)) == row


def test_rows_compare_with_full_and_with_hybridkv_on_the_same_prompts(launched, endpoint, settings) -> None:
    run(settings, STOCK)
    endpoint.wrong = {key for key in KEYS if key.endswith("/get")}
    rows, _, _ = run(settings, STOCK, HYBRIDKV, ServerSpec("snapkv", 0.1))
    by_name = {(row["compressor"], row["task"]): row for row in rows if row["scene"] == "coherent"}
    stock, ours, other = (by_name[name, "get"] for name in ("stock", "hybridkv", "snapkv"))
    assert stock["delta_full"] is None
    assert ours["delta_full"] == -1.0
    assert (ours["top1_agreement"], other["p_vs_hybridkv"], ours["p_vs_hybridkv"]) == (0.0, 1.0, None)
    assert ours["kl"] > 1
    chain = by_name["hybridkv", "chain"]
    assert (chain["delta_full"], chain["top1_agreement"], chain["kl"]) == (0.0, 1.0, 0.0)
    assert (chain["resident_ratio"], chain["host_bytes"], chain["dynamic_heads"]) == (0.25, 64, 1)


def test_what_was_answered_is_not_asked_again(launched, endpoint, settings) -> None:
    first, _, _ = run(settings, HYBRIDKV)
    launched.clear()
    second, _, _ = run(settings, HYBRIDKV)
    assert launched == [], "a server was started for nothing"
    assert second == first


def test_a_server_that_dies_loses_no_answer_and_stops_no_other(launched, endpoint, settings, capsys) -> None:
    rows, errors, _ = run(settings, ServerSpec("dying", 0.1), ServerSpec("broken", 0.1), HYBRIDKV)
    assert {row["compressor"] for row in rows} == {"hybridkv"}
    assert [error.split(":")[0] for error in errors] == ["dying 0.1", "broken 0.1"]
    kept = {spec.compressor: answers for spec, answers in read_answers(settings.out)}
    assert 4 <= len(kept["dying"]) < len(KEYS)
    assert set(kept["hybridkv"]) == set(KEYS)


@pytest.mark.parametrize(
    ("spec", "record", "word"),
    [
        (HYBRIDKV, None, "no proof"),
        (HYBRIDKV, COMPRESSED | {"compressed": False, "reason": "no_free_pages"}, "no_free_pages"),
        (STOCK, COMPRESSED, "stock"),
    ],
)
def test_an_answer_without_the_right_proof_is_an_error(launched, endpoint, settings, monkeypatch, spec, record, word):
    make_server = table.make_server

    @contextlib.contextmanager
    def lying(*arguments: Any, **named: Any) -> Iterator[FakeEndpoint]:
        with make_server(*arguments, **named) as server:
            server.record = record
            yield server

    monkeypatch.setattr(table, "make_server", lying)
    rows, errors, _ = run(settings, spec)
    assert rows == []
    assert word in errors[0]
    assert [len(answers) for _, answers in read_answers(settings.out)] in ([0], [])


@pytest.mark.parametrize(
    ("verdict", "stock", "ours", "reason"),
    [
        (smoke_verdict, 90, 87, None),
        (smoke_verdict, 90, 86, "more than 3 points below"),
        (smoke_verdict, 49, 49, "not fit"),
        (smoke_verdict, 90, None, "nothing to compare with stock"),
        (text_verdict, 50, 40, None),
        (text_verdict, 50, 39, "less than 80 %"),
        (text_verdict, 29, 29, "not fit"),
        (text_verdict, 90, None, "nothing to compare with stock"),
    ],
)
def test_the_smoke_test_fails_for_a_reason(verdict, stock: int, ours: int | None, reason: str | None) -> None:
    """Of 100 lookups `stock` and `ours` are right; None without a server of hybridkv."""
    shares = {STOCK: stock} if ours is None else {STOCK: stock, HYBRIDKV: ours}
    results = [
        (spec, {f"coherent/400/{i}/get": {"right": i < num_right} for i in range(100)})
        for spec, num_right in shares.items()
    ]
    assert reason in (verdict(results) or "") if reason else verdict(results) is None


ARGUMENTS = ["--preset", "headline", "--contexts", "400", "--scenes", "coherent", "--n", "3", "--json"]
ARGUMENTS += ["--tasks", ",".join(TASKS)]


def test_a_running_server_is_measured_as_what_it_is(endpoint, tmp_path, capsys) -> None:
    assert main([*ARGUMENTS, "--base-url", endpoint.url + "/v1", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(row["compressor"], row["budget"], row["n"]) for row in rows} == {("hybridkv", 0.1, 3)}
    assert all({"commit", "machine", "versions", "model"} <= row.keys() for row in rows)
    assert {row["delta_full"] for row in rows} == {None}


def test_servers_with_other_settings_are_other_rows(endpoint, tmp_path, capsys) -> None:
    command = [*ARGUMENTS, "--base-url", endpoint.url, "--out", str(tmp_path)]
    assert main(command) == 0
    endpoint.config = {"theta": 0.25}
    endpoint.wrong = {"coherent/400/0/chain"}
    assert main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    chains = [(row["config"], row["exact_match"]) for row in rows if row["task"] == "chain"]
    assert chains == [({}, 1.0), ({"theta": 0.25}, pytest.approx(2 / 3, abs=1e-3))]


def test_running_servers_of_one_folder_are_compared(endpoint, tmp_path, capsys) -> None:
    command = [*ARGUMENTS, "--base-url", endpoint.url, "--out", str(tmp_path)]
    endpoint.record = None
    assert main(command) == 0
    endpoint.record = COMPRESSED
    endpoint.wrong = {"coherent/400/0/chain", "coherent/400/1/chain", "coherent/400/2/chain"}
    capsys.readouterr()
    assert main(command) == 0
    rows = {row["task"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert (rows["chain"]["delta_full"], rows["list"]["delta_full"]) == (-1.0, 0.0)
    assert (rows["chain"]["top1_agreement"], rows["list"]["top1_agreement"]) == (0.0, 1.0)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_answers_and_goes_on(endpoint, tmp_path, end) -> None:
    command = [*ARGUMENTS, "--base-url", endpoint.url, "--out", str(tmp_path), "--concurrency", "2"]
    endpoint.slow.set()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bench_quality", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A shell's background jobs ignore SIGINT, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(endpoint.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(end)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"run the same command to go on" in err
    endpoint.slow.clear()
    assert main(command) == 0
    assert len(endpoint.asked) == len(set(endpoint.asked)) == len([k for k in KEYS if k.startswith("coherent")])
