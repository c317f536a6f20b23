"""Models that bench_quality knows by name: where they are, what they are asked, and what their smoke test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models.real_models import reader_folder, smollm2_folder
from benchmarks.provenance import REPOSITORY
from benchmarks.quality.presets import PRESETS, TEXT_PRESETS, Preset
from benchmarks.quality.table import Results, smoke_verdict, text_verdict

TINY_MODEL = REPOSITORY / "benchmarks" / "models" / "tiny-qwen2_5_vl-scenes"


@dataclass(frozen=True)
class KnownModel:
    """A model and its tables.

    Attributes
    ----------
    folder : returns the checkpoint, made the first time.
    presets : its tables, by name.
    verdict : why the smoke test fails; None when it passes.
    concurrency : requests at once.
    """

    folder: Callable[[], Path]
    presets: Mapping[str, Preset]
    verdict: Callable[[Results], str | None]
    concurrency: int


MODELS = {
    "tiny": KnownModel(lambda: TINY_MODEL, PRESETS, smoke_verdict, 8),
    # Two cores compute no more than two prompts of this model at a time.
    "smollm2": KnownModel(smollm2_folder, TEXT_PRESETS, text_verdict, 2),
    # This model is asked about the same texts, which it sees as pages.
    "reader": KnownModel(reader_folder, TEXT_PRESETS, text_verdict, 2),
}
