"""Plots of result rows: accuracy against budget, and against memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.quality.cases import SECOND_TASKS
from benchmarks.quality.rows import Row, name_of, title
from benchmarks.quality.servers import FULL, HYBRIDKV, STOCK
from benchmarks.texts import FREE_KINDS

BASELINES = (STOCK, FULL)
MARKERS = "osD^v<>Pp*XhHd"


class Point(NamedTuple):
    """One place of a curve: where, how high, and how far its 95 % interval reaches down and up, 0 where it has none."""

    place: float
    value: float
    down: float
    up: float


def _curves(rows: Sequence[Row], field: str) -> dict[str, list[Point]]:
    """Mean exact match, or score of data sets, over the tasks of each compressor, by place on the horizontal axis."""
    points: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        if row["compressor"] not in BASELINES and row["budget"] is not None:
            points.setdefault(name_of(row), {}).setdefault(row["budget"], []).append(row)
    curves: dict[str, list[Point]] = {}
    for name, by_budget in points.items():
        for budget in sorted(by_budget):
            group = by_budget[budget]
            places = [row[field] for row in group if row[field] is not None]
            if places:
                point = Point(float(np.mean(places)), _mean_match(group), *_reach(group))
                curves.setdefault(name, []).append(point)
    return curves


def _mean_match(rows: Sequence[Row]) -> float:
    return float(np.mean([row.get("score", row["exact_match"]) for row in rows]))


def _reach(rows: Sequence[Row]) -> tuple[float, float]:
    """How far the interval of the mean over independent tasks reaches, from those of the tasks.

    Source: the method of variance estimates recovery, Donner and Zou 2012. Scores that are no share of right answers
    have no interval.
    """
    if any("score" in row or row["ci_low"] is None for row in rows):
        return 0.0, 0.0
    down, up = (math.hypot(*(row["exact_match"] - row[end] for row in rows)) for end in ("ci_low", "ci_high"))
    return down / len(rows), up / len(rows)


def _prompts(rows: Sequence[Row]) -> str:
    """``n = 40`` or ``n = 40 to 60``: prompts behind a point."""
    totals: dict[tuple[str, float | None], int] = {}
    for row in rows:
        key = (name_of(row), row["budget"])
        totals[key] = totals.get(key, 0) + row["n"]
    least, most = min(totals.values()), max(totals.values())
    return f"n = {least}" if least == most else f"n = {least} to {most}"


def draw_curves(rows: Sequence[Row], field: str, label: str, path: Path) -> Path:
    """Draw exact match against a field of the rows, with 95 % intervals; a curve a compressor, stock and full as lines.

    `rows` of several tasks are averaged over those that every server was asked.
    """
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    measure = "score" if "score" in rows[0] else "exact match"
    rows = common_tasks(rows) or rows
    tasks = sorted({row["task"] for row in rows})
    axes.set_title(f"{title(rows[0])}, {tasks[0] if len(tasks) == 1 else f'{len(tasks)} tasks'}, {_prompts(rows)}")
    for i, (name, curve) in enumerate(_curves(rows, field).items()):
        # Strong colours first, then their pale twins.
        colour = matplotlib.colormaps["tab20"]((2 * i + i // 10) % 20)
        own = name.split(",")[0] == HYBRIDKV
        style = {"linewidth": 2.5 if own else 1.2, "markersize": 7 if own else 5, "zorder": 3 if own else 2}
        places, values, down, up = zip(*curve, strict=True)
        style |= {"marker": MARKERS[i % len(MARKERS)], "color": colour, "label": name, "elinewidth": 1, "capsize": 2}
        axes.errorbar(places, values, (down, up), **style)
    for name, dashes in zip(BASELINES, ("--", ":"), strict=True):
        group = [row for row in rows if row["compressor"] == name]
        if group:
            axes.axhline(_mean_match(group), color="black", linestyle=dashes, linewidth=1, label=name)
    mean = measure if len(tasks) == 1 else f"{measure}, mean over the tasks asked of all"
    axes.set(xlabel=f"{label} (logarithmic)", ylabel=mean, xscale="log", ylim=(-0.03, 1.03))
    ticks = sorted({row["budget"] for row in rows if row["budget"] is not None and row["compressor"] != FULL})
    axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    return path


def common_tasks(rows: Sequence[Row]) -> list[Row]:
    """Rows of the tasks that every server was asked.

    Second questions are left out, as they are not about the budget, and free text, as it is neither right nor wrong.
    """
    asked: dict[tuple[str, float | None], set[str]] = {}
    for row in rows:
        asked.setdefault((name_of(row), row["budget"]), set()).add(row["task"])
    common = set.intersection(*asked.values()) - {*SECOND_TASKS, *FREE_KINDS}
    return [row for row in rows if row["task"] in common]
