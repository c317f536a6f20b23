"""What the quality bench computes in process is what servers answer: most of its tables rest on that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.cli import main
from benchmarks.quality.store import read_answers

ASKED = ["--compressors", "hybridkv", "--budgets", "0.1", "--scenes", "coherent", "--contexts", "400", "--n", "3"]
ASKED += ["--variants", "{}"]


def answers_of(out: Path, *how: str) -> dict[tuple[str, str], Any]:
    """What was said, in tokens, and what was held, by compressor and question."""
    assert main([*ASKED, *how, "--out", str(out), "--json"]) == 0
    return {
        (spec.label, key): (line["tokens"], line["record"] and (line["record"]["dynamic_heads"]))
        for spec, lines in read_answers(out)
        for key, line in lines.items()
    }


@pytest.mark.server
@pytest.mark.usefixtures("preloaded_benchmarks")
def test_answers_in_process_are_those_of_servers(tmp_path: Path) -> None:
    served = answers_of(tmp_path / "served", "--dtype", "float32")
    computed = answers_of(tmp_path / "computed", "--in-process")
    assert served.keys() == computed.keys()
    assert len(served) == 2 * 3 * 5, "stock and hybridkv, three scenes, five questions each"
    differing = {name: (served[name], computed[name]) for name in served if served[name] != computed[name]}
    assert not differing, differing
