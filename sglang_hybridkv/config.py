"""Everything a user can set about a compressor: frozen models, read once at start-up.

A compressor's config is a subclass of one of those here; a method that differs in a common default says so by
annotating the field again, as in ``pool_mode: PoolMode = "max"``.
"""

from __future__ import annotations

import difflib
import json
import os.path
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from hybridkv_kernels.chunks import CODED_SCORES, ESTIMATING_SCORES, Retrieval

BUDGET_FLAG = "--kv-compressor-budget"
EVENTS_FLAG = "--kv-compressor-events"
CONFIG_FLAG = "--kv-compressor-config"

_HYSTERESIS = 0.5  # with a chunk_score of codes
_MOST_DIGITS = 4000  # of an integer; Python itself reads 4,300
_LONGEST_VALUE = 80  # characters of a bad value that a sentence repeats
# Words for the types of JSON Schema.
_KINDS = {
    "number": "a number",
    "integer": "an integer",
    "null": "null",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}

Budget = Annotated[
    float,
    Field(gt=0.0, le=1.0, description="share of a prompt's KV rows that stays in device memory; 1 keeps every row"),
]
PageSize = Annotated[
    Literal[8, 16, 32, 64], Field(description="tokens in a page of memory; heads get their budgets in whole pages")
]
MinHeadPages = Annotated[
    int,
    Field(ge=1, le=64, description="pages that every head keeps at least; a smaller budget serves the request dense"),
]
NumSinkTokens = Annotated[
    int, Field(ge=0, le=256, description="first tokens of the prompt; every head keeps them before all others")
]
RecentWindow = Annotated[
    int, Field(ge=0, le=1024, description="last tokens of the page-aligned prompt; every head keeps them")
]
PoolKernel = Annotated[
    Literal[1, 3, 5, 7, 9],
    Field(description="tokens over which the salience of each prompt token is pooled; 1 does not pool"),
]
PoolMode = Annotated[
    Literal["average", "max"], Field(description="whether pooling takes the average or the maximum of the neighbours")
]
ObservationRows = Annotated[
    int,
    Field(
        ge=1, le=256, description="last queries of the prompt that are observed; a prefix hit leaves them to compute"
    ),
]
MinPromptTokens = Annotated[int, Field(ge=1, le=2**31 - 1, description="prompts with fewer tokens are served dense")]
RequestOverride = Annotated[
    bool,
    Field(description="whether a request may set fields of its own, in custom_params.kv_compressor (docs/requests.md)"),
]
UnverifiedModel = Annotated[
    bool,
    Field(
        description="whether a model may be served whose architecture is not among the verified ones (docs/models.md); "
        "it has to meet the requirements, and to pass the self-test at start-up"
    ),
]
Events = Annotated[
    Annotated[
        str,
        Field(
            pattern=r"^(tcp://[^:/\s]+:[0-9]{1,5}|ipc://\S+)$",
            examples=["tcp://127.0.0.1:5559", "ipc:///tmp/plans"],
        ),
    ]
    | None,
    Field(description="where to publish the plan of each compressed prompt over ZMQ (docs/events.md); null is nowhere"),
]
RequestBudgetMin = Annotated[
    Annotated[float, Field(gt=0.0, le=1.0)] | None,
    Field(description="smallest budget that a request may ask for; null leaves it to the legal values of budget"),
]
RequestBudgetMax = Annotated[
    Annotated[float, Field(gt=0.0, le=1.0)] | None,
    Field(description="largest budget that a request may ask for; null leaves it to the legal values of budget"),
]
ChunkScore = Annotated[
    Literal[
        "mean_max",
        "mean_mean",
        "quest",
        "arkvale",
        "mean2_max",
        "mean4_max",
        "mean_spread",
        "key_codes",
        "half_codes",
    ],
    Field(
        description="how the queries of a KV head score a chunk. 'mean_max' and 'mean_mean' multiply each query with "
        "the mean key of the chunk and take the maximum or the mean over the queries. 'mean2_max' and 'mean4_max' have "
        "two or four mean keys a chunk. 'mean_spread' adds half the spread of the chunk's keys. 'quest' takes Quest's "
        "bound by the smallest and largest key elements, 'arkvale' the centre of the keys plus half their extent. "
        "'key_codes' multiplies with every key of the chunk, each stored with two bits an element, 'half_codes' "
        "with the half of their elements that the head's queries read most"
    ),
]
ChunkSize = Annotated[
    Literal[1, 2, 4, 8, 16, 32, 64] | None,
    Field(
        description="tokens that a dynamic head retrieves together, a divisor of page_size. null means 1 with "
        "a chunk_score of codes, and a page otherwise"
    ),
]
Hysteresis = Annotated[
    Annotated[float, Field(ge=0.0, le=16.0)] | None,
    Field(
        description="by how much a chunk in host memory has to beat one on the device before it is fetched in its "
        "place, where a query's scores are measured in their own spread; only with a chunk_score of codes. 0 fetches "
        "the best chunks for each query; more saves traffic over the host link and lets answers depend a little on "
        "earlier queries. null means 0.5 with codes, and 0 otherwise",
    ),
]
Unretrieved = Annotated[
    Literal["drop", "estimate"],
    Field(
        description="what becomes of chunks that a query does not retrieve. 'drop' leaves them out. 'estimate' lets "
        "their mean key and mean value stand for them (RetroInfer, arXiv 2505.02922); it doubles the summaries and "
        "needs a chunk_score of means, such as 'mean_max'"
    ),
]
Prefetch = Annotated[
    Literal["off", "previous_query"],
    Field(
        description="when chunks are retrieved. 'off' retrieves before each attention, 'previous_query' after it, for "
        "the next step, while the following layers run (FreeKV, arXiv 2505.13109)"
    ),
]
PrefetchSimilarity = Annotated[
    float,
    Field(
        gt=0.0,
        le=1.0,
        description="a request whose consecutive queries have a lower cosine than this retrieves before it attends",
    ),
]
HostDtype = Annotated[
    Literal["same", "int8"],
    Field(
        description="how the rows of dynamic heads lie in host memory. 'same' keeps the pool's type; 'int8' rounds "
        "each key and each value to one byte an element and a scale, which halves host memory and traffic over the "
        "host link for 16-bit types. Rows that are on the device since the prompt was compressed stay exact"
    ),
]
HostStoreBytes = Annotated[
    Annotated[int, Field(ge=0)] | None,
    Field(
        description="bytes of host memory for the rows of dynamic heads, of all tensor-parallel ranks together. null "
        "means room for eight times their share of the device pool, and at most half of the memory that is free"
    ),
]
OnHostStoreFull = Annotated[
    Literal["dense", "static"],
    Field(
        description="what becomes of a request whose rows do not fit the host store: it is served dense, or the heads "
        "that do not fit are static"
    ),
]


def _may_be_bool(annotation: Any) -> bool:
    """Whether true or false is among what an annotation allows."""
    return annotation is bool or isinstance(annotation, bool) or any(map(_may_be_bool, get_args(annotation)))


class CompressorConfig(BaseModel):
    """What the engine needs to know for every method."""

    # Strict: an integer may stand for a float, but neither text nor true and false for a number.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Fields that a request may set for itself: none that shapes the pool, the tables or the kernels.
    per_request: ClassVar[tuple[str, ...]] = ("budget", "min_prompt_tokens")

    budget: Budget = 0.1
    page_size: PageSize = 16
    min_head_pages: MinHeadPages = 2
    num_sink_tokens: NumSinkTokens = 4
    recent_window: RecentWindow = 16
    pool_kernel: PoolKernel = 5
    pool_mode: PoolMode = "average"
    observation_rows: ObservationRows = 32
    min_prompt_tokens: MinPromptTokens = 512
    request_override: RequestOverride = True
    request_budget_min: RequestBudgetMin = None
    request_budget_max: RequestBudgetMax = None
    unverified_model: UnverifiedModel = False
    events: Events = None

    @model_validator(mode="after")
    def _some_budget_is_allowed(self) -> CompressorConfig:
        least, most = self.request_budget_min, self.request_budget_max
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"request_budget_min = {least} is not allowed with request_budget_max = {most}; "
                f"legal: a number above 0 and at most {most}"
            )
        return self

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # To a Literal, however strict, true is 1.
        if isinstance(value, bool) and not _may_be_bool(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("true and false are not allowed here")
        return value

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Values of all fields that have a default, without those a user must give."""
        return {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}

    @property
    def retrieval(self) -> Retrieval | None:
        """How dynamic heads retrieve; None when no head is dynamic."""
        return None

    @property
    def stored_dtype(self) -> str:
        """How the host store keeps rows, one of `host_pages.HOST_DTYPES`."""
        return "same"

    def summary_vectors(self, num_tokens: int) -> int:
        """Vectors of head_dim that describe `num_tokens` of a dynamic head on the device; 0 when no head is dynamic."""
        return 0

    def most_dynamic_heads(self, num_heads: int, covered: int) -> int:
        """How many of the model's `num_heads` KV heads, over all layers, `covered` tokens of a prompt make dynamic."""
        return 0

    def fewest_dynamic_heads(self, num_heads: int, covered: int) -> int:
        """How many of them are dynamic whatever the prompt is; 0 where that is not known."""
        return 0

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens that dynamic heads retrieve together; a page where no head is dynamic."""
        return self.page_size


class WindowConfig(CompressorConfig):
    """What methods of SnapKV's family share: no sinks, and the observed window of 32 tokens is always kept."""

    num_sink_tokens: NumSinkTokens = 0
    recent_window: RecentWindow = 32


class RetrievalConfig(CompressorConfig):
    """The same for methods with dynamic heads, which keep their rows in host memory and retrieve chunks."""

    chunk_score: ChunkScore = "mean_max"
    chunk_size: ChunkSize = None
    hysteresis: Hysteresis = None
    unretrieved: Unretrieved = "drop"
    prefetch: Prefetch = "off"
    prefetch_similarity: PrefetchSimilarity = 0.9
    host_dtype: HostDtype = "same"
    host_store_bytes: HostStoreBytes = None
    on_host_store_full: OnHostStoreFull = "dense"

    @model_validator(mode="after")
    def _only_means_estimate(self) -> RetrievalConfig:
        if self.estimates and self.chunk_score not in ESTIMATING_SCORES:
            raise ValueError(
                f"chunk_score = {self.chunk_score!r} is not allowed with unretrieved = 'estimate'; "
                f"legal: one of {', '.join(ESTIMATING_SCORES)}"
            )
        return self

    @model_validator(mode="after")
    def _chunks_fill_pages(self) -> RetrievalConfig:
        if self.hysteresis and self.chunk_score not in CODED_SCORES:
            raise ValueError(
                f"hysteresis = {self.hysteresis!r} is not allowed with chunk_score = {self.chunk_score!r}; "
                f"legal: 0, or a chunk_score of codes ({', '.join(CODED_SCORES)})"
            )
        try:
            self.retrieval.check(self.page_size)
        except ValueError as error:
            given = f"chunk_size = {self.chunk_size!r} is not allowed with page_size = {self.page_size}"
            raise ValueError(f"{given} and chunk_score = {self.chunk_score!r}: {error}") from None
        return self

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens that dynamic heads retrieve together."""
        if self.chunk_size is not None:
            return self.chunk_size
        return 1 if self.chunk_score in CODED_SCORES else self.page_size

    @property
    def estimates(self) -> bool:
        """Whether mean values stand for the chunks that are not retrieved."""
        return self.unretrieved == "estimate"

    @property
    def retrieval(self) -> Retrieval:
        """The same for the kernels, with sinks and recent window in chunks, rounded up."""
        size = self.tokens_per_chunk
        sinks, recent = -(-self.num_sink_tokens // size), -(-self.recent_window // size)
        hysteresis = self.hysteresis
        if hysteresis is None:
            hysteresis = _HYSTERESIS if self.chunk_score in CODED_SCORES else 0.0
        return Retrieval(sinks, recent, self.chunk_score, size, self.estimates, hysteresis)

    @property
    def stored_dtype(self) -> str:
        """How the host store keeps rows."""
        return self.host_dtype

    def summary_vectors(self, num_tokens: int) -> int:
        """Vectors of head_dim that describe `num_tokens`, whole pages, of a dynamic head on the device."""
        return self.retrieval.count_vectors(num_tokens)

    def most_dynamic_heads(self, num_heads: int, covered: int) -> int:
        """How many of the model's `num_heads` KV heads, over all layers, `covered` tokens of a prompt make dynamic."""
        return num_heads


Config = TypeVar("Config", bound=CompressorConfig)


def parse_config(
    text: str | dict | None, config_class: type[Config], *, budget: float | None = None, events: str | None = None
) -> Config:
    """Build the config of one compressor from the flags' values.

    Parameters
    ----------
    text : JSON object, ``@path`` of a file that holds one, a dict, or None for the defaults.
    config_class : the compressor's.
    budget, events : values of ``--kv-compressor-budget`` and ``--kv-compressor-events``; None when not given.

    Raises
    ------
    ValueError
        One sentence that names the flag or field, the value and the legal values.
    """
    values = _load(text)
    sources: dict[str, str] = {}
    for name, flag, value in (("budget", BUDGET_FLAG, budget), ("events", EVENTS_FLAG, events)):
        if value is not None and name not in values:
            values[name], sources[name] = value, flag
        elif value is not None and values[name] != value:
            given, field = in_json_words(value), in_json_words(values[name])
            raise ValueError(f"{flag} {given} and {name} {field} of {CONFIG_FLAG} differ; give only one of them")
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise ValueError(_one_sentence(error, config_class, sources)) from None


def legal_values(field: str, config_class: type[CompressorConfig]) -> str:
    """Legal values of a field in words, such as ``a number above 0 and at most 1``."""
    schema = config_class.model_json_schema()["properties"][field]
    return " or ".join(_in_words(option) for option in schema.get("anyOf", [schema]))


def _in_words(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    bounds = " and ".join(f"{word} {_plain(schema[key])}" for key, word in words.items() if key in schema)
    if "minimum" in schema and schema["minimum"] == schema.get("maximum"):
        bounds = f"equal to {_plain(schema['minimum'])}"
    kind = _KINDS.get(schema.get("type", ""), "a value of another shape")
    examples = " or ".join(map(str, schema.get("examples", ())))
    return f"{kind} {f'such as {examples}' if examples else bounds}".rstrip()


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'budget'?)"``, or nothing where no known name is alike."""
    alike = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {alike[0]!r}?)" if alike else ""


def in_json_words(value: Any) -> str:
    """A value as its writer, who wrote JSON, knows it: null, true and false, the rest as Python has it, cut if long."""
    try:
        words = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    except ValueError:  # what Python says of an integer of more digits than it writes
        return "a number of thousands of digits"
    return words if len(words) <= _LONGEST_VALUE else words[:_LONGEST_VALUE] + "..."


def kind_of(value: Any) -> str:
    """What a JSON value is, such as ``a list``."""
    for kind, word in ((type(None), "null"), (bool, "true or false"), ((int, float), "a number"), (str, "a text")):
        if isinstance(value, kind):
            return word
    return "a list" if isinstance(value, list) else f"a Python {type(value).__name__}"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=...)``: ValueError when an object gives a key twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"gives {key!r} twice")
        values[key] = value
    return values


def load_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    """``json.loads`` whose objects `pairs` makes; an integer of more digits than Python reads is infinite.

    Raises
    ------
    ValueError
        It is no JSON, or `pairs` says so.
    RecursionError
        It is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=pairs, parse_int=_parse_int)


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def not_allowed(given: str, value: Any, legal: str) -> str:
    """The sentence about a bad value: what was given, what is legal, and what a text with a unit means in numbers."""
    sentence = f"{given} = {in_json_words(value)} is not allowed; legal: {legal}"
    is_short = isinstance(value, str) and len(value) <= _LONGEST_VALUE
    number = re.fullmatch(r"\s*([0-9.]+)\s*(%|[kKmMgGtT]i?[bB])\s*", value) if is_short else None
    if number is None or number[1].count(".") > 1 or number[1] == ".":
        return sentence
    amount, unit = float(number[1]), number[2]
    if unit == "%":
        return f"{sentence}; {amount:g} % is written {amount / 100:g}"
    base, power = (1024 if "i" in unit else 1000), "kmgt".index(unit[0].lower()) + 1
    return f"{sentence}; {value.strip()} is written {round(amount * base**power)}"


def _load(text: str | dict | None) -> dict[str, Any]:
    if text is None:
        return {}
    if isinstance(text, dict):
        return dict(text)
    if not isinstance(text, str):
        raise ValueError(f"{CONFIG_FLAG} must be a JSON object, @file or a dict, got {kind_of(text)}")
    source, hint = CONFIG_FLAG, _file_hint(text)
    if text.startswith("@"):
        source = f"{CONFIG_FLAG} file {in_json_words(text[1:])}"
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: bytes that are no UTF-8, or a name that none can have
            raise ValueError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        # Editors on Windows put a byte order mark before the text.
        values = load_json(text.removeprefix("\ufeff"), unique_keys)
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply; no field takes more than a number or a text") from None
    except json.JSONDecodeError as error:
        expected = hint or 'expected an object such as {"budget": 0.1}'
        raise ValueError(f"{source} is not valid JSON ({error}); {expected}") from None
    except ValueError as error:
        raise ValueError(f"{source} {error}; give it once") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} must be a JSON object, got {kind_of(values)}")
    return values


def _file_hint(text: str) -> str | None:
    """What to write for a file whose @ was forgotten."""
    is_name = len(text) < 500 and text.isprintable() and not text.startswith("@")
    looks_like_a_file = is_name and (text.endswith(".json") or ("{" not in text and os.path.isfile(text)))
    return f"to read a file, write @{text}" if looks_like_a_file else None


def _one_sentence(error: ValidationError, config_class: type[CompressorConfig], sources: dict[str, str]) -> str:
    """`sources` names the flag that a field came from, where it was not the configuration."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return f"{CONFIG_FLAG} {first['msg'].removeprefix('Value error, ')}"
    name = str(first["loc"][0])
    fields = config_class.model_fields
    if name not in fields:
        unknown = in_json_words(name) + did_you_mean(name, fields)
        return f"{CONFIG_FLAG} has no field {unknown}; known fields: {', '.join(fields)}"
    if first["type"] == "missing":
        return f"{CONFIG_FLAG} needs the field {name!r}: {fields[name].description}"
    return not_allowed(sources.get(name, f"{CONFIG_FLAG} {name}"), first["input"], legal_values(name, config_class))
