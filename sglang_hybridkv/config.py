"""Everything a user can set about a compressor: one frozen model, read once at start-up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

BUDGET_FLAG = "--kv-compressor-budget"
CONFIG_FLAG = "--kv-compressor-config"


class CompressorConfig(BaseModel):
    """Settings of HybridKV, re-implemented; METHOD section numbers refer to arXiv 2604.05887 as reconstructed.

    "inferred" marks a choice that the published text does not fix; its alternatives are the field's other values.
    """

    # Strict: an integer may stand for a float, but neither text nor true and false for a number.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    budget: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.1, description="share of a prompt's KV rows that stays on the device, (0, 1]; 1.0 keeps every row"
    )
    page_size: Literal[8, 16, 32, 64] = Field(
        16, description="tokens per page, and per chunk that dynamic heads retrieve"
    )
    statistic: Literal["sparsity", "top_mass", "hit_cv"] = Field(
        "sparsity", description="text-centric statistic S in [0, 1] of a head; static when S >= theta (inferred)"
    )
    theta: Annotated[float, Field(ge=0.0, le=1.01)] = Field(
        0.9, description="threshold of the statistic; 0 makes every head static, above 1 every head dynamic"
    )
    sparsity_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.01, description="'sparsity' counts keys below this fraction of a row's largest probability (inferred)"
    )
    mass_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.9, description="'top_mass' counts the keys that hold this share of the probability (inferred)"
    )
    dynamic_share: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.32, description="r: share of the budget that goes to the dynamic heads (inferred from the latency table)"
    )
    static_weight: Literal["sparsity", "density", "uniform"] = Field(
        "sparsity", description="weight of a static head within their share: S, 1 - S, or 1 (inferred)"
    )
    min_head_pages: Annotated[int, Field(ge=1, le=64)] = Field(
        2, description="pages that every head keeps at least; a budget below it serves the request dense (inferred)"
    )
    num_sink_tokens: Annotated[int, Field(ge=0, le=256)] = Field(
        4, description="first tokens of the prompt that every head keeps (inferred)"
    )
    recent_window: Annotated[int, Field(ge=0, le=1024)] = Field(
        16, description="last tokens of the page-aligned prompt that every head keeps (inferred)"
    )
    text_share: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1.0,
        description="largest share of a static head's rows, rounded up, that text takes first (inferred)",
    )
    pool_kernel: Literal[1, 3, 5, 7, 9] = Field(
        5, description="width in tokens of the average pooling over the salience of prompt tokens (inferred)"
    )
    observation_rows: Annotated[int, Field(ge=1, le=256)] = Field(
        32, description="W: last text queries of the prompt that are observed (inferred)"
    )
    min_observation_rows: Annotated[int, Field(ge=1, le=256)] = Field(
        8, description="queries that a prefix hit must leave to compute, so that there is something to observe"
    )
    chunk_score: Literal["mean_max", "mean_mean", "quest", "arkvale"] = Field(
        "mean_max",
        description="score of a chunk for a query group: max or mean over the group of q . mean key, "
        "Quest's min/max bound, or ArkVale's centre plus half the extent (inferred)",
    )
    min_prompt_tokens: Annotated[int, Field(ge=1)] = Field(
        512, description="prompts with fewer tokens are served dense"
    )
    host_store_bytes: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="bytes of host memory for dynamic heads; null: 8x the device pool, at most half of what is free",
    )
    on_host_store_full: Literal["dense", "static"] = Field(
        "dense", description="a request whose rows do not fit the host store: serve it dense, or all heads static"
    )

    @model_validator(mode="after")
    def _observed_rows_are_enough(self) -> CompressorConfig:
        if self.min_observation_rows > self.observation_rows:
            raise ValueError(
                f"min_observation_rows = {self.min_observation_rows} is not allowed; "
                f"legal: at most observation_rows, which is {self.observation_rows}"
            )
        return self

    def summary_vectors_per_chunk(self) -> int:
        """Vectors of head_dim that describe one chunk on the device: 1 (mean) or 2 (minimum and maximum)."""
        return 1 if self.chunk_score.startswith("mean") else 2


def parse_config(text: str | dict | None, *, budget: float | None = None) -> CompressorConfig:
    """Build the config from the flags' values.

    Parameters
    ----------
    text : JSON object, ``@path`` of a file that holds one, a dict, or None for the defaults.
    budget : value of ``--kv-compressor-budget``; None when it is not given.

    Raises
    ------
    ValueError
        One sentence that names the flag or field, the value and the legal values.
    """
    values = _load(text)
    if budget is not None:
        if "budget" in values and values["budget"] != budget:
            raise ValueError(
                f"{BUDGET_FLAG} {budget} and budget {values['budget']!r} of {CONFIG_FLAG} differ; give only one of them"
            )
        values["budget"] = budget
    try:
        return CompressorConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(_one_sentence(error, budget_from_flag=budget is not None)) from None


def legal_values(field: str) -> str:
    """Legal values of a field in words, such as ``a number above 0 and at most 1``."""
    schema = CompressorConfig.model_json_schema()["properties"][field]
    return " or ".join(_in_words(option) for option in schema.get("anyOf", [schema]))


def _in_words(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    bounds = " and ".join(f"{word} {schema[key]:g}" for key, word in words.items() if key in schema)
    kind = {"number": "a number", "integer": "an integer", "null": "null"}[schema["type"]]
    return f"{kind} {bounds}".rstrip()


def _load(text: str | dict | None) -> dict[str, Any]:
    if text is None:
        return {}
    if isinstance(text, dict):
        return dict(text)
    if not isinstance(text, str):
        raise ValueError(f"{CONFIG_FLAG} must be a JSON object, @file or a dict, got {type(text).__name__}")
    source = CONFIG_FLAG
    if text.startswith("@"):
        source = f"{CONFIG_FLAG} file {text[1:]!r}"
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{source} is not valid JSON ({error}); expected an object such as {{"budget": 0.1}}'
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} must be a JSON object, got {type(values).__name__}")
    return values


def _one_sentence(error: ValidationError, *, budget_from_flag: bool) -> str:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return f"{CONFIG_FLAG} {first['msg'].removeprefix('Value error, ')}"
    name = str(first["loc"][0])
    if name not in CompressorConfig.model_fields:
        known = ", ".join(CompressorConfig.model_fields)
        return f"{CONFIG_FLAG} has no field {name!r}; known fields: {known}"
    given = BUDGET_FLAG if name == "budget" and budget_from_flag else f"{CONFIG_FLAG} {name}"
    return f"{given} = {first['input']!r} is not allowed; legal: {legal_values(name)}"
