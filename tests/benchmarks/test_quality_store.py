"""Answers survive interruptions and broken lines, and are not mixed with those of another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.servers import ServerSpec
from benchmarks.quality.store import AnswerFile, open_store, read_answers

SPEC = ServerSpec("hybridkv", 0.1, {"theta": 0.5}, "half")


def write(folder: Path, *keys: str) -> Path:
    with AnswerFile(folder, SPEC) as file:
        for key in keys:
            file.append({"key": key, "said": "ä"})
    return file.path


def test_answers_come_back_with_their_spec(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    write(tmp_path, "c")
    ((spec, answers),) = read_answers(tmp_path)
    assert spec == SPEC
    assert spec.config == SPEC.config
    assert list(answers) == ["a", "b", "c"]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_last_line_that_was_cut_off_is_asked_again(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, "a", "b")
    path.write_bytes(path.read_bytes()[:-cut])
    with AnswerFile(tmp_path, SPEC) as file:
        assert list(file.answers) == ["a"]
    write(tmp_path, "c")
    assert list(read_answers(tmp_path)[0][1]) == ["a", "c"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("junk", ["{", "[]", "null", '{"no": "key"}', "\ufffd"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, junk: str) -> None:
    path = write(tmp_path, "a", "b")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:1], junk, *lines[1:], ""]))
    before = path.read_bytes()
    for attempt in (lambda: AnswerFile(tmp_path, SPEC).__enter__(), lambda: read_answers(tmp_path)):
        with pytest.raises(ValueError, match=rf"{path.name}: line 2 "):
            attempt()
    assert path.read_bytes() == before


def test_a_store_belongs_to_one_model_and_code(tmp_path: Path) -> None:
    identity = {"model": "m", "seed": 0, "code": "c"}
    open_store(tmp_path / "new" / "store", identity)
    open_store(tmp_path / "new" / "store", identity)
    for name in identity:
        with pytest.raises(ValueError, match=f"another {name} "):
            open_store(tmp_path / "new" / "store", identity | {name: "other"})
    open_store(tmp_path / "new" / "store", identity | {"code": "d"}, ignore=("code",))
