"""Visual-head scores of one model: the JSON file that ``hybridkv calibrate`` writes and SparseMM reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=1)]
Score = Annotated[float, Field(ge=0.0)]


class CalibratedModel(BaseModel):
    """The model that is calibrated; fingerprint is the SHA-256 of its config.json, or null where that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    num_layers: Count
    num_kv_heads: Count
    head_dim: Count
    fingerprint: str | None = None


class Calibration(BaseModel):
    """Scores of all KV heads, [num_layers][num_kv_heads], at least one above 0; num_samples is how many images."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal[1]
    kind: Literal["visual_head_scores"]
    model: CalibratedModel
    scores: list[list[Score]]
    num_samples: Count

    @model_validator(mode="after")
    def _scores_fit_the_model(self) -> Calibration:
        model, lengths = self.model, {len(row) for row in self.scores}
        if len(self.scores) != model.num_layers or lengths != {model.num_kv_heads}:
            raise ValueError(
                f"scores must be {model.num_layers} lists of {model.num_kv_heads}, as its model says, got "
                f"{len(self.scores)} of {' and '.join(map(str, sorted(lengths))) or 'nothing'}"
            )
        if not any(map(any, self.scores)):
            raise ValueError("scores are all 0")
        return self


def load_calibration(
    path: str | Path, num_layers: int, num_kv_heads: int, fingerprint: str | None = None
) -> Calibration:
    """Read and check the scores of a model of `num_layers` layers of `num_kv_heads` KV heads.

    Where `fingerprint` and the file's are both known, they have to be the same.

    Raises
    ------
    ValueError
        One sentence: the file cannot be read, is damaged, or belongs to another model.
    """
    source = f"calibration file {str(path)!r}"
    recipe = "write one with `hybridkv calibrate`"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}; {recipe}") from None
    try:
        calibration = Calibration.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        complaint = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{source} is damaged: {f'{place}: ' if place else ''}{complaint}; {recipe}") from None
    model = calibration.model
    if (model.num_layers, model.num_kv_heads) != (num_layers, num_kv_heads):
        raise ValueError(
            f"{source} belongs to {model.name!r} with {model.num_layers} layers of {model.num_kv_heads} KV heads, the "
            f"model to serve has {num_layers} of {num_kv_heads}; {recipe} for it"
        )
    if fingerprint and model.fingerprint and fingerprint != model.fingerprint:
        raise ValueError(
            f"{source} belongs to {model.name!r}, whose config.json has the SHA-256 {model.fingerprint[:12]}, "
            f"the model to serve has {fingerprint[:12]}; {recipe} for it"
        )
    return calibration
