"""Named tables: which servers are asked which prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from benchmarks.quality.cases import SECOND_TASKS, TEXT, Cell
from benchmarks.quality.data import Questions
from benchmarks.quality.servers import FULL, HYBRIDKV, STOCK, ServerSpec
from benchmarks.scenes import LOOKUP_KINDS
from benchmarks.texts import FREE_KINDS
from sglang_hybridkv.config import ChunkScore

COMPARED = (
    "hybridkv",
    "snapkv",
    "look-m",
    "madakv",
    "sparsemm",
    "quest",
    "adakv",
    "pyramidkv",
    "tgv-kv",
    "expected-attention",
    "random",
)
HEADLINE_BUDGETS = (0.1, 0.05)
SCENE_TASKS = ("get", "list", "chain", "count", "main")
HEADLINE_CELL = Cell("coherent", 1600, 120, (*SCENE_TASKS, *SECOND_TASKS))
PLAIN_CELL = Cell("coherent", 1600, 40, SCENE_TASKS)
ANSWER_TASKS = ("needle", "price", "crew", "cloze")
TEXT_TASKS = (*ANSWER_TASKS, *FREE_KINDS, *SECOND_TASKS)
"""Tasks without those that SmolLM2 cannot do, compressed or not: "pair", "hop" and "tally"."""
HEADLINE_TEXT_CELLS = (
    Cell(TEXT, 2000, 120, ANSWER_TASKS),
    Cell(TEXT, 2000, 25, (*FREE_KINDS, *SECOND_TASKS)),
)
TEXT_CELLS = (
    *HEADLINE_TEXT_CELLS,
    *(Cell(TEXT, length, n, TEXT_TASKS) for length, n in ((1000, 20), (4000, 20), (7000, 10))),
)
OTHER_CELLS = (
    Cell("coherent", 400, 40, SCENE_TASKS),
    Cell("coherent", 2400, 40, SCENE_TASKS),
    Cell("shuffled", 1600, 40, SCENE_TASKS),
    Cell("page", 1600, 40, ("read",)),
)

Variants = dict[str, dict[str, Any]]
"""Settings of hybridkv by name; "" are the defaults."""

ALL_DYNAMIC: Variants = {
    "all dynamic": {"max_dynamic_heads": 1.0, "long_prompt_dynamic_heads": 1.0, "dynamic_ratio": 1.0}
}
"""Beside `random` the simplest thing to beat."""
HEADLINE_VARIANTS: Variants = {"": {}, **ALL_DYNAMIC}
ABLATION: Variants = {
    "": {},
    "all static": {"theta": 0.0},
    **ALL_DYNAMIC,
    "no head level": {"static_weight": "uniform"},
    "neither level": {"static_weight": "uniform", "dynamic_ratio": 1.0},
    "paper": {"preset": "paper"},
}
THETAS = {
    **dict.fromkeys(("sparsity", "top_mass", "hit_cv", "stability", "capture"), (0.1, 0.3, 0.5, 0.7, 0.9)),
    "worst_capture": (0.001, 0.003, 0.005, 0.01, 0.03),
}


def _one_at_a_time(**values: Sequence[Any]) -> Variants:
    return {f"{name} {value}": {name: value} for name, choices in values.items() for value in choices}


SWEEP: Variants = {
    "": {},
    **{
        f"{statistic} at {theta}": {"statistic": statistic, "theta": theta, "max_dynamic_heads": 1.0}
        for statistic, thetas in THETAS.items()
        for theta in thetas
    },
    **_one_at_a_time(
        preset=("paper",),
        dynamic_share=(0.2, 0.32, 0.5, 0.75, 0.9),
        dynamic_ratio=(1.0, 2.0, 3.0, 4.0),
        max_dynamic_heads=(0.1, 0.25, 0.34, 0.5, 0.68),
        chunk_score=get_args(get_args(ChunkScore)[0]),
        chunk_size=(1, 2, 8),
        page_size=(8, 16, 32),
        static_weight=("sparsity", "density", "uniform"),
        text_share=(0.25, 0.5, 0.75, 1.0),
        pool_kernel=(1, 5, 9),
        capture_fraction=(0.05, 0.1, 0.2),
    ),
    "estimated": {"unretrieved": "estimate", "chunk_score": "mean_max"},
}


@dataclass(frozen=True)
class Preset:
    """A table.

    Attributes
    ----------
    compressors, budgets : every compressor at every budget; stock is always there.
    variants : names of hybridkv's settings that are compared.
    cells : asked of stock, of `full` and at every budget that `cells_at` does not have.
    cells_at : other cells for some budgets; these are fewer.
    """

    compressors: tuple[str, ...]
    budgets: tuple[float, ...]
    cells: tuple[Cell, ...]
    cells_at: dict[float, tuple[Cell, ...]] = dataclasses.field(default_factory=dict)
    variants: Variants = dataclasses.field(default_factory=lambda: {"": {}})


PRESETS = {
    # This one is for continuous integration: lookups only, and few enough for five minutes on two busy cores.
    "smoke": Preset((HYBRIDKV,), (0.1,), (Cell("coherent", 1600, 32, LOOKUP_KINDS),)),
    "headline": Preset((FULL, *COMPARED), HEADLINE_BUDGETS, (HEADLINE_CELL,), variants=HEADLINE_VARIANTS),
    "full": Preset(
        (FULL, *COMPARED),
        (0.1, 0.05, 0.2, 0.5, 1.0),
        (HEADLINE_CELL, *OTHER_CELLS),
        {0.2: (PLAIN_CELL, *OTHER_CELLS), 0.5: (PLAIN_CELL,), 1.0: (PLAIN_CELL,)},
    ),
    "ablation": Preset((FULL, HYBRIDKV), (0.1,), (Cell("coherent", 1600, 60, SCENE_TASKS),), variants=ABLATION),
    "sweep": Preset((FULL, HYBRIDKV), (0.1,), (Cell("coherent", 1600, 40, LOOKUP_KINDS),), variants=SWEEP),
}

TEXT_PRESETS = {
    # This one is for continuous integration, too: it takes minutes, in process.
    "smoke": Preset((HYBRIDKV,), (0.1,), (Cell(TEXT, 1000, 8, ("needle", "price", "crew", "cloze", "summary")),)),
    "headline": Preset(
        (FULL, HYBRIDKV, "snapkv", "quest", "random"),
        HEADLINE_BUDGETS,
        HEADLINE_TEXT_CELLS,
        variants=HEADLINE_VARIANTS,
    ),
    "full": Preset((FULL, *(name for name in COMPARED if name != "sparsemm")), (0.1, 0.05, 0.2), TEXT_CELLS),
}
"""Compressors for models of text, with real weights. sparsemm is left out: its calibration is about images."""

Plan = list[tuple[ServerSpec, Sequence[Questions]]]


@dataclass(frozen=True)
class Choices:
    """What the user gives in place of the preset's; None, or nothing listed, leaves the preset's.

    Attributes
    ----------
    n : scenes of each cell.
    split : half of the texts.
    """

    compressors: Sequence[str] | None = None
    budgets: Sequence[float] | None = None
    tasks: Sequence[str] | None = None
    scenes: Sequence[str] | None = None
    contexts: Sequence[int] | None = None
    n: int | None = None
    split: str | None = None
    variants: Variants | None = None

    def cells(self, usual: Sequence[Cell]) -> list[Cell]:
        """The preset's `usual` cells with these choices in their place; cells that it does not have are made."""
        usual_tasks = {"page": ("read",), TEXT: TEXT_TASKS}
        chosen = []
        for scene in self.scenes or dict.fromkeys(cell.scene for cell in usual):
            sizes = [cell.context for cell in usual if cell.scene == scene] or [2000 if scene == TEXT else 1600]
            for context in self.contexts or dict.fromkeys(sizes):
                known = [cell for cell in usual if (cell.scene, cell.context) == (scene, context)]
                known = known or [Cell(scene, context, 40, usual_tasks.get(scene, SCENE_TASKS))]
                # All tasks that the user names are asked of as many scenes as the first.
                for cell in known[:1] if self.tasks else known:
                    half = self.split if self.split and scene == TEXT else cell.split
                    tasks = tuple(self.tasks or cell.tasks)
                    chosen.append(dataclasses.replace(cell, tasks=tasks, n=self.n or cell.n, split=half))
        return chosen


def build_plan(preset: Preset, choices: Choices) -> Plan:
    """Return the servers in the order in which they run, each with its cells.

    Baselines come first, hybridkv next: the rows of the others compare with them.
    """
    names = [name for name in (choices.compressors or preset.compressors) if name != STOCK]
    for budget in choices.budgets or ():
        if not 0 < budget <= 1:
            raise ValueError(f"--budgets: expected numbers above 0 and at most 1, got {budget:g}")
    cells = choices.cells(preset.cells)
    plan: Plan = [(ServerSpec(STOCK), cells)]
    if FULL in names:
        plan.append((ServerSpec(FULL, 1.0), cells))
    for name in sorted((name for name in names if name != FULL), key=lambda name: name != HYBRIDKV):
        for budget in choices.budgets or preset.budgets:
            own = choices.cells(preset.cells_at.get(budget, preset.cells))
            variants = (choices.variants or preset.variants) if name == HYBRIDKV else {"": {}}
            for variant, config in variants.items():
                plan.append((ServerSpec(name, budget, config, variant), own))
    return plan
