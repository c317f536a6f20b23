"""Measure how fast servers answer: decode tokens per second of a batch, and time to first token of a cold prompt.

``python -m benchmarks.bench_serving --engine cpu --json`` starts stock SGLang, the same with the plugin off, our
kernels without compression and compression at two budgets, one after another, and prints one JSON object a row and
nothing else on stdout. The rows are explained in README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from benchmarks.bench_memory import random_prompt
from benchmarks.harness import Server, ServerError, compression_flags, end_on_sigterm, engine_flags, parallel
from benchmarks.models.make_models import SPECS, make_model
from benchmarks.provenance import run_metadata

MODEL = "tiny-qwen2_5_vl-d128"
SERVERS = ("stock", "none", "dense", "hybridkv")
BUDGETS = (1.0, 0.1)
RATIO_BUDGET = 0.1
WARM_UP_TOKENS = 1024
TTFT_NEW_TOKENS = 2
POOL_SLACK_TOKENS = 8192

Row = dict[str, Any]


class Unfit(RuntimeError):
    """A server did not do what its rows would say."""


@dataclass(frozen=True)
class ServerKind:
    """One server of the comparison. `budget` is None where nothing is compressed; `flags` follow the common ones."""

    name: str
    budget: float | None
    flags: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.name if self.budget is None else f"{self.name} {self.budget:g}"


@dataclass(frozen=True)
class Stream:
    """What one streamed request showed. `events`: (time in seconds, tokens generated so far), at least one."""

    ttft_ms: float
    events: tuple[tuple[float, int], ...]
    meta: dict[str, Any]


def server_kinds(names: Sequence[str], budgets: Sequence[float], engine: str) -> list[ServerKind]:
    """Return the servers to start, in the order of SERVERS; "hybridkv" stands for one a budget."""
    # SGLang cannot page on the CPU engine, so that the plugin's page size is only asked of it on a GPU.
    paged = ("--page-size", "16") if engine == "cuda" else ()
    dense = compression_flags(1.0, {"min_prompt_tokens": 10**9})
    kinds = {
        "stock": [ServerKind("stock", None, ())],
        "none": [ServerKind("none", None, ("--kv-compressor", "none", *paged))],
        "dense": [ServerKind("dense", None, tuple(dense))],
        "hybridkv": [ServerKind("hybridkv", budget, tuple(compression_flags(budget))) for budget in budgets],
    }
    return [kind for name in SERVERS if name in names for kind in kinds[name]]


def decode_rate(streams: Sequence[Stream]) -> float:
    """Return tokens per second of the batch while all its requests decode.

    The window opens when the last request has its first token and closes when the first one ends. In it each request
    counts from its own first to its own last token, so that no step is cut in two. Raises Unfit when less than half of
    a request's tokens fall into the window: the requests did not run together.
    """
    start = max(stream.events[0][0] for stream in streams)
    end = min(stream.events[-1][0] for stream in streams)
    rate = 0.0
    for stream in streams:
        window = [event for event in stream.events if start <= event[0] <= end]
        tokens = window[-1][1] - window[0][1] if len(window) > 1 else 0
        if 2 * tokens < stream.events[-1][1] - 1 or not tokens:
            raise Unfit(f"{tokens} of {stream.events[-1][1]} tokens came while all requests were decoding")
        rate += tokens / (window[-1][0] - window[0][0])
    return rate


def ratio_row(rows: Sequence[Row], batch: int) -> Row:
    """Return the quotients that the rows are measured for; None where a server was left out."""
    key = itemgetter("server", "budget")
    rates = {key(row): row["decode_tok_s"] for row in rows if row["decode_tok_s"] and row["batch"] == batch}
    ttfts = {key(row): row["ttft_ms"] for row in rows if row["decode_tok_s"] is None}
    ours, full = ("hybridkv", RATIO_BUDGET), ("hybridkv", 1.0)
    dense, none, stock = ("dense", None), ("none", None), ("stock", None)

    def over(values: dict[Any, float], a: Any, b: Any) -> float | None:
        return round(values[a] / values[b], 3) if a in values and b in values else None

    growth = over(ttfts, ours, dense)
    return {
        "bench": "serving",
        "server": "ratio",
        "budget": RATIO_BUDGET,
        "batch": batch,
        "hybridkv_over_dense": over(rates, ours, dense),
        "hybridkv_over_stock": over(rates, ours, stock),
        "hybridkv_1_over_dense": over(rates, full, dense),
        "dense_over_stock": over(rates, dense, stock),
        "none_over_stock": over(rates, none, stock),
        "ttft_growth": None if growth is None else round(growth - 1, 3),
        "ttft_over_stock": over(ttfts, ours, stock),
        "dense_ttft_over_stock": over(ttfts, dense, stock),
    }


def stream_answer(server: Server, ids: list[int], new_tokens: int, **body: Any) -> Stream:
    """Ask for one answer of exactly `new_tokens` tokens and time it; ServerError when it ends otherwise."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body |= {"input_ids": ids, "sampling_params": sampling}
    events: list[tuple[float, int]] = []
    meta: dict[str, Any] = {}
    sent = time.perf_counter()
    with server.stream("/generate", body) as answers:
        for event in answers:
            if "error" in event:
                raise ServerError(f"generate: {event['error']}")
            meta = event["meta_info"]
            if not events or meta["completion_tokens"] > events[-1][1]:
                events.append((time.perf_counter(), meta["completion_tokens"]))
    if not events or events[-1][1] != new_tokens:
        raise ServerError(f"generate: expected {new_tokens} tokens, got {events[-1][1] if events else 0}")
    return Stream((events[0][0] - sent) * 1000, tuple(events), meta)


def _run_batch(server: Server, batch: int, prompt_tokens: int, new_tokens: int, seed: int) -> list[Stream]:
    """Send `batch` distinct prompts at once to an empty cache; all are prefilled before any decodes."""
    server.client.post("/flush_cache", params={"timeout": 30}).raise_for_status()
    prompts = [random_prompt(1000 * seed + i, prompt_tokens) for i in range(batch)]
    streams = parallel(lambda ids: stream_answer(server, ids, new_tokens), prompts)
    for stream in streams:
        # The limit is not 0, as random prompts may begin with the same token.
        if stream.meta.get("cached_tokens", 0) > prompt_tokens // 100:
            raise Unfit(f"{stream.meta['cached_tokens']} tokens of a prompt were cached")
    return streams


def check_service(kind: ServerKind, metas: Sequence[dict[str, Any]], num_compressed: int | None) -> None:
    """Raise Unfit unless the server compressed every request (`kind` has a budget) or none.

    `metas` is the `meta_info` of each request; `num_compressed` counts them on the server, None without compressor.
    """
    if (num_compressed is not None) != (kind.name in ("dense", "hybridkv")):
        raise Unfit(f"{kind.label}: /server_info has {'no' if num_compressed is None else 'a'} kv_compressor")
    expected = kind.budget is not None
    for meta in metas:
        record = meta.get("kv_compressor") or {"compressed": False, "reason": "meta_info has no kv_compressor"}
        if record["compressed"] != expected:
            raise Unfit(f"{kind.label}: expected compressed = {expected}, got {record}")
    if num_compressed is not None and num_compressed != (len(metas) if expected else 0):
        raise Unfit(f"{kind.label}: the server compressed {num_compressed} of {len(metas)} requests")


def _measure(server: Server, kind: ServerKind, batch: int, args: argparse.Namespace, progress: Progress) -> Row:
    """Measure one batch size; batch 0 stands for the time to first token alone."""
    length, new = (args.prompt_tokens, args.new_tokens) if batch else (args.ttft_prompt_tokens, TTFT_NEW_TOKENS)
    before = (server.compressor_state() or {}).get("compressed_requests", 0)
    runs = []
    for seed in range(args.repeats):
        runs.append(_run_batch(server, batch or 1, length, new, seed + 10 * (batch + 1)))
        progress.advance(progress.task_ids[0])
    state = server.compressor_state()
    metas = [stream.meta for run in runs for stream in run]
    check_service(kind, metas, None if state is None else state["compressed_requests"] - before)
    rates = [round(decode_rate(run), 2) for run in runs] if batch else []
    ttfts = [round(max(stream.ttft_ms for stream in run), 1) for run in runs]
    return {
        "bench": "serving",
        "server": kind.name,
        "budget": kind.budget,
        "prompt_tokens": length,
        "batch": batch or 1,
        "decode_tok_s": round(statistics.median(rates), 2) if rates else None,
        "ttft_ms": round(statistics.median(ttfts), 1),
        "new_tokens": new,
        "decode_tok_s_runs": rates,
        "ttft_ms_runs": ttfts,
        "resident_ratio": (metas[-1].get("kv_compressor") or {}).get("resident_ratio"),
        "page_size": server.server_info()["page_size"],
    }


def make_server(
    kind: ServerKind, args: argparse.Namespace, model: Path, bench: str, *, max_total_tokens: int, max_running: int
) -> Server:
    """A server of the comparison that is not started yet; engine, dtype, threads and chunk size are those of `args`."""
    recipe = engine_flags(
        args.engine,
        max_total_tokens=max_total_tokens,
        max_running_requests=max_running,
        chunked_prefill_size=args.chunked_prefill_size,
        dtype=args.dtype,
    )
    # In production a GPU server chooses its own attention backend.
    free = ("--attention-backend", "triton") if args.engine == "cuda" else ()
    flags = [flag for flag in recipe.flags if kind.name != "stock" or flag not in free] + list(kind.flags)
    env = {**recipe.env, "OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "passive"}
    return Server(model, flags, env, name=f"{bench}-{kind.label.replace(' ', '-')}")


def server_rows(kind: ServerKind, args: argparse.Namespace, model: Path, progress: Progress) -> Iterator[Row]:
    """Start a server, yield its rows and stop it: each batch size, then time to first token."""
    # More than run at once: SGLang counts a prompt that is prefilled in chunks twice, and would leave one waiting.
    sizes = {"max_total_tokens": args.max_total_tokens, "max_running": max(args.batches) + 4}
    with make_server(kind, args, model, "serving", **sizes) as server:
        progress.console.print(f"[bold]{kind.label}[/]  [dim]{server.log}[/]")
        # As many requests run at once as will be measured, so that what is made on first use is made here.
        _run_batch(server, max(args.batches), min(WARM_UP_TOKENS, args.prompt_tokens), 8, 0)
        for batch in [*args.batches, 0]:
            yield _measure(server, kind, batch, args, progress)


def _arguments() -> argparse.Namespace:
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object a row; else a readable line a row")
    add("--engine", choices=["cpu", "cuda"], required=True, help="where the servers run")
    add("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="what to compare")
    add("--budgets", type=float, nargs="+", default=list(BUDGETS), help="one hybridkv server each")
    add("--prompt-tokens", type=int, default=16384, help="prompts whose decoding is measured")
    add("--batches", type=int, nargs="+", default=[1, 4], help="requests at once")
    add("--new-tokens", type=int, default=64, help="generated tokens of each request")
    add("--ttft-prompt-tokens", type=int, default=8192, help="prompt of the time to first token")
    add("--repeats", type=int, default=3, help="runs of which the median counts")
    add("--chunked-prefill-size", type=int, default=2048, help="as SGLang's, for all servers")
    add("--max-total-tokens", type=int, help="as SGLang's, for all servers; None: every request fits twice")
    add("--dtype", help="as SGLang's, for all servers")
    add("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 2)), help="OMP_NUM_THREADS of the servers")
    add("--model", default=MODEL, help="folder of a checkpoint, or the name of a tiny one to make")
    args = parser.parse_args()
    longest = max(args.prompt_tokens + args.new_tokens, args.ttft_prompt_tokens + TTFT_NEW_TOKENS)
    # At budget 1.0 prompt and compressed pages are both there for a moment.
    args.max_total_tokens = args.max_total_tokens or 2 * longest * max(args.batches) + POOL_SLACK_TOKENS
    return args


def main() -> int:
    """Run the bench; return 1 when a server did not do what its rows would say."""
    args = _arguments()
    end_on_sigterm()
    model = make_model(args.model) if args.model in SPECS else Path(args.model)
    recorded = ("engine", "threads", "repeats", "chunked_prefill_size", "max_total_tokens", "dtype")
    origin = {name: getattr(args, name) for name in recorded} | {"model": model.name} | run_metadata()
    kinds = server_kinds(args.servers, args.budgets, args.engine)
    rows: list[Row] = []

    def put(row: Row) -> None:
        rows.append(row)
        line = ", ".join(f"{key} {value}" for key, value in row.items())
        print(json.dumps(row | origin) if args.json else line, flush=True)

    with Progress(console=Console(stderr=True, soft_wrap=True)) as progress:
        progress.add_task("bench_serving", total=len(kinds) * (len(args.batches) + 1) * args.repeats)
        try:
            for kind in kinds:
                for row in server_rows(kind, args, model, progress):
                    put(row)
        except (Unfit, ServerError, httpx.HTTPError) as error:
            progress.console.print(f"[bold red]error[/]: {escape(str(error))}")
            return 1
    put(ratio_row(rows, max(args.batches)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
