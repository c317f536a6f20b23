"""Tables and plots of the answers in a store, or of result rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.quality.cases import TEXT
from benchmarks.quality.data import RIGHT_OR_WRONG
from benchmarks.quality.rows import Row, make_rows, name_of, task_order, title
from benchmarks.quality.servers import FULL, HYBRIDKV, STOCK
from benchmarks.quality.store import read_answers

BEGIN = "<!-- written by bench_quality report -->"
END = "<!-- end of what it writes -->"
_FIRST = (STOCK, FULL, HYBRIDKV)


def _order(row: Row) -> tuple[int, str, str, float]:
    name = row["compressor"]
    rank = _FIRST.index(name) if name in _FIRST else len(_FIRST)
    return rank, name, row["variant"], -(row["budget"] or 1.0)


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of everything in a store, baselines first."""
    stored = read_answers(folder)
    if not stored:
        raise ValueError(f"--out: {folder} holds no answers; run python -m benchmarks.bench_quality --out first")
    rows = [row for spec, answers in stored for row in make_rows(spec, answers, stored)]
    return sorted(rows, key=_order)


def tables(rows: Sequence[Row]) -> dict[tuple[str, int | None], list[Row]]:
    """Group rows by scene and context: one table each."""
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["scene"], row["context"] or 0, _order(row))):
        groups.setdefault((row["scene"], row["context"]), []).append(row)
    return groups


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.get("metric", RIGHT_OR_WRONG[0]) not in RIGHT_OR_WRONG:
        return f"{row['score']:.3f} {row['metric']}"
    if row["exact_match"] is None:
        return "" if row["same_text"] is None else f"{row['same_text']:.2f} same, {row['forced_top1'] or 0:.3f} top-1"
    worse = row["delta_full_high"] is not None and row["delta_full_high"] < 0
    # Where a model fails often, the share of stock's right answers that stay right says more than a share of all.
    is_text = str(row["scene"]).startswith(TEXT) and row["kept"] is not None
    kept = f" kept {round(row['kept'] * row['full_right'])} of {row['full_right']}" if is_text else ""
    return f"{row['exact_match']:.3f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]" + (" ▼" if worse else "") + kept


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean_kl(rows: Iterable[Row], field: str) -> str:
    values = [row[field] for row in rows if row[field] is not None]
    return f"{fmean(values):.3f}" if values else ""


def _table(rows: Sequence[Row], heading: str) -> list[str]:
    tasks = sorted({row["task"] for row in rows}, key=task_order)
    servers: dict[tuple[str, float | None], dict[str, Row]] = {}
    for row in rows:
        servers.setdefault((name_of(row), row["budget"]), {})[row["task"]] = row
    tokens = sorted({row["prompt_tokens"] for row in rows})
    between = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
    has_free = any(row["forced_kl"] is not None for row in rows)
    divergences = ["KL", *(["KL of free text"] if has_free else [])]
    lines = [f"{heading} {title(rows[0])} ({between} prompt tokens)", ""]
    lines.append(_line(["compressor", "budget", "n", *tasks, *divergences, "resident"]))
    lines.append(_line(["---"] * (4 + len(tasks) + len(divergences))))
    for (name, budget), by_task in servers.items():
        ratios = [row["resident_ratio"] for row in by_task.values() if row["resident_ratio"]]
        resident = fmean(ratios) if ratios else None
        counts = sorted({row["n"] for row in by_task.values()})
        n = "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        cells = [_cell(by_task.get(task)) for task in tasks]
        answers = [row for row in by_task.values() if row["exact_match"] is not None]
        free = [row for row in by_task.values() if row["exact_match"] is None]
        cells += [_mean_kl(answers, "kl"), *([_mean_kl(free, "forced_kl")] if has_free else [])]
        lines.append(_line([name, "" if budget is None else f"{budget:g}", n, *cells, _percent(resident)]))
    return [*lines, ""]


def markdown(rows: Sequence[Row], heading: str = "###") -> str:
    """Return all tables. Exact match with its 95 % Wilson interval; ▼ where it is below full, paired, at 95 %.

    KL is the mean over the tasks, `kl` of those with an answer and `forced_kl` of free text.
    """
    lines: list[str] = []
    for group in tables(rows).values():
        lines += _table(group, heading)
    return "\n".join(lines)


def write_markdown(text: str, path: Path) -> None:
    """Write the tables: between the two marks where the file has them, else as the whole file."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    head, start, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    marked = bool(start and end)
    path.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}" if marked else text, encoding="utf-8")


def write_report(folder: Path) -> tuple[str, list[Path]]:
    """Draw all plots into the store's folder; return the tables and the plots' paths."""
    from benchmarks.quality import plots

    rows = read_rows(folder)
    paths = []
    for (scene, context), group in tables(rows).items():
        name = f"{scene}-{context}" if context else scene
        paths.append(plots.draw_curves(group, "budget", "budget", folder / f"accuracy-{name}.png"))
        memory = "device KV, share of stock"
        paths.append(plots.draw_curves(group, "resident_ratio", memory, folder / f"memory-{name}.png"))
        by_task = {row["task"]: [other for other in group if other["task"] == row["task"]] for row in group}
        for task, alone in by_task.items() if len(by_task) > 1 else ():
            if alone[0]["exact_match"] is not None or "score" in alone[0]:
                # A task of a collection is "collection/task", which is the plot's name already.
                path = folder / f"accuracy-{name}-{task.rpartition('/')[2]}.png"
                paths.append(plots.draw_curves(alone, "budget", "budget", path))
    return markdown(rows), paths
