"""Measure what metrics and plan events cost: one server with them and one without, asked in turn.

``python -m benchmarks.bench_observers --json`` does so for a compressing server, and then for stock SGLang, whose own
metrics are part of the first figure. The two servers of a pair are started at once; while one answers, the other is
idle. Each round asks the same prompts of both, in an order that alternates, so that what else the machine does falls
on both alike, and /metrics is read while the watched one answers. A round gives two ratios: of the decode rates, and
of the times from sending to the last token, which have the plans and their events in them. The rows, one JSON object
each, have the mean ratios and their 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from rich.console import Console
from rich.progress import Progress

from benchmarks.bench_memory import random_prompt
from benchmarks.bench_serving import MODEL, decode_rate, stream_answer
from benchmarks.harness import Server, ServerError, compression_flags, end_on_sigterm, engine_flags, free_port, parallel
from benchmarks.models.make_models import SPECS, make_model
from benchmarks.provenance import run_metadata

_DRAWS = 10_000


def mean_and_interval(ratios: list[float]) -> tuple[float, tuple[float, float]]:
    """Mean of the rounds, and the 95 % interval of a bootstrap over them."""
    draws = np.random.default_rng(0).choice(ratios, (_DRAWS, len(ratios))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return statistics.mean(ratios), (float(low), float(high))


def _measure(
    server: Server, args: argparse.Namespace, seed: int, *, compresses: bool, scrape: bool = False
) -> tuple[float, float]:
    """Tokens a second while all decode, and seconds from sending to the last token, summed over the requests."""
    server.client.post("/flush_cache", params={"timeout": 30}).raise_for_status()
    prompts = [random_prompt(100 * seed + place, args.prompt_tokens) for place in range(args.batch)]
    jobs = [partial(stream_answer, server, ids, args.new_tokens) for ids in prompts]
    scrapes = [lambda: server.client.get("/metrics").raise_for_status()] if scrape else []
    streams = parallel(lambda job: job(), [*jobs, *scrapes])[: len(jobs)]
    records = [stream.meta.get("kv_compressor") for stream in streams]
    if any((record is not None and record["compressed"]) != compresses for record in records):
        raise ServerError(f"expected compressed = {compresses}, got {records}")
    seconds = sum(one.ttft_ms / 1000 + one.events[-1][0] - one.events[0][0] for one in streams)
    return decode_rate(streams), seconds


def _arguments() -> argparse.Namespace:
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--json", action="store_true", help="print the row as JSON; else in words")
    add("--engine", choices=["cpu", "cuda"], default="cpu", help="where the servers run")
    add("--rounds", type=int, default=60, help="ratios of which the mean counts")
    add("--batch", type=int, default=1, help="requests at once")
    add("--prompt-tokens", type=int, default=2048, help="of each request")
    add("--new-tokens", type=int, default=256, help="generated tokens of each request")
    add("--model", default=MODEL, help="folder of a checkpoint, or the name of a tiny one to make")
    return parser.parse_args()


def compare(name: str, flags: list[str], watched: list[str], args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """The row of one pair: a server with `flags`, of compression or none, and one that has `watched`, too."""
    pool = 2 * args.batch * (args.prompt_tokens + args.new_tokens)
    recipe = engine_flags(args.engine, max_total_tokens=pool, chunked_prefill_size=2048)
    given = {"watched": [*flags, *watched], "plain": flags}
    servers = {one: Server(model, [*recipe.flags, *given[one]], recipe.env, name=f"{name}-{one}") for one in given}
    rates: list[float] = []
    times: list[float] = []
    try:
        parallel(lambda server: server.start(), list(servers.values()))
        for server in servers.values():
            _measure(server, args, 0, compresses=bool(flags))  # what is made on first use is made here
        with Progress(console=Console(stderr=True)) as progress:
            for seed in progress.track(range(1, args.rounds + 1), description=name):
                order = list(servers) if seed % 2 else list(servers)[::-1]
                found = {
                    one: _measure(servers[one], args, seed, compresses=bool(flags), scrape=one == "watched")
                    for one in order
                }
                (rate, seconds), (plain_rate, plain_seconds) = found["watched"], found["plain"]
                rates.append(rate / plain_rate)
                times.append(seconds / plain_seconds)
    finally:
        parallel(lambda server: server.stop(), list(servers.values()))
    row: dict[str, Any] = {"bench": "observers", "server": name}
    for field, ratios in (("decode_rate", rates), ("seconds", times)):
        mean, interval = mean_and_interval(ratios)
        row[f"{field}_over_plain"] = round(mean, 4)
        row[f"{field}_interval"] = [round(bound, 4) for bound in interval]
        row[f"{field}_rounds"] = [round(ratio, 4) for ratio in ratios]
    return row


def main() -> int:
    """Run the bench."""
    args = _arguments()
    end_on_sigterm()
    model = make_model(args.model) if args.model in SPECS else Path(args.model)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    subscriber: Any = zmq.Context.instance().socket(zmq.SUB)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"")
    subscriber.connect(endpoint)
    metrics = ["--enable-metrics"]
    pairs = {
        "hybridkv": (compression_flags(0.1), [*metrics, "--kv-compressor-events", endpoint]),
        "stock": ([], metrics),
    }
    asked = {name: getattr(args, name) for name in ("engine", "batch", "prompt_tokens", "new_tokens")}
    about = asked | {"model": model.name} | run_metadata()
    for name, (flags, watched) in pairs.items():
        row = compare(name, flags, watched, args, model)
        if name == "hybridkv":
            row["events"] = _drain(subscriber)
        words = f"{name}: {row['decode_rate_over_plain']} of the decode rate, {row['seconds_over_plain']} of the time"
        print(json.dumps(row | about) if args.json else words, flush=True)
    subscriber.close()
    return 0


def _drain(subscriber: Any) -> int:
    """How many events have arrived."""
    events = 0
    while subscriber.poll(100):
        subscriber.recv_multipart()
        events += 1
    return events


if __name__ == "__main__":
    sys.exit(main())
