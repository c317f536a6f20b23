"""Every example runs and was compressed: two on the shared server, the offline engine with the own compressor."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Server, engine_flags

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
OWN = EXAMPLES / "own_compressor"


def run(script: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_openai_client_with_images(tenth: Server) -> None:
    answer, record = run("openai_images.py", "--url", tenth.url).splitlines()[-2:]
    assert answer
    assert '"compressed": true' in record


def test_frontend_language_with_fork(tenth: Server) -> None:
    # The tiny model has a token for each byte.
    printed = run("frontend_fork.py", str(ROOT / "LICENSE"), "--characters", "1200", "--url", tenth.url)
    assert printed.count("compressed: True") == 3
    assert " 0 of them cached" not in printed, "the branches share the document"


def test_offline_engine_with_an_own_compressor(tmp_path: Path, vl_model: Path) -> None:
    # As pip would install it, without a package index.
    folder = tmp_path / "key_norm-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: key-norm\nVersion: 0.1.0\n")
    (folder / "entry_points.txt").write_text("[sglang_hybridkv.compressors]\nkey-norm = key_norm:KeyNorm\n")
    path = os.pathsep.join([str(tmp_path), str(OWN), *filter(None, [os.environ.get("PYTHONPATH")])])
    printed = run(
        "offline_engine.py",
        *("--model-path", str(vl_model), "--compressor", "key-norm", "--characters", "1200", str(ROOT / "LICENSE")),
        env={**engine_flags("cpu").env, "PYTHONPATH": path},
    )
    assert "'compressed': True" in printed


@pytest.mark.usefixtures("preloaded_benchmarks")
def test_case_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--methods", "hybridkv", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(EXAMPLES / "case_studies" / "run.py"), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["stock"] * 4 + ["hybridkv"] * 4
    assert all(row["right"] for row in rows[:4]), rows
    assert all(row["resident_ratio"] < 0.15 for row in rows[4:])
    page = (tmp_path / "README.md").read_text()
    for study in ("difference", "moment"):
        assert f"({study}.png)" in page
        assert (tmp_path / f"{study}.png").stat().st_size > 10_000
