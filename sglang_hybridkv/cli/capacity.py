"""``hybridkv capacity``: how many requests fit, and how fast they decode by the bytes that a step moves."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from sglang_hybridkv.config import CompressorConfig
from sglang_hybridkv.requests.admission import EXPLANATIONS, DenseReason, PoolShape, decide
from sglang_hybridkv.requests.geometry import PromptGeometry

_ELEMENT_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
_PATTERN = re.compile(r"(\d+)\+(\d+)(?::(\d+(?:\.\d+)?))?")
_NEW_TOKEN_RATIO = 0.7  # of an answer, what SGLang expects when it admits a request; SGLANG_INIT_NEW_TOKEN_RATIO
_SECONDS_PER_HOUR = 3600
_DECIMAL_GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What counts of a model.

    Attributes
    ----------
    num_layers, num_kv_heads, head_dim : of its attention.
    element_bytes : of a number in the KV cache.
    weight_bytes : what a decode step reads of the weights.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    weight_bytes: int

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return self.num_layers * self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.num_heads * self.head_dim * self.element_bytes


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device and its link to the host.

    Attributes
    ----------
    pool_tokens : tokens of the KV pool, `max_total_num_tokens` in SGLang's log.
    memory_gb_s, link_gb_s : gigabytes a second that a copy reads and writes together, and that the host link moves.
    host_bytes : of the host store; None where it is as large as wanted.
    price : of an hour, in any currency; None without one.
    """

    pool_tokens: int
    memory_gb_s: float
    link_gb_s: float
    host_bytes: int | None = None
    price: float | None = None


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests of one kind: tokens of prompt and answer, and their share among all kinds."""

    prompt_tokens: int
    new_tokens: int
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one server does under a load.

    Attributes
    ----------
    requests_at_once : as SGLang admits them, which expects seven tenths of each answer.
    tokens_held : tokens of the pool that a request holds at its end.
    resident_ratio : device bytes of a request at its end over stock's.
    host_bytes : of all these requests, in the host store.
    step_bytes, link_bytes : what a decode step of all these requests reads of weights and pool, and over the link.
    step_ms : by these bytes, one after the other.
    tokens_per_s : of all requests together.
    cost_per_million : answered tokens, in the machine's currency; None without a price.
    """

    requests_at_once: int
    tokens_held: float
    resident_ratio: float
    host_bytes: int
    step_bytes: int
    link_bytes: int
    step_ms: float
    tokens_per_s: float
    cost_per_million: float | None


def read_shape(path: Path, weight_bytes: int | None = None) -> ModelShape:
    """Read a checkpoint's config.json; ValueError in one sentence.

    Parameters
    ----------
    path : folder of a checkpoint, or its config.json.
    weight_bytes : None takes the size of the folder's safetensors files.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model-path = {path}: {file} cannot be read ({error})") from None
    text = config.get("text_config", config)
    try:
        num_layers, num_q_heads = text["num_hidden_layers"], text["num_attention_heads"]
        head_dim = text.get("head_dim") or text["hidden_size"] // num_q_heads
    except KeyError as error:
        raise ValueError(f"--model-path = {path}: {file} has no {error.args[0]}") from None
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16"
    if weight_bytes is None:
        weight_bytes = sum(one.stat().st_size for one in file.parent.glob("*.safetensors"))
        if weight_bytes == 0:
            raise ValueError(f"--model-path = {path}: no safetensors files beside it; say how large with --weight-gb")
    num_kv_heads = text.get("num_key_value_heads") or num_q_heads
    return ModelShape(num_layers, num_kv_heads, head_dim, _ELEMENT_BYTES.get(str(dtype), 2), weight_bytes)


def parse_load(text: str) -> Load:
    """Read ``PROMPT+NEW`` or ``PROMPT+NEW:WEIGHT``, such as ``8192+512:3``; ValueError in one sentence."""
    match = _PATTERN.fullmatch(text)
    load = Load(int(match[1]), int(match[2]), float(match[3] or 1)) if match else None
    if load is None or min(load.prompt_tokens, load.new_tokens) < 1 or load.weight <= 0:
        raise ValueError(f"--load = {text!r}: expected tokens of prompt and answer, such as 8192+512 or 8192+512:3")
    return load


def plan_stock(shape: ModelShape, machine: Machine, loads: Sequence[Load]) -> Plan:
    """Stock SGLang: each request holds and reads all of its tokens."""
    held = _mean(loads, [load.prompt_tokens + load.new_tokens for load in loads])
    largest = max(load.prompt_tokens + load.new_tokens for load in loads)
    expected = _mean(loads, [load.prompt_tokens + _NEW_TOKEN_RATIO * load.new_tokens for load in loads])
    count = int(machine.pool_tokens // expected) if largest <= machine.pool_tokens else 0
    read = _mean(loads, [load.prompt_tokens + load.new_tokens / 2 for load in loads])
    return _plan(shape, machine, count, (held, held), (read, 0.0, 0.0))


def plan_compressed(
    shape: ModelShape, machine: Machine, loads: Sequence[Load], config: CompressorConfig, fetched_share: float
) -> Plan:
    """A server with a compressor, by the same arithmetic as its admission.

    One prompt at a time is prefilled, and holds all of its pages beside those that decode.

    Parameters
    ----------
    fetched_share : of the rows that dynamic heads hold, those that a step fetches from the host.

    Raises
    ------
    ValueError
        One of the loads would be served dense.
    """
    geometries = [_geometry(shape, machine, load, config) for load in loads]
    page_size = config.page_size
    held, expected, read, fetched, host = [], [], [], [], []
    for load, geometry in zip(loads, geometries, strict=True):
        tail = load.prompt_tokens - geometry.covered
        compressed = geometry.num_pages * page_size
        held.append(compressed + -(-(tail + load.new_tokens) // page_size) * page_size)
        expected.append(compressed + tail + _NEW_TOKEN_RATIO * load.new_tokens)
        read.append(compressed + tail + load.new_tokens / 2)
        share = geometry.max_dynamic_heads / shape.num_heads
        fetched.append(fetched_share * share * geometry.total_head_pages * page_size / shape.num_heads)
        host.append(geometry.num_host_pages * page_size)
    per_request = _mean(loads, held)
    prefill = max(geometry.covered for geometry in geometries)
    count = max(0, int((machine.pool_tokens - prefill) // _mean(loads, expected)))
    host_bytes = _mean(loads, host) * shape.token_bytes
    if machine.host_bytes is not None and host_bytes > 0:
        count = min(count, int(machine.host_bytes // host_bytes))
    stock = _mean(loads, [load.prompt_tokens + load.new_tokens for load in loads])
    moved = (_mean(loads, read), _mean(loads, fetched), _mean(loads, host))
    return _plan(shape, machine, count, (per_request, stock), moved)


def _geometry(shape: ModelShape, machine: Machine, load: Load, config: CompressorConfig) -> PromptGeometry:
    pool = PoolShape(config.page_size, shape.num_heads, machine.pool_tokens)
    geometry = decide(load.prompt_tokens, load.new_tokens, config, pool)
    if isinstance(geometry, DenseReason):
        given = f"{load.prompt_tokens}+{load.new_tokens}"
        raise ValueError(f"--load = {given} would be served without compression: {EXPLANATIONS[geometry]}")
    return geometry


def _mean(loads: Sequence[Load], values: Sequence[float]) -> float:
    total = sum(load.weight for load in loads)
    return sum(load.weight * value for load, value in zip(loads, values, strict=True)) / total


def _plan(
    shape: ModelShape, machine: Machine, count: int, held: tuple[float, float], moved: tuple[float, float, float]
) -> Plan:
    """`held` by a request, here and on stock; `moved`: read, fetched and kept on the host, all in tokens."""
    read, fetched, host = (count * tokens * shape.token_bytes for tokens in moved)
    step_bytes = shape.weight_bytes + int(read)
    step_ms = 1e3 * (step_bytes / machine.memory_gb_s + fetched / machine.link_gb_s) / _DECIMAL_GIGA
    rate = 1e3 * count / step_ms
    cost = None if machine.price is None or count == 0 else 1e6 * machine.price / (_SECONDS_PER_HOUR * rate)
    return Plan(count, held[0], held[0] / held[1], int(host), step_bytes, int(fetched), step_ms, rate, cost)


_ROWS: tuple[tuple[str, Callable[[Plan], str]], ...] = (
    ("requests at once", lambda plan: f"{plan.requests_at_once:,}"),
    ("tokens of the pool that a request holds", lambda plan: f"{plan.tokens_held:,.0f}"),
    ("the same over stock's", lambda plan: f"{100 * plan.resident_ratio:.1f} %"),
    ("host store", lambda plan: f"{plan.host_bytes / _DECIMAL_GIGA:,.1f} GB"),
    ("a decode step reads", lambda plan: f"{plan.step_bytes / _DECIMAL_GIGA:,.1f} GB"),
    ("and over the link", lambda plan: f"{plan.link_bytes / _DECIMAL_GIGA:,.2f} GB"),
    ("a decode step takes, by bytes", lambda plan: f"{plan.step_ms:,.2f} ms"),
    ("answered tokens a second", lambda plan: f"{plan.tokens_per_s:,.0f}"),
)


def as_table(plans: Mapping[str, Plan]) -> Iterator[str]:
    """Lines for people: a row a number, a column a server."""
    rows = list(_ROWS)
    if all(plan.cost_per_million is not None for plan in plans.values()):
        rows.append(("cost of a million answered tokens", lambda plan: f"{plan.cost_per_million:,.2f}"))
    lines = [("", *plans), *((name, *(show(plan) for plan in plans.values())) for name, show in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [one.rjust(width) for one, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])
