"""Measure throughput across the memory wall: more and more clients ask a server whose KV pool holds a few prompts.

``python -m benchmarks.bench_wall --engine cpu --json`` starts stock SGLang, the same with the plugin off, and a
compressing server, one after another. Each has the same pool and answers the same requests, of clients that send the
next one when the last is answered: every prompt of its own, or with a long beginning that all share. It prints one JSON
object a row; README.md explains them. `--resume ROWS` measures what is not in ROWS yet, `--plot ROWS` draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from benchmarks.bench_memory import random_prompt
from benchmarks.bench_serving import (
    MODEL,
    ServerKind,
    Stream,
    Unfit,
    check_service,
    make_server,
    server_kinds,
    stream_answer,
)
from benchmarks.harness import Server, ServerError, end_on_sigterm
from benchmarks.models.make_models import SPECS, make_model
from benchmarks.provenance import run_metadata

SERVERS = ("stock", "none", "dense", "hybridkv")
PREFIXES = ("distinct", "shared")
LEAST_REQUESTS = 4
MS = 1000.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """What is asked at one point of a curve.

    Attributes
    ----------
    prefix : "distinct" prompts, or "shared" ones, which begin alike.
    clients : that ask at once.
    repeat : which of the runs; each has prompts of its own.
    """

    prefix: str
    clients: int
    repeat: int

    @property
    def requests(self) -> int:
        """Two of each client, so that the pool is full for half of the time and more."""
        return max(LEAST_REQUESTS, 2 * self.clients)

    def prompts(self, num_tokens: int, num_shared: int) -> list[list[int]]:
        """Of `num_tokens` each, of which the first `num_shared` are those of all where they are shared."""
        seed = 10_000 * (PREFIXES.index(self.prefix) + 1) + 1_000 * self.repeat + 10 * self.clients
        common = random_prompt(seed, num_shared if self.prefix == "shared" else 0)
        own = num_tokens - len(common)
        return [common + random_prompt(1_000 * seed + place, own) for place in range(self.requests)]


def most_at_once(streams: Sequence[Stream]) -> int:
    """How many requests decoded at the same time, each from its first token to its last."""
    changes = sorted(
        [(stream.events[0][0], 1) for stream in streams] + [(stream.events[-1][0], -1) for stream in streams],
    )
    return int(np.cumsum([change for _, change in changes]).max())


def gaps_ms(streams: Sequence[Stream]) -> list[float]:
    """Milliseconds between the tokens of each request; tokens that came together share theirs."""
    return [
        MS * (after - before) / (total - known)
        for stream in streams
        for (before, known), (after, total) in zip(stream.events, stream.events[1:], strict=False)
        for _ in range(total - known)
    ]


def summary(streams: Sequence[Stream], seconds: float) -> Row:
    """The numbers of one run, of all its requests."""
    metas = [stream.meta for stream in streams]
    prompt_tokens = sum(meta["prompt_tokens"] for meta in metas)
    ttfts, gaps = [stream.ttft_ms for stream in streams], gaps_ms(streams)
    return {
        "requests": len(streams),
        "seconds": round(seconds, 2),
        "tok_s": round(sum(stream.events[-1][1] for stream in streams) / seconds, 2),
        **{f"ttft_ms_p{share}": round(float(np.percentile(ttfts, share)), 1) for share in (50, 95)},
        **{f"itl_ms_p{share}": round(float(np.percentile(gaps, share)), 2) for share in (50, 95)},
        "most_at_once": most_at_once(streams),
        "retractions": sum(meta.get("num_retractions") or 0 for meta in metas),
        "cached_share": round(sum(meta.get("cached_tokens") or 0 for meta in metas) / prompt_tokens, 3),
        "resident_ratio": (metas[-1].get("kv_compressor") or {}).get("resident_ratio"),
    }


def _run(server: Server, kind: ServerKind, load: Load, args: argparse.Namespace) -> Row:
    prompts = load.prompts(args.prompt_tokens, args.shared_tokens)
    server.client.post("/flush_cache", params={"timeout": 30}).raise_for_status()
    before = (server.compressor_state() or {}).get("compressed_requests", 0)
    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=load.clients) as clients:
        streams = list(clients.map(lambda ids: stream_answer(server, ids, args.new_tokens), prompts))
    seconds = time.perf_counter() - started
    state = server.compressor_state()
    metas = [stream.meta for stream in streams]
    check_service(kind, metas, None if state is None else state["compressed_requests"] - before)
    return summary(streams, seconds)


def _key(row: Row) -> tuple[Any, ...]:
    return (row["server"], row["budget"], row["prefix"], row["clients"], row["repeat"])


def rows_of(kind: ServerKind, loads: Sequence[Load], args: argparse.Namespace, model: Path) -> Iterator[Row]:
    """Start a server, yield a row a load and stop it."""
    sizes = {"max_total_tokens": args.pool_tokens, "max_running": args.max_running}
    with make_server(kind, args, model, "wall", **sizes) as server:
        for ids in (random_prompt(1, args.prompt_tokens), random_prompt(2, args.prompt_tokens)):
            stream_answer(server, ids, args.new_tokens)  # what is made on first use is made here
        for load in loads:
            found = _run(server, kind, load, args)
            point = {"prefix": load.prefix, "clients": load.clients, "repeat": load.repeat}
            yield {"bench": "wall", "server": kind.name, "budget": kind.budget, **point, **found}


def ratio_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """Tokens a second of the other servers over those of stock with as many clients: mean and range of repeats."""
    rates = {_key(row): row["tok_s"] for row in rows}
    points: dict[tuple[Any, ...], list[float]] = {}
    for (server, budget, prefix, clients, repeat), rate in rates.items():
        stock = rates.get(("stock", None, prefix, clients, repeat))
        if server != "stock" and stock is not None:
            points.setdefault((server, budget, prefix, clients), []).append(rate / stock)
    for (server, budget, prefix, clients), found in points.items():
        yield {
            "bench": "wall",
            "server": "ratio",
            "of": server,
            "budget": budget,
            "prefix": prefix,
            "clients": clients,
            "tok_s_over_stock": round(statistics.mean(found), 3),
            "range": [round(min(found), 3), round(max(found), 3)],
        }


def draw(rows: Sequence[Row], path: Path) -> None:
    """Tokens a second and time to first token over the number of clients; bars reach from least to most of the runs."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["server"] != "ratio"]
    prefixes = [prefix for prefix in PREFIXES if any(row["prefix"] == prefix for row in rows)]
    figure = Figure(figsize=(5 * len(prefixes), 7), layout="constrained")
    panels = figure.subplots(2, len(prefixes), squeeze=False, sharex=True)
    names = {"tok_s": "answered tokens a second", "ttft_ms_p50": "ms to the first token, median (logarithmic)"}
    for column, prefix in enumerate(prefixes):
        for (field, label), axes in zip(names.items(), panels[:, column], strict=True):
            for server, budget in dict.fromkeys((row["server"], row["budget"]) for row in rows):
                points: dict[int, list[float]] = {}
                for row in rows:
                    if (row["server"], row["budget"], row["prefix"]) == (server, budget, prefix):
                        points.setdefault(row["clients"], []).append(row[field])
                means = [statistics.mean(values) for _, values in sorted(points.items())]
                low = [mean - min(values) for mean, (_, values) in zip(means, sorted(points.items()), strict=True)]
                high = [max(values) - mean for mean, (_, values) in zip(means, sorted(points.items()), strict=True)]
                name = server if budget is None else f"{server}, budget {budget:g}"
                axes.errorbar(sorted(points), means, yerr=[low, high], marker="o", capsize=3, label=name)
            axes.set_ylabel(label)
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        panels[0, column].set_ylim(bottom=0)
        panels[1, column].set_yscale("log")
        repeats = len({row["repeat"] for row in rows})
        panels[0, column].set_title(f"{prefix} prompts, {repeats} runs a point")
        panels[1, column].set_xlabel("clients at once (logarithmic)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _arguments() -> argparse.Namespace:
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object a row; else a readable line a row")
    add("--engine", choices=["cpu", "cuda"], default="cpu", help="where the servers run")
    add("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="what to compare")
    add("--budgets", type=float, nargs="+", default=[0.1], help="one hybridkv server each")
    add("--prefixes", nargs="+", choices=PREFIXES, default=list(PREFIXES), help="prompts of their own, or that share")
    add("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="that ask at once")
    add("--prompt-tokens", type=int, default=2048, help="of each request")
    add("--shared-tokens", type=int, default=1536, help="of them, the beginning of all where they share one")
    add("--new-tokens", type=int, default=192, help="generated tokens of each request")
    add("--pool-tokens", type=int, default=9216, help="max_total_tokens of all servers")
    add("--max-running", type=int, default=16, help="max_running_requests of all servers")
    add("--repeats", type=int, default=2, help="runs of each point")
    add("--chunked-prefill-size", type=int, default=2048, help="as SGLang's, for all servers")
    add("--dtype", help="as SGLang's, for all servers")
    add("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)), help="OMP_NUM_THREADS of the servers")
    add("--model", default=MODEL, help="folder of a checkpoint, or the name of a tiny one to make")
    add("--resume", type=Path, metavar="ROWS", help="rows of an earlier run with the same settings")
    add("--plot", type=Path, metavar="ROWS", help="draw these rows; nothing is measured")
    add("--out", type=Path, default=Path("wall.png"), help="file of --plot")
    args = parser.parse_args()
    for name in ("clients", "max_running", "prompt_tokens", "shared_tokens", "new_tokens", "pool_tokens", "repeats"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    if args.shared_tokens >= args.prompt_tokens:
        parser.error(f"--shared-tokens {args.shared_tokens}: expected fewer than --prompt-tokens {args.prompt_tokens}")
    return args


def main() -> int:
    """Run the bench; return 1 when a server did not do what its rows would say."""
    args = _arguments()
    if args.plot is not None:
        draw(_read(args.plot), args.out)
        return 0
    end_on_sigterm()
    model = make_model(args.model) if args.model in SPECS else Path(args.model)
    recorded = ("engine", "threads", "prompt_tokens", "shared_tokens", "new_tokens", "pool_tokens")
    recorded += ("max_running", "chunked_prefill_size", "dtype")
    origin = {name: getattr(args, name) for name in recorded} | {"model": model.name} | run_metadata()
    rows = [] if args.resume is None else [row for row in _read(args.resume) if row["server"] != "ratio"]
    for row in rows:
        for name in recorded:
            if row[name] != origin[name]:
                print(f"--resume {args.resume}: it has {name} {row[name]}, not {origin[name]}", file=sys.stderr)
                return 1
    known = {_key(row) for row in rows}
    loads = [Load(*point) for point in _points(args)]
    kinds = server_kinds(args.servers, args.budgets, args.engine)
    left = {
        kind: [load for load in loads if (kind.name, kind.budget, load.prefix, load.clients, load.repeat) not in known]
        for kind in kinds
    }

    def put(row: Row) -> None:
        line = ", ".join(f"{key} {value}" for key, value in row.items())
        print(json.dumps(row) if args.json else line, flush=True)

    for row in rows:
        put(row)
    with Progress(console=Console(stderr=True, soft_wrap=True)) as progress:
        task = progress.add_task("bench_wall", total=sum(load.requests for some in left.values() for load in some))
        try:
            for kind, some in left.items():
                for load, row in zip(some, rows_of(kind, some, args, model) if some else (), strict=True):
                    rows.append(row | origin)
                    put(rows[-1] if args.json else row)
                    progress.advance(task, load.requests)
        except (Unfit, ServerError, httpx.HTTPError) as error:
            progress.console.print(f"[bold red]error[/]: {escape(str(error))}")
            return 1
    for row in ratio_rows(rows):
        put(row | origin if args.json else row)
    return 0


def _points(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    for repeat in range(args.repeats):
        for prefix in args.prefixes:
            for clients in args.clients:
                yield prefix, clients, repeat


if __name__ == "__main__":
    sys.exit(main())
