"""Measure what compression saves: resident KV per prompt, and requests that run at once in the same pool.

``python -m benchmarks.bench_memory --json`` prints one JSON object a row and nothing else on
stdout. The rows are explained in README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.harness import NotCompressed, Server, compression_flags, end_on_sigterm, engine_flags, parallel
from benchmarks.models.make_models import make_model
from benchmarks.provenance import run_metadata

BUDGETS = (0.05, 0.1, 0.2, 0.5, 1.0)
PROMPT_TOKENS = (4096, 8192, 16384)
RESIDENT_NEW_TOKENS = 16
ADMISSION_BUDGET = 0.1
VOCABULARY = 256
"""Random prompts draw from the byte tokens, which every tokenizer here has."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AdmissionLoad:
    """`requests` with distinct prefixes at once, in a pool in which about `stock_requests` fit without compression."""

    requests: int = 60
    prompt_tokens: int = 4096
    new_tokens: int = 128
    stock_requests: int = 10

    def pool_tokens(self) -> int:
        """Size of the pool, as --max-total-tokens."""
        return self.stock_requests * (self.prompt_tokens + self.new_tokens)


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    """Return token ids that share no prefix with those of another seed."""
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, num_tokens).tolist()
    return ids


def _sampling(num_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": num_tokens, "ignore_eos": True}


def _resident_row(server: Server, budget: float, prompt_tokens: int) -> Row:
    answer = server.generate(
        input_ids=random_prompt(prompt_tokens, prompt_tokens), sampling_params=_sampling(RESIDENT_NEW_TOKENS)
    )
    record = answer["meta_info"].get("kv_compressor") or {
        "compressed": False,
        "reason": "meta_info has no kv_compressor",
    }
    if not record["compressed"]:
        raise NotCompressed(f"budget {budget}, {prompt_tokens} tokens: served dense ({record['reason']})")
    state = server.compressor_state() or {}
    return {
        "bench": "memory",
        "budget": budget,
        "prompt_tokens": prompt_tokens,
        "new_tokens": RESIDENT_NEW_TOKENS,
        "resident_ratio": record["resident_ratio"],
        # These are peaks of the server so far. They belong to this request because prompt lengths go up.
        "device_kv_bytes": state["peak_device_kv_bytes"],
        "stock_kv_bytes": state["peak_stock_kv_bytes"],
        "host_bytes": record["host_bytes"],
        "static_heads": record["static_heads"],
        "dynamic_heads": record["dynamic_heads"],
    }


def resident_rows(model: Path, budgets: list[float], prompt_tokens: list[int], dtype: str | None) -> Iterator[Row]:
    """Yield one row per budget and prompt length; one server per budget."""
    longest = max(prompt_tokens)
    # The pool holds the prompt, its compressed pages at budget 1.0 and the generated tokens, with room to spare.
    recipe = engine_flags(
        max_total_tokens=2 * longest + 4096, max_running_requests=2, chunked_prefill_size=2048, dtype=dtype
    )
    for budget in budgets:
        with Server(model, [*recipe.flags, *compression_flags(budget)], recipe.env, name=f"memory-{budget}") as server:
            for length in sorted(prompt_tokens):
                yield _resident_row(server, budget, length)


def admission_row(model: Path, budget: float | None, load: AdmissionLoad, dtype: str | None) -> Row:
    """Return the row of stock SGLang (no budget) or of compression, of one server that is started for it."""
    pool = load.pool_tokens()
    recipe = engine_flags(
        max_total_tokens=pool, max_running_requests=load.requests + 4, chunked_prefill_size=2048, dtype=dtype
    )
    name = "stock" if budget is None else "hybridkv"
    # The scheduler reports its running requests every fourth decode step.
    flags = [*recipe.flags, "--decode-log-interval", "4", *compression_flags(budget)]

    def one(i: int) -> Any:
        ids = random_prompt(1000 + i, load.prompt_tokens)
        answer = server.generate(input_ids=ids, sampling_params=_sampling(load.new_tokens))
        return answer["meta_info"]

    with Server(model, flags, recipe.env, name=f"admission-{name}") as server:
        started = time.perf_counter()
        answers = parallel(one, range(load.requests))
        seconds = time.perf_counter() - started
        running, queued = server.log_maximum("#running-req"), server.log_maximum("#queue-req")
    compressed = sum(bool((meta.get("kv_compressor") or {}).get("compressed")) for meta in answers)
    if budget is not None and not compressed:
        raise NotCompressed("admission: no request was compressed")
    return {
        "bench": "admission",
        "server": name,
        "budget": budget,
        "max_total_tokens": pool,
        "requests": load.requests,
        "compressed_requests": compressed,
        "prompt_tokens": load.prompt_tokens,
        "new_tokens": load.new_tokens,
        "max_running": running,
        "max_queued": queued,
        "retractions": sum(meta.get("num_retractions") or 0 for meta in answers),
        "seconds": round(seconds, 2),
    }


def admission_rows(model: Path, load: AdmissionLoad, dtype: str | None = None) -> Iterator[Row]:
    """Yield a row for stock SGLang, one for compression, and their ratio."""
    stock = admission_row(model, None, load, dtype)
    yield stock
    compressed = admission_row(model, ADMISSION_BUDGET, load, dtype)
    yield compressed
    ratio = compressed["max_running"] / max(stock["max_running"], 1)
    yield {"bench": "admission", "server": "ratio", "budget": ADMISSION_BUDGET, "max_running_ratio": round(ratio, 2)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object a row; else a readable line a row")
    parser.add_argument("--only", choices=["memory", "admission"], help="run one of the two parts")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=list(BUDGETS), help="budget ratios of the memory part"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=list(PROMPT_TOKENS), help="prompt lengths of the memory part"
    )
    parser.add_argument("--requests", type=int, default=AdmissionLoad().requests, help="requests of the admission part")
    parser.add_argument("--model", type=Path, help="checkpoint (default: tiny-qwen2, made when it is not there)")
    parser.add_argument("--dtype", help="as SGLang's --dtype")
    return parser.parse_args()


def main() -> int:
    """Run the benches; return 1 when a server did not compress."""
    args = _arguments()
    end_on_sigterm()
    model = args.model or make_model("tiny-qwen2")
    origin = run_metadata() | {"model": model.name}
    parts: dict[str, tuple[int, Iterator[Row]]] = {
        "memory": (
            len(args.budgets) * len(args.prompt_tokens),
            resident_rows(model, args.budgets, args.prompt_tokens, args.dtype),
        ),
        "admission": (3, admission_rows(model, AdmissionLoad(args.requests), args.dtype)),
    }
    runs = [part for name, part in parts.items() if args.only in (None, name)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("bench_memory", total=sum(count for count, _ in runs))
        try:
            for row in itertools.chain.from_iterable(rows for _, rows in runs):
                line = ", ".join(f"{key} {value}" for key, value in row.items())
                print(json.dumps(row | origin) if args.json else line, flush=True)
                progress.advance(task)
        except NotCompressed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
