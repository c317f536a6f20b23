"""Published data sets in place of drawn scenes: their questions, their answers scored, what a store holds of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.datasets import Case, load_cases, score_cases
from benchmarks.metrics import score
from benchmarks.quality.cases import Cell, DrawText, Exchange, make_exchanges
from benchmarks.quality.servers import add_file
from benchmarks.quality.store import Answer, read_answers
from benchmarks.scenes import Question

MAX_TOKENS = 64
RIGHT_OR_WRONG = ("exact_match", "multiple_choice")
"""Metrics that decide by themselves whether an answer is right; with the others it is right when it is exact."""


@dataclass(frozen=True)
class DataSet:
    """Questions of one data set.

    Attributes
    ----------
    max_tokens : tokens of the longest answer.
    """

    cases: tuple[Case, ...]
    max_tokens: int = MAX_TOKENS

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.cases)


@dataclass(frozen=True)
class CaseExchange(Exchange):
    """A question of a data set. Its messages, with the pictures in them, are made when it is."""

    case: Case | None = None


Questions = Cell | DataSet


def make_case_exchanges(data: DataSet, index: int, skip: Container[str]) -> Iterator[CaseExchange]:
    """Yield question number `index`, unless its key is in `skip`."""
    case = data.cases[index]
    if case.key not in skip:
        example = case.example
        question = Question(example.task, example.question, example.answers[0])
        yield CaseExchange(case.key, None, case.messages(), question, case=case)


def exchanges_of(
    seed: int, cell: Questions, index: int, skip: Container[str], draw: DrawText | None = None
) -> Iterator[Exchange]:
    """Yield the questions about one scene, text or case of a data set; see `make_exchanges`."""
    if isinstance(cell, DataSet):
        return make_case_exchanges(cell, index, skip)
    return make_exchanges(seed, cell, index, skip, draw)


@functools.cache
def case_digest(case: Case) -> str:
    """Return a digest of a question: its text, its right answers, its metric and its files."""
    example = case.example
    digest = hashlib.sha256(repr((example.question, example.answers, example.metric)).encode())
    for path in (*example.images, *([example.video] if example.video else [])):
        add_file(digest, path)
    return digest.hexdigest()[:16]


def score_case(case: Case, said: str) -> Answer:
    """Return what is kept of an answer beside what is kept of every one."""
    example = case.example
    metric = example.metric if example.metric in RIGHT_OR_WRONG else "exact_match"
    return {
        "right": score(metric, [said], [example.answers]) == 1,
        "partial": None,
        "task": example.task,
        "metric": example.metric,
        "references": list(example.answers),
        "digest": case_digest(case),
    }


def score_answers(answers: Iterable[Answer]) -> dict[str, Any]:
    """Return metric and score of the answers to one task; nothing for those about drawn scenes."""
    kept = list(answers)
    if "metric" not in kept[0]:
        return {}
    metric = kept[0]["metric"]
    value = score(metric, [answer["said"] for answer in kept], [tuple(answer["references"]) for answer in kept])
    return {"metric": metric, "score": round(value, 4)}


def load_data(arguments: Sequence[str], limit: int | None, max_tokens: int) -> list[DataSet]:
    """Read what --data names.

    Parameters
    ----------
    arguments : NAME=FOLDER each; see `benchmarks.datasets.load`.
    limit : questions of each set; None takes all.

    Raises
    ------
    ValueError
        Unknown name, corrupt file, the same set twice, or the library of a metric is missing: found now, not after the
        servers have answered.
    """
    sets: list[DataSet] = []
    seen: set[str] = set()
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--data: expected NAME=FOLDER, got {argument!r}")
        try:
            cases = load_cases(name, Path(folder), limit)
            score_cases(cases, [case.example.answers[0] for case in cases])
        except ValueError as error:
            raise ValueError(f"--data {name}: {error}") from None
        twice = next((case for case in cases if case.key in seen), None)
        if twice is not None:
            raise ValueError(f"--data {name}: {twice.example.task} is given more than once")
        seen.update(case.key for case in cases)
        sets.append(DataSet(tuple(cases), max_tokens))
    return sets


def check_stored(folder: Path, sets: Sequence[DataSet]) -> None:
    """Raise ValueError when a store has answers to other questions, or about other pictures, under the same keys."""
    cases = {case.key: case for data in sets for case in data.cases}
    for _, answers in read_answers(folder):
        for key in answers.keys() & cases.keys():
            if answers[key]["digest"] != case_digest(cases[key]):
                raise ValueError(
                    f"--out: {folder} holds an answer to {key} with another text or other files; use another folder"
                )
