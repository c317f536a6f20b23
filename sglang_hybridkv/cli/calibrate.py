"""``hybridkv calibrate``: compute a model's visual-head scores, keep what is done, go on after an interruption."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from sglang_hybridkv.cli.samples import Sample, SampleSource
from sglang_hybridkv.cli.vision_model import Observation
from sglang_hybridkv.cli.visual_heads import score_hits
from sglang_hybridkv.compressors.calibration import CalibratedModel, Calibration

PARTIAL_FORMAT, PARTIAL_KIND = 1, "visual_head_sums"
PARTIAL_SUFFIX = ".partial"


class Observer(Protocol):
    """What calibration needs of a model."""

    facts: CalibratedModel

    def observe(self, sample: Sample) -> Observation: ...


def partial_path(out: Path) -> Path:
    """Where unfinished work is kept: beside `out`."""
    return out.with_name(out.name + PARTIAL_SUFFIX)


def write_json(path: Path, value: Any) -> None:
    """Write a file in one step: it is whole, or as it was before. ValueError when it cannot be written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        scratch.write_text(json.dumps(value) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        given = str(path).removesuffix(PARTIAL_SUFFIX)
        raise ValueError(f"--out = {given}: cannot be written ({error.strerror or error})") from None
    finally:
        scratch.unlink(missing_ok=True)


def calibrate(
    load_model: Callable[[], Observer],
    facts: CalibratedModel,
    samples: SampleSource,
    out: Path,
    *,
    top_of: str = "visual",
    resume: bool = False,
    on_progress: Callable[[int], None] = lambda num_done: None,
) -> dict[str, Any]:
    """Score the heads on all samples and write `out`.

    Parameters
    ----------
    load_model : called once, and not at all when every argument but the model turned out wrong.
    resume : go on from the file of unfinished work beside `out`, if there is one.
    on_progress : called with the number of samples done, first with those done before, once nothing but the samples
        can go wrong.

    Returns
    -------
    dict
        What was written; `scores` [layers][KV heads] >= 0.

    Raises
    ------
    ValueError
        `out` cannot be written; there is unfinished work and `resume` is off, or it is that of another run; all
        scores are 0.

    Notes
    -----
    After each sample the sums are written beside `out`, in one step: an interruption loses one sample at most, and a
    resumed run adds the same numbers in the same order.
    """
    settings = {"model": facts.model_dump(), "samples": samples.identity, "num_samples": len(samples)}
    settings["top_of"] = top_of
    if out.is_dir():
        raise ValueError(f"--out = {out}: it is a folder; expected a file name")
    sums, num_done = _start(out, settings, facts, resume)
    model = load_model() if num_done < len(samples) else None
    on_progress(num_done)
    if model is not None:
        for sample_idx in range(num_done, len(samples)):
            sums += _score_sample(model, samples[sample_idx])
            _keep(out, settings, sums, sample_idx + 1)
            on_progress(sample_idx + 1)
    if not sums.any():
        partial_path(out).unlink()
        raise ValueError(
            f"no head looked at a word of the {len(samples)} samples, so there is nothing to write to {out}"
        )
    scores = (sums / len(samples)).tolist()
    written = Calibration(
        format=1, kind="visual_head_scores", model=facts, scores=scores, num_samples=len(samples)
    ).model_dump()
    write_json(out, written)
    partial_path(out).unlink()
    return written


def _score_sample(model: Observer, sample: Sample) -> torch.Tensor:
    """[layers, KV heads], fp64: mean over the query heads of each KV head."""
    seen = model.observe(sample)
    scores = score_hits(seen.top_LHT, seen.words, sample.boxes, seen.grid)
    return scores.view(len(scores), model.facts.num_kv_heads, -1).mean(-1)


def _start(out: Path, settings: dict[str, Any], facts: CalibratedModel, resume: bool) -> tuple[torch.Tensor, int]:
    """Sums so far, and of how many samples."""
    path, shape = partial_path(out), (facts.num_layers, facts.num_kv_heads)
    if path.exists() and not resume:
        raise ValueError(f"--out = {out}: {path} holds unfinished work; go on with --resume, or delete it")
    if not path.exists():
        sums = torch.zeros(shape, dtype=torch.float64)
        _keep(out, settings, sums, 0)
        return sums, 0
    partial = _read_partial(path)
    for name, value in settings.items():
        if partial["settings"].get(name) != value:
            was = partial["settings"].get(name)
            raise ValueError(f"--resume: {path} was begun with {name} = {was!r}, now it is {value!r}")
    sums, num_done = torch.tensor(partial["sums"], dtype=torch.float64), partial["num_done"]
    if sums.shape != shape or not 0 <= num_done <= settings["num_samples"]:
        raise ValueError(f"--resume: {path} is corrupt; delete it and start again")
    return sums, num_done


def _read_partial(path: Path) -> dict[str, Any]:
    try:
        partial: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        legal = (
            (partial["format"], partial["kind"]) == (PARTIAL_FORMAT, PARTIAL_KIND)
            and isinstance(partial["settings"], dict)
            and isinstance(partial["num_done"], int)
            and all(isinstance(v, float) and math.isfinite(v) and v >= 0 for row in partial["sums"] for v in row)
        )
    except (OSError, ValueError, KeyError, TypeError):
        legal = False
    if not legal:
        raise ValueError(f"--resume: {path} is corrupt; delete it and start again")
    return partial


def _keep(out: Path, settings: dict[str, Any], sums: torch.Tensor, num_done: int) -> None:
    partial = {"format": PARTIAL_FORMAT, "kind": PARTIAL_KIND, "settings": settings, "sums": sums.tolist()}
    write_json(partial_path(out), partial | {"num_done": num_done})
