"""Questions about texts go through the same servers and rows as drawn scenes; free text is compared with stock's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.cases import SECOND_TASKS, TASKS, Cell, make_exchanges
from benchmarks.quality.cli import main
from benchmarks.quality.client import FORCED_LOGIT, forcing_processor, undo_forcing
from benchmarks.quality.models import MODELS
from benchmarks.quality.presets import Choices, build_plan
from benchmarks.quality.runs import RunSettings, plan_keys
from benchmarks.quality.servers import ServerSpec
from benchmarks.quality.table import run_plan
from benchmarks.texts import FREE_KINDS, HELD_OUT, KINDS

CELL = Cell("text", 1000, 2, TASKS)
TASKS_OF_TEXTS = (*KINDS, *SECOND_TASKS)
KEYS = plan_keys(0, [CELL])
STOCK, HYBRIDKV = ServerSpec("stock"), ServerSpec("hybridkv", 0.1)


@pytest.fixture
def asked() -> list[Cell]:
    return [CELL]


def run(folder: Path, *specs: ServerSpec) -> dict[tuple[str, str], dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    settings = RunSettings(out=folder, seed=0, concurrency=2, model=Path("model"))
    _, errors = run_plan(settings, [(spec, [CELL]) for spec in specs], rows.extend)
    assert errors == []
    return {(row["compressor"], row["task"]): row for row in rows}


def test_all_tasks_of_a_text_share_its_beginning() -> None:
    exchanges = list(make_exchanges(0, CELL, 0, ()))
    assert [exchange.key.rsplit("/", 1)[1] for exchange in exchanges] == list(TASKS_OF_TEXTS)
    contents = [exchange.messages[0]["content"] for exchange in exchanges]
    body = contents[0][: contents[0].rindex("\n\n")]
    assert len(body) > 3000
    assert all(content.startswith(body) for content in contents)


def test_halves_have_keys_and_texts_of_their_own() -> None:
    held_out = Cell("text", 1000, 2, TASKS, HELD_OUT)
    assert set(plan_keys(0, [held_out])).isdisjoint(KEYS)
    ours, theirs = (next(make_exchanges(0, cell, 0, ())).messages for cell in (CELL, held_out))
    assert ours != theirs
    with pytest.raises(ValueError, match="^split: expected"):
        Cell("coherent", 400, 2, TASKS, HELD_OUT)
    for spec, cells in build_plan(MODELS["smollm2"].presets["headline"], Choices(split=HELD_OUT)):
        assert {cell.split for cell in cells} == {HELD_OUT}, spec


def test_free_text_is_compared_with_stock_and_not_judged(launched, endpoint, tmp_path) -> None:
    rows = run(tmp_path, STOCK, HYBRIDKV)
    for kind in FREE_KINDS:
        stock, ours = rows["stock", kind], rows["hybridkv", kind]
        for name in ("exact_match", "ci_low", "ci_high", "partial", "delta_full", "kept"):
            assert stock[name] is ours[name] is None, name
        assert (ours["same_text"], ours["forced_top1"], stock["same_text"], stock["forced_top1"]) == (
            1.0,
            1.0,
            None,
            None,
        )
        assert ours["n"] == 2
    assert {rows["hybridkv", task]["exact_match"] for task in SECOND_TASKS} == {1.0}
    # Each of hybridkv's free texts, and none of stock's.
    assert endpoint.wrote == 2 * len(FREE_KINDS)
    for row in rows.values():
        assert json.loads(json.dumps(row)) == row


def test_what_stays_right_is_counted_among_what_stock_has_right(launched, endpoint, tmp_path) -> None:
    endpoint.wrong = {"text/1000/0/needle", "text/1000/0/price", "text/1000/1/price"}
    run(tmp_path, STOCK)
    endpoint.wrong = {"text/1000/0/needle", "text/1000/0/price", "text/1000/0/pair"}
    rows = run(tmp_path, STOCK, HYBRIDKV)
    counted = {task: (rows["hybridkv", task]["full_right"], rows["hybridkv", task]["kept"]) for task in TASKS_OF_TEXTS}
    assert counted["needle"] == (1, 1.0)
    assert counted["price"] == (0, None)
    assert counted["pair"] == (2, 0.5)
    assert rows["hybridkv", "pair"]["same_text"] == 0.5
    assert rows["stock", "needle"]["full_right"] == 1
    assert rows["stock", "needle"]["kept"] is None
    low, high = rows["hybridkv", "pair"]["kept_low"], rows["hybridkv", "pair"]["kept_high"]
    assert 0 < low < 0.5 < high < 1


def test_a_report_shows_what_is_kept_and_what_is_the_same(launched, endpoint, tmp_path, capsys) -> None:
    run(tmp_path, STOCK, HYBRIDKV)
    capsys.readouterr()
    assert main(["report", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "### text, 1,000 tokens" in text
    assert "kept 2 of 2" in text
    assert "1.00 same, 1.000 top-1" in text


def test_a_running_server_is_asked_about_texts(endpoint, tmp_path, capsys) -> None:
    arguments = ["--model", "smollm2", "--preset", "smoke", "--n", "2", "--json", "--tasks", "needle,summary"]
    assert main([*arguments, "--base-url", endpoint.url, "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["scene"], row["context"]) for row in rows] == [
        ("needle", "text", 1000),
        ("summary", "text", 1000),
    ]
    assert json.loads((tmp_path / "run.json").read_text())["texts"]


def test_forcing_can_be_taken_back() -> None:
    import dill

    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1)) * 4
    before = torch.log_softmax(logits, -1)
    likely, unlikely = int(before[0].argmax()), int(before[1].argsort()[300])
    processor = dill.loads(bytes.fromhex(json.loads(forcing_processor())["callable"]))()
    parameters = [{"write": [likely]}, {"write": [unlikely]}, {"write": []}]
    after = torch.log_softmax(processor(logits.clone(), parameters), -1)
    assert after.argmax(-1)[:2].tolist() == [likely, unlikely]
    torch.testing.assert_close(after[2], before[2])
    for row, forced in enumerate((likely, unlikely)):
        top = {str(i): float(after[row, i]) for i in after[row].topk(20).indices.tolist()}
        undone = undo_forcing(str(forced), top)
        for token, value in undone.items():
            tolerance = 1e-4 if int(token) != unlikely else 1.0
            assert value == pytest.approx(float(before[row, int(token)]), abs=tolerance)
    assert math.exp(undone[str(unlikely)]) < 1e-3 < math.exp(FORCED_LOGIT)
