"""Answers computed without servers: at the whole budget stock's own, token for token, and one file a setting."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from benchmarks.quality.cases import Cell
from benchmarks.quality.in_process import Answerer, answer_cells
from benchmarks.quality.models import TINY_MODEL
from benchmarks.quality.rows import make_rows
from benchmarks.quality.runs import plan_keys
from benchmarks.quality.servers import ServerSpec
from benchmarks.quality.store import AnswerFile
from benchmarks.replay import ReplayedModel

CELL = Cell("coherent", 400, 2, ("list", "chain", "second_in_place"))
STOCK, WHOLE = ServerSpec("stock"), ServerSpec("hybridkv", 1.0)
TENTH = ServerSpec("hybridkv", 0.1, {"theta": 0.0, "min_head_pages": 1}, "static")

pytestmark = pytest.mark.slow


def ask(folder: Path, *specs: ServerSpec) -> dict[ServerSpec, dict]:
    """Ask what is not in the folder yet; returns all its answers."""
    files = {spec: AnswerFile(folder, spec) for spec in specs}
    answerer = Answerer(ReplayedModel(TINY_MODEL), specs, None)
    counts: list[int] = []
    with contextlib.ExitStack() as stack:
        for file in files.values():
            stack.enter_context(file)
        answer_cells(answerer, [CELL], files, seed=3, advance=counts.append)
    return {spec: file.answers for spec, file in files.items()} | {"counts": counts}  # type: ignore[dict-item]


def test_answers_are_stocks_at_the_whole_budget_and_asked_once(tmp_path: Path) -> None:
    keys = plan_keys(3, [CELL])
    answers = ask(tmp_path, STOCK, WHOLE)
    assert list(answers[STOCK]) == list(answers[WHOLE]) == keys
    for key in keys:
        mine, theirs = answers[WHOLE][key], answers[STOCK][key]
        assert (mine["tokens"], mine["said"]) == (theirs["tokens"], theirs["said"])
        assert theirs["record"] is None
        assert mine["record"]["compressed"]
    rows = make_rows(WHOLE, answers[WHOLE], [(STOCK, answers[STOCK]), (WHOLE, answers[WHOLE])])
    assert all(row["same_text"] == 1 and row["top1_agreement"] == 1 and row["kl"] < 1e-4 for row in rows)
    again = ask(tmp_path, STOCK, WHOLE, TENTH)
    assert again["counts"] == [1] * len(keys)  # type: ignore[index]
    assert again[STOCK] == answers[STOCK]
    assert list(again[TENTH]) == keys
    assert all(0.05 < again[TENTH][key]["record"]["resident_ratio"] < 0.2 for key in keys)
