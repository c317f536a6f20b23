"""Measure what metrics and plan events cost: one compressing server with both and one without, asked in turn.

``python -m benchmarks.bench_observers --json`` starts the two servers at once; while one decodes the other is idle.
Each round asks the same prompts of both, in an order that alternates, and gives a ratio of their decode rates, so that
what else the machine does falls on both alike. One JSON object comes last, with the mean ratio and its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
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


def _rate(server: Server, args: argparse.Namespace, seed: int) -> float:
    server.client.post("/flush_cache", params={"timeout": 30}).raise_for_status()
    prompts = [random_prompt(100 * seed + place, args.prompt_tokens) for place in range(args.batch)]
    streams = parallel(lambda ids: stream_answer(server, ids, args.new_tokens), prompts)
    if not all(stream.meta["kv_compressor"]["compressed"] for stream in streams):
        raise ServerError("a request was not compressed")
    return decode_rate(streams)


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


def main() -> int:
    """Run the bench."""
    args = _arguments()
    end_on_sigterm()
    model = make_model(args.model) if args.model in SPECS else Path(args.model)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    pool = 2 * args.batch * (args.prompt_tokens + args.new_tokens)
    recipe = engine_flags(args.engine, max_total_tokens=pool, chunked_prefill_size=2048)
    watched = [*compression_flags(0.1, {"events": endpoint}), "--enable-metrics"]
    servers = {
        name: Server(model, [*recipe.flags, *flags], recipe.env, name=name)
        for name, flags in (("watched", watched), ("plain", compression_flags(0.1)))
    }
    subscriber: Any = zmq.Context.instance().socket(zmq.SUB)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"")
    ratios: list[float] = []
    try:
        parallel(lambda server: server.start(), list(servers.values()))
        subscriber.connect(endpoint)
        for server in servers.values():
            _rate(server, args, 0)  # what is made on first use is made here
        with Progress(console=Console(stderr=True)) as progress:
            for seed in progress.track(range(1, args.rounds + 1), description="bench_observers"):
                order = list(servers) if seed % 2 else list(servers)[::-1]
                rates = {name: _rate(servers[name], args, seed) for name in order}
                servers["watched"].client.get("/metrics").raise_for_status()
                ratios.append(rates["watched"] / rates["plain"])
    finally:
        parallel(lambda server: server.stop(), list(servers.values()))
    events = 0
    while subscriber.poll(100):
        subscriber.recv_multipart()
        events += 1
    subscriber.close()
    mean, (low, high) = mean_and_interval(ratios)
    row = {
        "bench": "observers",
        "decode_rate_over_plain": round(mean, 4),
        "interval": [round(low, 4), round(high, 4)],
        "rounds": [round(ratio, 4) for ratio in ratios],
        "events": events,
        **{name: getattr(args, name) for name in ("engine", "batch", "prompt_tokens", "new_tokens")},
        "model": model.name,
        **run_metadata(),
    }
    words = f"with metrics and events: {mean:.4f} of the decode rate without ({low:.4f} to {high:.4f})"
    print(json.dumps(row) if args.json else words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
