"""``hybridkv capacity``: how many requests fit, and how fast they decode by the bytes that a step moves."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hybridkv_kernels.host_pages import record_bytes
from sglang_hybridkv.config import CompressorConfig
from sglang_hybridkv.requests.admission import EXPLANATIONS, DenseReason, PoolShape, decide
from sglang_hybridkv.requests.geometry import PromptGeometry

_ELEMENT_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
_PATTERN = re.compile(r"(\d+)\+(\d+)(?::(\d+(?:\.\d+)?))?")
_NEW_TOKEN_RATIO = 0.7  # of an answer, what SGLang expects when it admits a request; SGLANG_INIT_NEW_TOKEN_RATIO
_SECONDS_PER_HOUR = 3600
_HOURS_PER_YEAR = 8760
_LONGEST_PROMPT = 2**20  # that is looked at for the break-even
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
    pattern = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
    if pattern or "sliding_attention" in (text.get("layer_types") or ()):
        raise ValueError(f"--model-path = {path}: the plan knows no layers with a window, which this model has")
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


def pool_tokens(shape: ModelShape, gpu_bytes: float, fraction: float) -> int:
    """Tokens of SGLang's pool: what `fraction` of the device, --mem-fraction-static, leaves beside the weights.

    An estimate: of a server that runs, `max_total_num_tokens` in its log is the truth. ValueError in one sentence when
    nothing is left.
    """
    left = fraction * gpu_bytes - shape.weight_bytes
    if left < shape.token_bytes:
        share, weights = fraction * gpu_bytes / _DECIMAL_GIGA, shape.weight_bytes / _DECIMAL_GIGA
        raise ValueError(
            f"--gpu-gb: {share:.1f} GB for weights and pool are not more than the {weights:.1f} GB of weights"
        )
    return int(left // shape.token_bytes)


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
    # Rows may take less room on the host, and on their way from there.
    stored_bytes = record_bytes(shape.head_dim, shape.element_bytes, config.stored_dtype) * shape.num_heads
    on_host = stored_bytes / shape.token_bytes
    held, expected, read, fetched, host = [], [], [], [], []
    for load, geometry in zip(loads, geometries, strict=True):
        tail = load.prompt_tokens - geometry.covered
        compressed = geometry.num_pages * page_size
        held.append(compressed + -(-(tail + load.new_tokens) // page_size) * page_size)
        expected.append(compressed + tail + _NEW_TOKEN_RATIO * load.new_tokens)
        read.append(compressed + tail + load.new_tokens / 2)
        share = geometry.max_dynamic_heads / shape.num_heads
        fetched.append(on_host * fetched_share * share * geometry.total_head_pages * page_size / shape.num_heads)
        host.append(on_host * geometry.num_host_pages * page_size)
    per_request = _mean(loads, held)
    prefill = max(geometry.covered for geometry in geometries)
    count = max(0, int((machine.pool_tokens - prefill) // _mean(loads, expected)))
    host_bytes = _mean(loads, host) * shape.token_bytes
    if machine.host_bytes is not None and host_bytes > 0:
        count = min(count, int(machine.host_bytes // host_bytes))
    stock = _mean(loads, [load.prompt_tokens + load.new_tokens for load in loads])
    moved = (_mean(loads, read), _mean(loads, fetched), _mean(loads, host))
    return _plan(shape, machine, count, (per_request, stock), moved)


def break_even(
    shape: ModelShape, machine: Machine, new_tokens: int, config: CompressorConfig, fetched_share: float
) -> int | None:
    """Tokens of the shortest prompt from which on a request adds less time to a decode step than on stock.

    By bytes, with answers of `new_tokens`; looked for among powers of two and halfway between them. None when there is
    none.
    """
    roomy = dataclasses.replace(machine, pool_tokens=4 * _LONGEST_PROMPT, host_bytes=None)
    found = None
    for prompt in reversed([tokens for power in range(6, 21) for tokens in (2**power, 3 * 2 ** (power - 1))]):
        loads = [Load(min(prompt, _LONGEST_PROMPT), new_tokens)]
        try:
            compressed = plan_compressed(shape, roomy, loads, config, fetched_share)
        except ValueError:
            break
        stock = plan_stock(shape, roomy, loads)
        if _request_ms(compressed, shape, machine) >= _request_ms(stock, shape, machine):
            break
        found = loads[0].prompt_tokens
    return found


def _request_ms(plan: Plan, shape: ModelShape, machine: Machine) -> float:
    """What one request adds to a step."""
    moved = (plan.step_bytes - shape.weight_bytes) / machine.memory_gb_s + plan.link_bytes / machine.link_gb_s
    return 1e3 * moved / _DECIMAL_GIGA / plan.requests_at_once


def tokens_per_s_of(plan: Plan, shape: ModelShape, machine: Machine, requests: int) -> float:
    """Answered tokens a second with as many requests as `requests`, or as fit if these are fewer."""
    running = min(requests, plan.requests_at_once)
    if running == 0:
        return 0.0
    step_ms = 1e3 * shape.weight_bytes / machine.memory_gb_s / _DECIMAL_GIGA
    return 1e3 * running / (step_ms + running * _request_ms(plan, shape, machine))


def saved_a_year(stock: Plan, compressed: Plan, price: float) -> float | None:
    """What stock servers for the tokens of one compressed server cost a year more than it; None if stock has none.

    `price` is of an hour, and both are busy all the time.
    """
    if stock.tokens_per_s == 0:
        return None
    return price * _HOURS_PER_YEAR * (compressed.tokens_per_s / stock.tokens_per_s - 1)


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
    """`held` by a request, here and on stock; `moved`: read, fetched and kept on the host, in tokens of the pool."""
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


def as_sentences(plans: Mapping[str, Plan], shortest: int | None, price: float | None) -> Iterator[str]:
    """What follows from the numbers; the second plan is the compressed one."""
    stock, (name, compressed) = plans["stock"], list(plans.items())[1]
    yield (
        f"By bytes, a request adds less to a step than on stock from prompts of {shortest:,} tokens on."
        if shortest is not None
        else "By bytes, a request of no length that was looked at adds less to a step than on stock."
    )
    yield f"Stock has room for {stock.requests_at_once:,} requests at once, {name} for {compressed.requests_at_once:,}."
    if price is not None:
        saved = saved_a_year(stock, compressed, price)
        if saved is not None:
            servers = compressed.tokens_per_s / stock.tokens_per_s
            change = f"saves {saved:,.0f}" if saved >= 0 else f"costs {-saved:,.0f} more"
            yield f"One such server answers what {servers:.2f} stock servers do, which {change} a year."


def write_plot(
    path: Path,
    shape: ModelShape,
    machine: Machine,
    plans: Mapping[str, Plan],
    by_length: Mapping[str, Sequence[tuple[int, int]]],
) -> None:
    """Draw rates over the number of requests, and requests at once over the length of prompts.

    Parameters
    ----------
    by_length : for each plan, tokens of a prompt and how many requests of this length fit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    rates, counts = figure.subplots(1, 2)
    most = 2 * max(plan.requests_at_once for plan in plans.values())
    places = sorted({round(most ** (step / 60)) for step in range(61)} | {p.requests_at_once for p in plans.values()})
    for name, plan in plans.items():
        rate = [tokens_per_s_of(plan, shape, machine, count) for count in places]
        [line] = rates.plot(places, rate, label=name)
        full = plan.requests_at_once
        rates.plot([full], [tokens_per_s_of(plan, shape, machine, full)], "o", color=line.get_color())
        lengths = [pair for pair in by_length[name] if pair[1] > 0]
        counts.plot([length for length, _ in lengths], [count for _, count in lengths], label=name)
    rates.set(xscale="log", xlabel="requests (logarithmic)", ylabel="answered tokens a second, by bytes")
    rates.set_title("A dot is a full pool")
    counts.set(xscale="log", yscale="log", xlabel="tokens of a prompt (logarithmic)")
    counts.set_ylabel("requests at once (logarithmic)")
    for axes in (rates, counts):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def counts_by_length(
    shape: ModelShape, machine: Machine, new_tokens: int, config: CompressorConfig
) -> dict[str, list[tuple[int, int]]]:
    """Prompts of 512 to 131,072 tokens and how many requests of each length fit: on stock, and compressed or dense."""
    found: dict[str, list[tuple[int, int]]] = {"stock": [], "compressed": []}
    for step in range(33):
        loads = [Load(round(512 * 2 ** (step / 4)), new_tokens)]
        stock = plan_stock(shape, machine, loads)
        try:
            compressed = plan_compressed(shape, machine, loads, config, 0.0)
        except ValueError:
            compressed = stock
        for name, plan in (("stock", stock), ("compressed", compressed)):
            found[name].append((loads[0].prompt_tokens, plan.requests_at_once))
    return found
