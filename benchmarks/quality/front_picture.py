"""Draw the pictures of README.md and docs/quality.md from the committed rows.

``python -m benchmarks.quality.front_picture`` writes them to docs/images.

What they show is *kept*: of the questions that stock answers right, how many a compressed cache still answers right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.quality.intervals import wilson
from benchmarks.quality.plots import MARKERS, common_tasks
from benchmarks.quality.rows import Row, name_of, title
from benchmarks.quality.servers import HYBRIDKV, STOCK

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "bench_quality_in_process.jsonl"
IMAGES = ROOT / "docs" / "images"
BUDGETS = (0.05, 0.1)
FRONT_METHODS = (HYBRIDKV, "snapkv", "quest", "adakv", "random")
VARIANTS = ("", "all dynamic")
MODELS = {
    "smollm2": "SmolLM2-135M, texts of 2,000 tokens",
    "reader": "the same weights, texts as pictures",
    "tiny-qwen2_5_vl-scenes": "tiny Qwen2.5-VL trained here, drawn scenes",
}
IMAGE_NAMES = {"smollm2": "kept-smollm2.png", "reader": "kept-reader.png", "tiny-qwen2_5_vl-scenes": "kept-scenes.png"}
FRONT_IMAGE = "front.png"


def read_newest(path: Path) -> list[Row]:
    """Return the rows of the models, for each server, scene and task the last one of the file."""
    newest: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["model"] in MODELS and row["variant"] in VARIANTS:
            names = ("model", "scene", "context", "compressor", "budget", "variant", "task")
            newest[tuple(row[name] for name in names)] = row
    return list(newest.values())


def count_kept(rows: Iterable[Row]) -> tuple[int, int]:
    """Return how many of stock's right answers stay right, over all rows, and how many there are."""
    counted = [row for row in rows if row["kept"] is not None]
    num_kept = sum(round(row["kept"] * row["full_right"]) for row in counted)
    return num_kept, sum(row["full_right"] for row in counted)


def resident(rows: Sequence[Row]) -> float:
    """Return the mean share of stock's device KV that requests hold."""
    ratios = [row["resident_ratio"] for row in rows if row["resident_ratio"] is not None]
    return sum(ratios) / len(ratios)


def _servers(rows: Sequence[Row]) -> dict[str, dict[float, list[Row]]]:
    """Rows by name of the server and budget; hybridkv first, stock left out."""
    servers: dict[str, dict[float, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (row["compressor"] != HYBRIDKV, name_of(row), row["budget"] or 0.0)):
        if row["compressor"] != STOCK:
            servers.setdefault(name_of(row), {}).setdefault(row["budget"], []).append(row)
    return servers


def _percent(rows: Iterable[Row]) -> tuple[float, tuple[float, float]]:
    """Kept answers in per cent, and how far their Wilson interval reaches down and up."""
    share = wilson(*count_kept(rows))
    return 100 * share.value, (100 * (share.value - share.low), 100 * (share.high - share.value))


def draw_front(rows: Sequence[Row], path: Path) -> Path:
    """Draw kept answers over resident memory, by budget: a column a model, a bar a method."""
    colours = matplotlib.colormaps["tab10"]
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    figure = Figure(figsize=(4.2 * len(models), 5.2), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False)
    for (above, below), model in zip(axes.T, models, strict=True):
        of_model = [row for row in rows if row["model"] == model and row["compressor"] in (*FRONT_METHODS, STOCK)]
        servers = _servers(common_tasks([row for row in of_model if not row["variant"]]))
        methods = [name for name in FRONT_METHODS if name in servers]
        width = 0.8 / len(methods)
        for i, name in enumerate(methods):
            for j, budget in enumerate(BUDGETS):
                group = servers[name][budget]
                value, reach = _percent(group)
                where = j + (i - (len(methods) - 1) / 2) * width
                bar = {"width": width, "color": colours(FRONT_METHODS.index(name)), "label": name if j == 0 else None}
                above.bar(where, value, **bar)
                above.errorbar(where, value, [[side] for side in reach], color="black", linewidth=1, capsize=2)
                below.bar(where, 100 * resident(group), **bar)
                below.text(where, 100 * resident(group) + 2, f"{100 * resident(group):.0f}", ha="center", fontsize=7)
        for axis in (above, below):
            axis.bar(len(BUDGETS), 100, width=width, color="grey", label="stock SGLang")
            axis.set_xticks(range(len(BUDGETS) + 1), [*(f"budget {budget:g}" for budget in BUDGETS), "stock"])
            axis.set_ylim(0, 108)
        above.set_title(MODELS[model], fontsize=10)
    axes[0][0].set_ylabel("right answers kept, %")
    axes[1][0].set_ylabel("KV memory on the device, %")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    for axis in axes[0][:-1]:
        known |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = [name for name in (*FRONT_METHODS, "stock SGLang") if name in known]
    figure.legend([known[name] for name in order], order, loc="outside lower center", ncols=len(order), fontsize=9)
    figure.savefig(path, dpi=110)
    return path


def draw_model(rows: Sequence[Row], path: Path) -> Path:
    """Draw kept answers against resident memory for one model: a panel a scene, a curve a method, Wilson intervals."""
    scenes = sorted({row["scene"] for row in rows})
    figure = Figure(figsize=(5.0 * len(scenes), 4.0), layout="constrained")
    axes = figure.subplots(1, len(scenes), squeeze=False)[0]
    # One look for a method in all panels.
    looks = {name: i for i, name in enumerate(_servers(rows))}
    for axis, scene in zip(axes, scenes, strict=True):
        of_scene = [row for row in rows if row["scene"] == scene]
        for name, by_budget in _servers(common_tasks(of_scene)).items():
            i = looks[name]
            xs = [100 * resident(group) for group in by_budget.values()]
            ys, reaches = zip(*map(_percent, by_budget.values()), strict=True)
            style = {"marker": MARKERS[i], "color": matplotlib.colormaps["tab10"](i), "capsize": 2, "label": name}
            axis.errorbar(xs, ys, list(zip(*reaches, strict=True)), linewidth=2 if name == HYBRIDKV else 1, **style)
        axis.axhline(100, color="grey", linewidth=1, linestyle="--")
        axis.set(title=title(of_scene[0]), xlabel="KV memory on the device, % of stock", ylim=(-3, 105), xlim=(0, 20))
    axes[0].set_ylabel("right answers kept, %")
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    """Draw all pictures into docs/images."""
    argparse.ArgumentParser(prog="python -m benchmarks.quality.front_picture", description=__doc__).parse_args()
    IMAGES.mkdir(exist_ok=True)
    rows = read_newest(RESULTS)
    print(draw_front(rows, IMAGES / FRONT_IMAGE).relative_to(ROOT))
    for model, name in IMAGE_NAMES.items():
        print(draw_model([row for row in rows if row["model"] == model], IMAGES / name).relative_to(ROOT))


if __name__ == "__main__":
    main()
