"""From answers to result rows: one row a server spec, scene, context and task, or data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality.cases import TASKS, TEXT
from benchmarks.quality.data import score_answers
from benchmarks.quality.intervals import (
    Interval,
    coarse_kl,
    compare_answers,
    count_pairs,
    mcnemar,
    paired_difference,
    wilson,
)
from benchmarks.quality.servers import FULL, HYBRIDKV, STOCK, ServerSpec
from benchmarks.quality.store import Answer, Answers

Row = dict[str, Any]
Group = tuple[str, int | None, str]
"""Scene, context and task; of a data set its collection ("milebench"), no context, and its name ("milebench/WebQA")."""


def name_of(row: Row) -> str:
    """Return compressor and variant in words."""
    return f"{row['compressor']}, {row['variant']}" if row["variant"] else str(row["compressor"])


def title(row: Row) -> str:
    """Return in words what a table is about."""
    if not row["context"]:
        return str(row["scene"])
    if str(row["scene"]).startswith(TEXT):
        return f"{row['scene']}, {row['context']:,} tokens"
    return f"{row['scene']} scenes, {row['context']:,} visual tokens"


def task_order(task: str) -> tuple[int, str]:
    """Sort key: drawn tasks in their order, then data sets by name."""
    return (TASKS.index(task), "") if task in TASKS else (len(TASKS), task)


def group_answers(answers: Answers) -> dict[Group, dict[str, Answer]]:
    """Split answers by scene, context and task, in the order of the tasks."""
    groups: dict[Group, dict[str, Answer]] = {}
    for key, answer in answers.items():
        group: Group
        if "metric" in answer:
            group = answer["task"].split("/")[0], None, answer["task"]
        else:
            scene, context, _, task = key.split("/")
            group = scene, int(context), task
        groups.setdefault(group, {})[key] = answer
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or 0, task_order(item[0][2]))))


def _mean(values: Iterable[float | None], digits: int) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), digits) if known else None


def _record_mean(answers: Iterable[Answer], name: str, digits: int) -> float | None:
    return _mean(((answer["record"] or {}).get(name) for answer in answers), digits)


def pair_up(ours: Answers, theirs: Answers) -> tuple[list[bool], list[bool]]:
    """Return who was right, prompt by prompt, on the prompts with a right answer that both were asked."""
    keys = sorted(key for key in ours.keys() & theirs.keys() if ours[key]["right"] is not None)
    return [ours[key]["right"] for key in keys], [theirs[key]["right"] for key in keys]


def _against(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """Paired difference; empty for the reference itself."""
    mine, other = pair_up(ours, theirs)
    if not mine or all(ours[key] is theirs.get(key) for key in ours):
        return {}
    delta = paired_difference(count_pairs(mine, other))
    names = ("delta_full", "delta_full_low", "delta_full_high")
    return dict(zip(names, (round(value, 4) for value in delta), strict=True))


def _closeness(ours: Answers, stock: Answers) -> dict[str, Any]:
    compared = [
        compare_answers(stock[key]["tokens"], stock[key]["top"], answer["tokens"], answer["top"])
        for key, answer in ours.items()
        if key in stock and answer["top"] and stock[key]["top"]
    ]
    positions = sum(agreement.num_positions for agreement in compared)
    if not positions:
        return {}
    return {
        "top1_agreement": round(sum(agreement.num_same for agreement in compared) / positions, 4),
        "kl": round(sum(agreement.kl_sum for agreement in compared) / positions, 5),
    }


def _same_text(ours: Answers, stock: Answers) -> float | None:
    """Share of the answers that are stock's, token for token; None for stock itself."""
    both = [key for key, answer in ours.items() if key in stock and answer is not stock[key]]
    return _mean((float(ours[key]["tokens"] == stock[key]["tokens"]) for key in both), 4)


def _forced(ours: Answers, stock: Answers) -> dict[str, Any]:
    """Agreement at each token of stock's own free text, which the server was made to write."""
    pairs = [
        (token, expected, found)
        for key, answer in ours.items()
        if key in stock and answer.get("forced_top")
        for token, expected, found in zip(stock[key]["tokens"], stock[key]["top"], answer["forced_top"], strict=True)
    ]
    same = [token == max(found, key=lambda name: found[name]) for token, _, found in pairs]
    return {
        "forced_top1": _mean(map(float, same), 4),
        "forced_kl": _mean((coarse_kl(expected, found) for _, expected, found in pairs), 5),
    }


def kept_share(ours: Answers, stock: Answers) -> Interval | None:
    """Return the share of right answers among the prompts that stock has right; None where it has none right."""
    mine, theirs = pair_up(ours, stock)
    return wilson(sum(a for a, b in zip(mine, theirs, strict=True) if b), sum(theirs)) if any(theirs) else None


def _kept(ours: Answers, stock: Answers) -> dict[str, Any]:
    right = sum(pair_up(ours, stock)[1])
    share = None if all(ours[key] is stock.get(key) for key in ours) else kept_share(ours, stock)
    values = [round(value, 4) for value in share] if share else [None] * 3
    return {"full_right": right if stock else None, **dict(zip(("kept", "kept_low", "kept_high"), values, strict=True))}


def _interval(answers: Answers) -> Interval | None:
    """Share of right answers; None where there are no right ones."""
    judged = [answer["right"] for answer in answers.values() if answer["right"] is not None]
    return wilson(sum(judged), len(judged)) if judged else None


def make_rows(spec: ServerSpec, answers: Answers, others: Sequence[tuple[ServerSpec, Answers]]) -> list[Row]:
    """Return the rows of one server.

    Parameters
    ----------
    answers : what this server answered, by key.
    others : what other servers answered; differences are taken to `full` where it is there, else to stock, and the
        McNemar test against hybridkv with default settings at the same budget.
    """
    by_spec = {(other.compressor, other.budget, other.variant): theirs for other, theirs in others}
    stock = by_spec.get((STOCK, None, ""), {})
    full = by_spec.get((FULL, 1.0, ""), stock)
    hybridkv = by_spec.get((HYBRIDKV, spec.budget, ""), {})
    is_hybridkv = (spec.compressor, spec.variant) == (HYBRIDKV, "")
    rows = []
    for (scene, context, task), group in group_answers(answers).items():
        share = _interval(group)
        exact = [round(value, 4) for value in share] if share else [None] * 3
        mine, theirs = pair_up(group, hybridkv)
        rows.append(
            {
                "compressor": spec.compressor,
                "budget": spec.budget,
                "task": task,
                "scene": scene,
                "prompt_tokens": round(_mean((answer["prompt_tokens"] for answer in group.values()), 0) or 0),
                "n": len(group),
                **dict(zip(("exact_match", "ci_low", "ci_high"), exact, strict=True)),
                "variant": spec.variant,
                "context": context,
                "partial": _mean((answer["partial"] for answer in group.values()), 4),
                "delta_full": None,
                "delta_full_low": None,
                "delta_full_high": None,
                **_against(group, full),
                "p_vs_hybridkv": round(mcnemar(count_pairs(mine, theirs)), 6) if mine and not is_hybridkv else None,
                "top1_agreement": None,
                "kl": None,
                **_closeness(group, stock),
                **_kept(group, stock),
                "same_text": _same_text(group, stock),
                **_forced(group, stock),
                "resident_ratio": _record_mean(group.values(), "resident_ratio", 5),
                "host_bytes": _record_mean(group.values(), "host_bytes", 0),
                "static_heads": _record_mean(group.values(), "static_heads", 2),
                "dynamic_heads": _record_mean(group.values(), "dynamic_heads", 2),
                "config": spec.config,
                **score_answers(group.values()),
            }
        )
    return rows


def lookup_share(answers: Answers, kinds: Sequence[str]) -> Interval:
    """Return the share of right answers over some tasks together."""
    chosen = {key: answer for key, answer in answers.items() if key.rsplit("/", 1)[1] in kinds}
    share = _interval(chosen)
    assert share is not None, f"nothing of {kinds} was asked"
    return share
