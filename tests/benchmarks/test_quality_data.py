"""Published questions go through the same servers, store and rows as drawn scenes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.quality.cli import main
from benchmarks.quality.data import DataSet, case_digest, load_data
from benchmarks.scenes import ARRANGEMENTS
from tests.benchmarks.test_datasets import make_mile_bench, mile_bench_record

RESPONSES = ("the first", "neither", "the second")
CHOICE, OPEN = "milebench/SlideVQA", "milebench/MMCoQA"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """MileBench with three questions of a choice and three that are right when they contain the answer."""
    for name, question_type in (("SlideVQA", "multi-choice"), ("MMCoQA", "open-ended")):
        records = [
            mile_bench_record(sample_id=i, response=response, context=f"{name} {i}: {{image#1}}{{image#2}}{{image#3}}?")
            for i, response in enumerate(RESPONSES)
        ]
        make_mile_bench(tmp_path / "MileBench", name, records, question_type)
    return tmp_path / "MileBench"


@pytest.fixture
def asked(folder: Path) -> list[DataSet]:
    return load_data([f"{CHOICE}={folder}", f"{OPEN}={folder}"], None, 64)


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> list[str]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    sets = ["--data", f"{CHOICE}={folder}", "--data", f"{OPEN}={folder}"]
    one_server = ["--compressors", "hybridkv", "--budgets", "0.1", "--variants", "{}"]
    return [*sets, *one_server, "--model-path", str(model), *out(tmp_path)]


def out(folder: Path) -> list[str]:
    return ["--out", str(folder / "out"), "--json"]


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def by_task(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["compressor"], row["task"]): row for row in rows}


def test_stock_comes_first_and_every_server_is_asked_the_same(launched, endpoint, asked, command, capsys) -> None:
    endpoint.wrong = {f"{CHOICE}/1", f"{OPEN}/0", f"{OPEN}/2"}
    assert main(command) == 0
    rows = printed(capsys)
    assert launched == ["stock", "hybridkv 0.1"]
    keys = [case.key for one in asked for case in one.cases]
    assert sorted(endpoint.asked) == sorted(keys * 2)
    assert endpoint.max_tokens == {64}
    assert len(rows) == 4
    assert not {row["scene"] for row in rows} & set(ARRANGEMENTS)
    for name in ("stock", "hybridkv"):
        chosen, contained = (by_task(rows)[name, task] for task in (CHOICE, OPEN))
        assert (chosen["metric"], chosen["n"], chosen["score"], chosen["exact_match"]) == (
            "multiple_choice",
            3,
            0.6667,
            0.6667,
        )
        assert (contained["metric"], contained["score"], contained["scene"]) == ("contains", 0.3333, "milebench")
        for row in (chosen, contained):
            assert 0 <= row["ci_low"] <= row["exact_match"] <= row["ci_high"] <= 1
            assert row["prompt_tokens"] == 1610
    assert by_task(rows)["hybridkv", CHOICE]["delta_full"] == 0.0
    assert by_task(rows)["hybridkv", CHOICE]["resident_ratio"] == 0.25


def test_an_answer_that_only_contains_the_right_one_scores_without_being_exact(
    launched, endpoint, command, capsys, monkeypatch
) -> None:
    answer = endpoint._answer
    monkeypatch.setattr(endpoint, "_answer", lambda said, *rest: answer(f"surely {said} of them", *rest))
    assert main(command) == 0
    rows = by_task(printed(capsys))
    assert (rows["stock", OPEN]["score"], rows["stock", OPEN]["exact_match"]) == (1.0, 0.0)
    assert (rows["stock", CHOICE]["score"], rows["stock", CHOICE]["exact_match"]) == (1.0, 1.0)


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(endpoint, folder, tmp_path, capsys) -> None:
    command = ["--data", f"{CHOICE}={folder}", "--data", f"{OPEN}={folder}", "--base-url", endpoint.url, *out(tmp_path)]
    endpoint.dies_after = 2
    assert main([*command, "--concurrency", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"the answers so far are in {tmp_path / 'out'}, run the same command to go on" in captured.err
    endpoint.dies_after = None
    assert main(command) == 0
    first = printed(capsys)
    assert len(endpoint.asked) == len(set(endpoint.asked)) == 6
    assert main(command) == 0
    assert printed(capsys) == first
    assert len(endpoint.asked) == 6


def test_the_first_so_many_questions_and_a_limit_of_tokens(endpoint, folder, tmp_path, capsys) -> None:
    command = ["--data", f"milebench={folder}", "--n", "2", "--max-tokens", "5", "--base-url", endpoint.url]
    assert main([*command, *out(tmp_path)]) == 0
    assert {row["task"]: row["n"] for row in printed(capsys)} == {CHOICE: 2, OPEN: 2}
    assert endpoint.max_tokens == {5}
    assert main([*command, "--max-tokens", "6", *out(tmp_path)]) == 2
    assert "another max_tokens (5, this is 6)" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["text", "picture"])
def test_answers_to_a_question_that_has_changed_are_not_taken(launched, folder, command, capsys, changed) -> None:
    assert main(command) == 0
    started = len(launched)
    if changed == "picture":
        Image.new("RGB", (8, 8), "black").save(folder / "SlideVQA" / "images" / "red.png")
    else:
        file = folder / "SlideVQA" / "SlideVQA.json"
        file.write_text(file.read_text().replace("SlideVQA 1:", "Slide 1:"))
    case_digest.cache_clear()
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --out: ")
    assert CHOICE in captured.err
    assert captured.err.count("\n") == 1
    assert len(launched) == started


def test_the_report_has_a_table_and_plots_of_the_collection(launched, endpoint, command, tmp_path, capsys) -> None:
    endpoint.wrong = {f"{CHOICE}/1", f"{OPEN}/0", f"{OPEN}/2"}
    assert main(command) == 0
    capsys.readouterr()
    assert main(["report", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "### milebench (1610 prompt tokens)" in text
    assert f"| compressor | budget | n | {OPEN} | {CHOICE} | KL | resident |" in text
    assert "| hybridkv | 0.1 | 3 | 0.333 contains | 0.667 [0.21, 0.94] | 0.000 | 25.0 % |" in text
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    by_task = {f"accuracy-milebench-{task.removeprefix('milebench/')}.png" for task in (OPEN, CHOICE)}
    assert names == {"accuracy-milebench.png", "memory-milebench.png"} | by_task


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "milebench/SlideVQA=nowhere"], ["--data milebench/SlideVQA", "nowhere", "no such folder"]),
        (["--data", "opera={folder}"], ["--data opera", "'opera'", "milebench", "vatex"]),
        (["--data", "milebench/Broken={folder}"], ["Broken.json", "JSON"]),
        (["--data", "milebench/Odd={folder}"], ["Odd.json", "record 0", "images_path"]),
        (["--data", "milebench/Riddles={folder}"], ["rouge_l", "[quality]"]),
        (["--data", "milebench"], ["--data", "NAME=FOLDER", "'milebench'"]),
        (["--data", "milebench={folder}", "--data", f"{CHOICE}={{folder}}"], [CHOICE, "more than once"]),
        (["--data", f"{CHOICE}={{folder}}", "--max-tokens", "0"], ["--max-tokens", "at least 1", "0"]),
        (["--max-tokens", "9"], ["--max-tokens", "--data", "9"]),
        (["--data", f"{CHOICE}={{folder}}", "--n", "0"], ["--n", "0"]),
        (["--data", f"{CHOICE}={{folder}}", "--tasks", "get"], ["--tasks", "--data"]),
        (["--data", f"{CHOICE}={{folder}}", "--scenes", "page"], ["--scenes", "--data"]),
    ],
)
def test_bad_input_is_one_sentence_before_a_server_starts(
    launched, folder, command, capsys, monkeypatch, arguments, words
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    make_mile_bench(folder, "Riddles", [mile_bench_record()], "open-ended")
    (folder / "Broken").mkdir()
    (folder / "Broken" / "Broken.json").write_text('{"meta_data": ')
    make_mile_bench(folder, "Odd", [mile_bench_record(images_path="red.png")])
    rest = command[command.index("--compressors") :]
    assert main([argument.format(folder=folder) for argument in arguments] + rest) == 2
    captured = capsys.readouterr()
    assert (captured.out, launched) == ("", [])
    assert captured.err.count("\n") == 1
    assert [word for word in words if word not in captured.err] == []
