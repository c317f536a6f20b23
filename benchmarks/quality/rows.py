"""From answers to result rows: one row a server spec, scene, context and task, or data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality.cases import TASKS
from benchmarks.quality.data import score_answers
from benchmarks.quality.servers import FULL, HYBRIDKV, STOCK, ServerSpec
from benchmarks.quality.statistics import Interval, compare_answers, count_pairs, mcnemar, paired_difference, wilson
from benchmarks.quality.store import Answer

Row = dict[str, Any]
Answers = Mapping[str, Answer]
Group = tuple[str, int | None, str]
"""Scene, context, task; for a data set its collection ("milebench"), no context, and its name ("milebench/WebQA")."""


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
    """Return who was right, prompt by prompt, on the prompts that both were asked."""
    keys = sorted(ours.keys() & theirs.keys())
    return [ours[key]["right"] for key in keys], [theirs[key]["right"] for key in keys]


def _against(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """Paired difference; nothing to say of the reference itself."""
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


def _interval(answers: Answers) -> Interval:
    return wilson(sum(answer["right"] for answer in answers.values()), len(answers))


def make_rows(spec: ServerSpec, answers: Answers, others: Sequence[tuple[ServerSpec, Answers]]) -> list[Row]:
    """Return the rows of one server.

    Parameters
    ----------
    answers : of this server, by key.
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
        mine, theirs = pair_up(group, hybridkv)
        rows.append(
            {
                "compressor": spec.compressor,
                "budget": spec.budget,
                "task": task,
                "scene": scene,
                "prompt_tokens": round(_mean((answer["prompt_tokens"] for answer in group.values()), 0) or 0),
                "n": len(group),
                "exact_match": round(share.value, 4),
                "ci_low": round(share.low, 4),
                "ci_high": round(share.high, 4),
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
    return _interval(chosen)
