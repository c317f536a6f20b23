"""Answers on disk: one JSONL file a server spec, one line an answer, never lost and never asked twice."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.servers import ServerSpec

META_FILE = "run.json"
ANSWERS = "answers"

Answer = dict[str, Any]
"""key, question, answer, said, right (null without a right answer), partial, prompt_tokens, record, tokens, top; of
free text also ids and forced_top; of a data set also task, metric, references, digest."""
Answers = Mapping[str, Answer]


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of a file, and the bytes that they take; a last line that was cut off is left out."""
    raw = path.read_bytes()
    lines: list[dict[str, Any]] = []
    good = 0
    pieces = raw.splitlines(keepends=True)
    for number, piece in enumerate(pieces, start=1):
        try:
            value = json.loads(piece)
            whole = piece.endswith(b"\n") and isinstance(value, dict) and ("key" in value) == (number > 1)
        except ValueError:
            whole = False
        if not whole:
            if number == len(pieces):
                break
            raise ValueError(f"{path}: line {number} is not an answer; delete that line, or the file, and start again")
        lines.append(value)
        good += len(piece)
    return lines, good


class AnswerFile:
    """Answers of one server: read on entry, then appended to line by line; safe to append to from several threads.

    Attributes
    ----------
    spec : server that answered.
    answers : what it answered, by key.
    """

    def __init__(self, folder: Path, spec: ServerSpec) -> None:
        self.path = folder / ANSWERS / f"{spec.slug}.jsonl"
        self.spec = spec
        self.answers: dict[str, Answer] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> AnswerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        if self.path.exists():
            lines, size = _parse(self.path)
            self.answers = {line["key"]: line for line in lines[1:]}
        self._out = self.path.open("ab")
        self._out.truncate(size)
        if size == 0:
            self._write({"spec": dataclasses.asdict(self.spec)})
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._out.close()

    def _write(self, value: dict[str, Any]) -> None:
        self._out.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        self._out.flush()

    def append(self, answer: Answer) -> None:
        """Keep an answer; it is in the file when this returns."""
        with self._lock:
            self._write(answer)
            self.answers[answer["key"]] = answer


def read_answers(folder: Path) -> list[tuple[ServerSpec, dict[str, Answer]]]:
    """Return all specs of a store with their answers by key."""
    found = []
    for path in sorted((folder / ANSWERS).glob("*.jsonl")):
        lines, _ = _parse(path)
        if lines:
            found.append((ServerSpec(**lines[0]["spec"]), {line["key"]: line for line in lines[1:]}))
    return found


def open_store(folder: Path, identity: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
    """Make the folder, or check that its answers belong to this run.

    Parameters
    ----------
    identity : model, code and seed: what every answer in the folder depends on.
    ignore : names of `identity` that may differ.

    Raises
    ------
    ValueError
        The folder cannot be written, or holds answers of another model, code or seed.
    """
    path = folder / META_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        known = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be written: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"--out: {path} is not JSON; use another folder") from None
    for name, value in identity.items():
        if name not in ignore and known.get(name) != value:
            raise ValueError(
                f"--out: {folder} holds answers of another {name} ({known.get(name)}, this is {value}); "
                "use another folder"
            )
