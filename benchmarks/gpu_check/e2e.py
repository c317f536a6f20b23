"""Whole servers with a model of Qwen2.5-VL-7B's shape: stock beside ours, decode, first tokens, memory, and the wall.

A server is started once and measured under each of its loads and head types. A row is handed out as soon as it is
there, as the time on a GPU may end at any moment; what it is judged by are the rows before it.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.bench_memory import random_prompt
from benchmarks.bench_serving import Stream, Unfit, decode_rate, stream_answer
from benchmarks.bench_wall import summary
from benchmarks.gpu_check.e2e_plan import CHUNK_TOKENS, Load, Plan, Setup, flags_of
from benchmarks.harness import Server, parallel

REPEATS = 3
"""Prompts of which the median first token counts; compressed and dense ones take turns."""
MOST_WORDS = 3000
"""Characters of a server's failure, the end of its log among them."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Aim:
    """A figure judged on a GPU: at most, or at least, `limit`; in rows of these head types, or in all of ours."""

    figure: str
    limit: float
    heads: tuple[str, ...] = ()
    is_least: bool = False

    def is_missed(self, value: float) -> bool:
        """Whether a value is on the wrong side of the limit."""
        return value < self.limit if self.is_least else value > self.limit


AIMS = (
    Aim("kv_of_stock", 0.117, ("quarter", "static", "defaults")),
    Aim("speedup", 1.6, ("quarter",), is_least=True),
    Aim("speedup", 2.0, ("static",), is_least=True),
    Aim("ttft_growth", 0.03),
    Aim("startup_growth_s", 2.0),
)
MEASURED = ("ttft_ms", "ttft_hit_ms", "ttft_all_ms", "ttft_all_hit_ms", "decode_tok_s", "step_ms", "decode_tok_s_hit")
"""Without these a row is not complete."""
OURS = ("ttft_dense_ms",)


def figures(row: Row, earlier: Sequence[Row]) -> Row:
    """What a row of ours is judged by; None where the stock server to compare with has not run.

    `speedup` is the decode rate over that of the fastest stock server with the same load, `ttft_growth` the first token
    over that of our dense path in the same server, less one, and `startup_growth_s` the start over stock's on the same
    attention backend.
    """
    stock = [one for one in earlier if one["server"] == "stock" and one["measured"] == row["measured"] and one["ok"]]
    if row["measured"] == "wall":
        rates = [one["tok_s"] for one in stock]
        return {"wall_speedup": round(row["tok_s"] / max(rates), 3) if rates else None}
    load = (row["requests"], row["prompt_tokens"])
    rates = [one["decode_tok_s"] for one in stock if (one["requests"], one["prompt_tokens"]) == load]
    starts = [one["startup_s"] for one in stock if one["attention_backend"] == row["attention_backend"]]
    rate, dense = row["decode_tok_s"], row["ttft_dense_ms"]
    return {
        "speedup": round(rate / max(rates), 3) if rates and rate else None,
        "ttft_growth": round(row["ttft_ms"] / dense - 1, 4) if dense else None,
        "startup_growth_s": round(row["startup_s"] - starts[0], 1) if starts else None,
    }


def judge(row: Row, earlier: Sequence[Row], *, has_gpu: bool) -> Row:
    """The row with its figures, the aims beside them, and what is wrong with it; aims count on a GPU only."""
    if "error" in row:
        return row | {"judged": False, "ok": False, "failures": [f"{row['setup']}: {row['error']}"]}
    is_ours = row["server"] != "stock"
    failures = []
    if row["measured"] == "load":
        wanted = MEASURED + (OURS if is_ours else ()) + (("chunk_hit_rate",) if row.get("dynamic_heads") else ())
        failures = [f"{name} was not measured" for name in wanted if row.get(name) is None]
        if is_ours and row["compressed"] < row["requests"]:
            failures.append(f"{row['requests'] - row['compressed']} of {row['requests']} requests were served dense")
    row = row | (figures(row, earlier) if is_ours else {})
    for aim in AIMS if is_ours else ():
        if aim.figure in row and (not aim.heads or row["heads"] in aim.heads):
            row[f"{aim.figure}_aim"] = aim.limit
            value = row[aim.figure]
            if has_gpu and value is not None and aim.is_missed(value):
                failures.append(
                    f"{aim.figure} is {value:g}, expected at {'least' if aim.is_least else 'most'} {aim.limit:g}"
                )
    return row | {"judged": has_gpu and is_ours, "ok": not failures, "failures": failures}


class Client:
    """Asks one server with the settings of one head type, until its time is over."""

    def __init__(self, server: Server, dynamic_heads: float | None, deadline: float, seed: int):
        self.server, self.deadline, self.seed = server, deadline, seed
        self.settings: dict[str, Any] = {} if dynamic_heads is None else {"dynamic_heads": dynamic_heads}
        self._drawn = 0

    def prompt(self, num_tokens: int) -> list[int]:
        """One that no request had so far."""
        self._drawn += 1
        return random_prompt(self.seed + self._drawn, num_tokens)

    def ask(self, ids: list[int], new_tokens: int, **settings: Any) -> Stream:
        """The answer; `settings` win over those of the head type."""
        self.check_time()
        given = settings or self.settings
        return stream_answer(
            self.server, ids, new_tokens, **({"custom_params": {"kv_compressor": given}} if given else {})
        )

    def ask_all(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Stream]:
        """All at once."""
        return parallel(lambda ids: self.ask(ids, new_tokens), prompts)

    def check_time(self) -> None:
        """Unfit when the server's time is over; a request that runs then is ended."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Unfit("the server's time is over (--server-seconds)")
        self.server.client.timeout = left

    def flush(self) -> None:
        """Empty the prefix cache."""
        self.server.client.post("/flush_cache", params={"timeout": 30}).raise_for_status()


def _first_tokens(client: Client, load: Load, kind: str) -> Row:
    """Milliseconds to the first token of one prompt alone: computed, on our dense path, and from the prefix cache."""
    alone, dense, hit = [], [], []
    for _ in range(REPEATS):
        ids = client.prompt(load.prompt_tokens)
        alone.append(client.ask(ids, 2).ttft_ms)
        hit.append(client.ask(ids, 2).ttft_ms)
        if kind != "stock":
            dense.append(client.ask(client.prompt(load.prompt_tokens), 2, enabled=False).ttft_ms)
    medians = {"ttft_ms": alone, "ttft_hit_ms": hit, "ttft_dense_ms": dense}
    row = {name: round(statistics.median(values), 1) if values else None for name, values in medians.items()}
    return row | {"ttft_runs_ms": [round(value, 1) for value in alone]}


def _rate(streams: Sequence[Stream], load: Load) -> tuple[float | None, float | None]:
    """Tokens a second while all decode, and milliseconds a step; None when they did not run together."""
    try:
        rate = decode_rate(streams)
    except Unfit:
        return None, None
    return round(rate, 1), round(1000 * load.requests / rate, 3)


def hit_rate(before: Row | None, after: Row | None) -> float | None:
    """Share of chosen chunks that were on the device, between two states of a server; None where none was chosen."""
    if before is None or after is None:
        return None

    def chosen(state: Row) -> float:
        rate = state["chunk_fetch_hit_rate"]
        return 0.0 if rate is None or rate == 1.0 else state["chunk_fetch_bytes"] / (1 - rate)

    fetched, wanted = after["chunk_fetch_bytes"] - before["chunk_fetch_bytes"], chosen(after) - chosen(before)
    return round(1 - fetched / wanted, 4) if wanted > 0 else None


def held(streams: Sequence[Stream]) -> Row:
    """What the requests hold once they are compressed: pool tokens, share of stock's, host bytes, heads."""
    records = [stream.meta.get("kv_compressor") for stream in streams]
    stock = [stream.meta["prompt_tokens"] + 1 for stream in streams]
    if None in records:
        return {"kv_of_stock": 1.0, "pool_tokens": sum(stock), "host_bytes": 0, "compressed": 0}
    tokens = [record["resident_ratio"] * number for record, number in zip(records, stock, strict=True)]
    row: Row = {"kv_of_stock": round(sum(tokens) / sum(stock), 4), "pool_tokens": round(sum(tokens))}
    row |= {"host_bytes": sum(record["host_bytes"] for record in records)}
    row |= {name: records[-1][name] for name in ("static_heads", "dynamic_heads")}
    return row | {"compressed": sum(record["compressed"] for record in records)}


def measure(client: Client, load: Load, kind: str) -> Row:
    """All of one load and head type but the wall."""
    warm = client.prompt(min(load.prompt_tokens, 2048))
    for _ in range(2):  # what is made on first use is made here: of a new prompt, and of a prefix hit
        client.ask(warm, 4)
    row = _first_tokens(client, load, kind)
    client.flush()
    prompts = [client.prompt(load.prompt_tokens) for _ in range(load.requests)]
    before = client.server.compressor_state()
    cold = client.ask_all(prompts, load.new_tokens)
    after = client.server.compressor_state()
    again = client.ask_all(prompts, load.new_tokens)
    for name, streams in (("", cold), ("_hit", again)):
        rate, step = _rate(streams, load)
        row |= {f"decode_tok_s{name}": rate, f"step_ms{name}": step}
        row[f"ttft_all{name}_ms"] = round(max(stream.ttft_ms for stream in streams), 1)
    row["cached_share"] = round(again[-1].meta.get("cached_tokens", 0) / load.prompt_tokens, 3)
    row["chunk_hit_rate"] = hit_rate(before, after)
    if before is not None and after is not None:
        fetched = after["chunk_fetch_bytes"] - before["chunk_fetch_bytes"]
        row["fetched_bytes_per_step"] = round(fetched / (load.new_tokens - 1))
    return row | held(cold)


def measure_wall(client: Client, load: Load) -> Row:
    """More requests at once than stock's pool holds: throughput and time until the last one has its answer."""
    client.flush()
    prompts = [client.prompt(load.prompt_tokens) for _ in range(load.requests)]
    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=load.requests) as clients:
        streams = list(clients.map(lambda ids: client.ask(ids, load.new_tokens), prompts))
    row = summary(streams, time.perf_counter() - started)
    records = [stream.meta.get("kv_compressor") or {"compressed": False} for stream in streams]
    return row | {"compressed": sum(record["compressed"] for record in records)}


def server_rows(plan: Plan, setup: Setup, seed: int) -> Iterator[Row]:
    """Start a server, yield a row for each of its head types and loads, then one of the wall, and stop it.

    What goes wrong is a last row with its `error`.
    """
    row: Row = {"setup": setup.name, "server": setup.kind, "attention_backend": setup.backend, "device": plan.device}
    row |= {"max_total_tokens": plan.pool_tokens, "chunked_prefill_size": CHUNK_TOKENS[plan.device], "seed": seed}
    try:
        model = plan.checkpoint
        with tempfile.TemporaryDirectory() as folder:
            flags, env = flags_of(plan, setup, model, Path(folder))
            row |= {"model": model.name, "flags": flags}
            started = time.monotonic()
            name = f"e2e-{setup.name.replace(':', '-')}"
            with Server(model, flags, env, name=name, ready_seconds=plan.server_seconds) as server:
                row["startup_s"] = round(time.monotonic() - started, 1)
                for measured in _measurements(server, plan, setup, started + plan.server_seconds, seed):
                    yield row | measured
    except Exception as error:
        traceback.print_exc()
        yield row | {"measured": "nothing", "error": f"{type(error).__name__}: {error}"[-MOST_WORDS:]}


def _measurements(server: Server, plan: Plan, setup: Setup, deadline: float, seed: int) -> Iterator[Row]:
    clients = {
        heads: Client(server, share, deadline, 10_000 * (seed + number))
        for number, (heads, share) in enumerate(setup.heads.items())
    }
    _wait_for_growth(server, deadline)
    for heads, client in clients.items():
        for load in plan.loads:
            yield {"measured": "load", "heads": heads, **dataclasses.asdict(load)} | measure(client, load, setup.kind)
    if plan.wall is not None:
        heads, client = next(iter(clients.items()))
        yield {"measured": "wall", "heads": heads, **dataclasses.asdict(plan.wall)} | measure_wall(client, plan.wall)


def _wait_for_growth(server: Server, deadline: float) -> None:
    """Come back when the host store has grown to its limit: memory that is pinned meanwhile would disturb timings."""
    while (state := server.compressor_state()) is not None and time.monotonic() < deadline:
        store = state["host_store"]
        if store["pinned_bytes"] >= store["limit_bytes"]:
            return
        time.sleep(0.5)


def e2e_rows(plan: Plan, some: Sequence[Setup], seed: int) -> Iterator[Row]:
    """The rows of these servers, judged. A server that fails is a row, and the next one still runs."""
    rows: list[Row] = []
    for setup in some:
        for row in server_rows(plan, setup, seed):
            rows.append(judge(row, rows, has_gpu=plan.device == "cuda"))
            yield rows[-1]
