"""Data sets by name, and what a benchmark asks and scores."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.datasets.base import Example, chat_message
from benchmarks.datasets.milebench import PAPER_SETS, load_set
from benchmarks.datasets.video import load_nextqa_mc, load_nextqa_oe, load_vatex, load_video_chatgpt
from benchmarks.metrics import score

MILEBENCH = "milebench"
VIDEO_SETS: dict[str, Callable[[Path], Iterator[Example]]] = {
    "vatex": load_vatex,
    "nextqa-mc": load_nextqa_mc,
    "nextqa-oe": load_nextqa_oe,
    "video-chatgpt": load_video_chatgpt,
}


@dataclass(frozen=True)
class Case:
    """A question as a benchmark asks it; `key` is unique among all data sets."""

    key: str
    example: Example

    def messages(self) -> list[dict[str, Any]]:
        """Make the messages of the request; reads the pictures, or the video, each time."""
        return [chat_message(self.example)]


def dataset_names() -> list[str]:
    """Return the names that `load` takes. Others of MileBench's sets go as milebench/NAME, too."""
    return [MILEBENCH, *(f"{MILEBENCH}/{name}" for name in PAPER_SETS), *VIDEO_SETS]


def load(name: str, folder: Path, limit: int | None = None) -> list[Example]:
    """Read the questions of a data set from a local folder.

    Parameters
    ----------
    name : one of `dataset_names`. "milebench" stands for those sets of the paper that the folder has.
    folder : where its files are; see the modules of this package for the layouts.
    limit : the first so many of each set; None takes all.

    Raises
    ------
    ValueError
        Unknown name, missing or corrupt file, record or field; the message names them.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: expected at least 1, or None for all")
    if not folder.is_dir():
        raise ValueError(f"folder = {folder}: there is no such folder")
    examples = list(_load_all(name, folder, limit))
    if not examples:
        raise ValueError(f"folder = {folder}: no question for {name}")
    return examples


def _load_all(name: str, folder: Path, limit: int | None) -> Iterator[Example]:
    if name == MILEBENCH:
        sets = [one for one in PAPER_SETS if (folder / one).is_dir()]
        if not sets:
            raise ValueError(f"folder = {folder}: expected folders of MileBench such as {', '.join(PAPER_SETS)}")
        for one in sets:
            yield from itertools.islice(load_set(folder, one), limit)
    elif name.startswith(f"{MILEBENCH}/"):
        yield from itertools.islice(load_set(folder, name.removeprefix(f"{MILEBENCH}/")), limit)
    elif name in VIDEO_SETS:
        yield from itertools.islice(VIDEO_SETS[name](folder), limit)
    else:
        raise ValueError(f"data set = {name!r}: expected one of {', '.join(dataset_names())}")


def load_cases(name: str, folder: Path, limit: int | None = None) -> list[Case]:
    """Read a data set as cases; arguments and errors as for `load`."""
    cases = [Case(f"{example.task}/{example.id}", example) for example in load(name, folder, limit)]
    seen: set[str] = set()
    for case in cases:
        if case.key in seen:
            raise ValueError(f"folder = {folder}: two questions of {name} have the id {case.key!r}")
        seen.add(case.key)
    return cases


def score_cases(cases: Sequence[Case], answers: Sequence[str]) -> dict[str, float]:
    """Score one answer a case, by the metric of each task; returns task -> score from 0 to 1."""
    if len(cases) != len(answers):
        raise ValueError(f"answers: expected one for each of the {len(cases)} cases, got {len(answers)}")
    by_task: defaultdict[tuple[str, str], list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
    for case, answer in zip(cases, answers, strict=True):
        by_task[case.example.task, case.example.metric].append((answer, case.example.answers))
    return {
        task: score(metric, [said for said, _ in pairs], [right for _, right in pairs])
        for (task, metric), pairs in by_task.items()
    }
