"""Tables and plots come from the answers in a store."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.quality import plots
from benchmarks.quality.cli import main
from benchmarks.quality.intervals import wilson
from benchmarks.quality.report import BEGIN, END, read_rows
from benchmarks.quality.servers import ServerSpec
from benchmarks.quality.store import AnswerFile

COMPRESSORS = {"stock": [None], "full": [1.0], "hybridkv": [0.1, 0.5], "snapkv": [0.1, 0.5]}
RIGHT = {"stock": 10, "full": 10, "hybridkv": 9, "snapkv": 1}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Answers of four servers to ten scenes each of two kinds."""
    for name, budgets in COMPRESSORS.items():
        for budget in budgets:
            record = None if budget is None else {"resident_ratio": budget + 0.02, "host_bytes": 9}
            with AnswerFile(tmp_path, ServerSpec(name, budget)) as file:
                for scene, task in (("coherent", "get"), ("coherent", "list"), ("page", "read")):
                    for i in range(10):
                        key = f"{scene}/1600/{i}/{task}"
                        right = i < RIGHT[name]
                        answer = {"key": key, "right": right, "partial": float(right), "prompt_tokens": 1613}
                        file.append(answer | {"record": record, "tokens": ["a"], "top": [{"a": -0.1}]})
    return tmp_path


def test_tables_have_a_line_a_server_and_a_column_a_task(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--out", str(store)]) == 0
    text = capsys.readouterr().out
    coherent, page = text.split("### ")[1:]
    assert "| compressor | budget | n | get | list | KL | resident |" in coherent
    assert "| compressor | budget | n | read | KL | resident |" in page
    lines = [line for line in coherent.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| stock", ""],
        ["| full", "1"],
        ["| hybridkv", "0.5"],
        ["| hybridkv", "0.1"],
        ["| snapkv", "0.5"],
        ["| snapkv", "0.1"],
    ]
    assert "0.900 [0.60, 0.98]" in lines[3]
    assert "12.0 %" in lines[3]
    # One of ten is within chance, nine of ten are not.
    assert ["▼" in line for line in lines] == [False] * 4 + [True] * 2


def test_plots_are_pictures_with_something_in_them(store: Path) -> None:
    assert main(["report", "--out", str(store), "--markdown", str(store / "tables.md")]) == 0
    assert (store / "tables.md").read_text().count("### ") == 2
    names = {"accuracy-coherent-1600", "memory-coherent-1600", "accuracy-page-1600", "memory-page-1600"}
    names |= {"accuracy-coherent-1600-get", "accuracy-coherent-1600-list"}  # of one task there is one plot already
    pictures = {path.stem: path for path in store.glob("*.png")}
    assert set(pictures) == names
    for path in pictures.values():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 8


def test_tables_replace_what_stands_between_the_marks(store: Path) -> None:
    document = store / "quality.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        assert main(["report", "--out", str(store), "--markdown", str(document)]) == 0
        head, rest = document.read_text().split(BEGIN)
        written, tail = rest.split(END)
        assert (head, tail) == ("before\n", "\nafter\n")
        assert written.count("### ") == 2
        assert "old" not in written


def test_points_have_intervals_and_say_how_many_prompts_they_stand_for(store: Path, tmp_path: Path) -> None:
    """Of one task it is Wilson's own; of two alike the reach is smaller by the root of two."""
    rows = [row for row in read_rows(store) if row["scene"] == "coherent"]
    alone = [row for row in rows if row["task"] == "get"]
    for group, factor, prompts in ((alone, 1.0, "n = 10"), (rows, 2**-0.5, "n = 20")):
        [point, _] = plots._curves(group, "budget")["hybridkv"]
        exact = wilson(9, 10)
        assert (point.place, point.value) == (0.1, pytest.approx(0.9))
        assert point.down == pytest.approx(factor * (exact.value - exact.low), abs=1e-4)
        assert point.up == pytest.approx(factor * (exact.high - exact.value), abs=1e-4)
        assert plots._prompts(group) == prompts
