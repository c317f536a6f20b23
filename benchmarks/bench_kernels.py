"""Decode kernels on the CPU: one step of a compressed prompt beside our own full attention, layers rotated.

``python -m benchmarks.bench_kernels --json`` prints one JSON object a row and nothing else on stdout. Queries drift
from step to step as in decoding, so that a dynamic head's buffer holds part of the chunks it wants. The row says how
large that part is.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_check.pool import Pool, Request, Shape, first_heads, make_config
from benchmarks.provenance import run_metadata
from hybridkv_kernels import dispatch
from sglang_hybridkv.compressors.hybridkv import HybridKV

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, PAGE_SIZE = 4, 7, 128, 16
DYNAMIC_HEADS = {"static": 0, "hybrid": 1, "dynamic": NUM_KV_HEADS}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYERS = {2048: 28, 8192: 16, 32768: 6}


def make_pool(context: int, budget: float, dtype: torch.dtype, num_dynamic: int) -> tuple[Pool, Request, Request]:
    """A pool of random keys and values, and in it a dense prompt and a compressed one, with equal head budgets."""
    num_pages = context // PAGE_SIZE
    shape = Shape(dtype, PAGE_SIZE, GROUP_SIZE, HEAD_DIM, LAYERS.get(context, 8), NUM_KV_HEADS)
    pool = Pool(
        shape,
        HybridKV(make_config(shape, budget, num_dynamic / NUM_KV_HEADS)),
        # There are both prompts and what is reserved for the compressed one: its budget, and summaries of at most half
        # that size.
        num_pages=math.ceil((2.5 + budget) * num_pages) + 4,
        num_host_pages=num_pages + 1,
        max_context=context + PAGE_SIZE,
        num_rows=2,
        generator=torch.Generator().manual_seed(0),
    )
    dense, compressed = pool.add_prompt(context), pool.add_prompt(context)
    pool.compress(compressed, first_heads(shape, num_dynamic))
    pool.append_token(compressed)
    return pool, dense, compressed


def drifting_queries(steps: int, num_layers: int, similarity: float) -> torch.Tensor:
    """[steps, L, 1, H * G, D]: Gaussian queries with this cosine similarity between consecutive steps."""
    noise = torch.randn(steps, num_layers, 1, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM)
    for step in range(1, steps):
        noise[step] = similarity * noise[step - 1] + (1 - similarity**2) ** 0.5 * noise[step]
    return noise


def packed_sdpa(pool: Pool, dense: Request) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Full attention by torch with the group packed into the query rows, over keys that are contiguous already."""
    slots = pool.req_to_token[dense.row, : dense.seq_len].long()
    layers = [[rows[slots].transpose(0, 1)[None] for rows in pool.views.layer_rows(i)] for i in (0, 1, 2)]

    def attend(layer_idx: int, q: torch.Tensor) -> torch.Tensor:
        keys, values = layers[layer_idx % len(layers)]
        packed = q.view(1, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM)
        return torch.nn.functional.scaled_dot_product_attention(packed, keys, values)

    return attend


def time_steps(queries: torch.Tensor, functions: dict[str, Callable[[int, torch.Tensor], Any]]) -> dict[str, float]:
    """Median milliseconds a layer of each function. They take turns step by step, so that noise hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for step, layers in enumerate(queries):
        for name, function in functions.items():
            start = time.perf_counter()
            for layer_idx, q in enumerate(layers):
                function(layer_idx, q)
            if step:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / len(layers))
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def measure(context: int, budget: float, dtype: str, variant: str, similarity: float, steps: int) -> dict[str, Any]:
    """One row: a step of the variant beside full attention."""
    torch.manual_seed(0)
    pool, dense, compressed = make_pool(context, budget, DTYPES[dtype], DYNAMIC_HEADS[variant])
    queries = drifting_queries(steps, pool.shape.num_layers, similarity).to(DTYPES[dtype])
    functions = {
        "full": functools.partial(pool.attend, [dense]),
        "sdpa": packed_sdpa(pool, dense),
        "retrieve": functools.partial(pool.retrieve, [compressed]),
        "attend": functools.partial(pool.attend, [compressed]),
    }
    ms = time_steps(queries, functions)
    chosen, hit = pool.counters.tolist()
    total, full = ms["retrieve"] + ms["attend"], min(ms["full"], ms["sdpa"])
    row = {"bench": "decode_attn", "variant": variant, "context": context, "budget": budget, "dtype": dtype}
    row |= {"threads": torch.get_num_threads(), "ms": round(total, 4), "full_ms": round(full, 4)}
    row |= {"speedup": round(full / total, 2), "full_paged_ms": round(ms["full"], 4)}
    row |= {"full_packed_sdpa_ms": round(ms["sdpa"], 4), "query_similarity": similarity}
    row |= {"chunk_hit_rate": round(hit / chosen, 3) if chosen else None}
    row |= {"share_retrieve": round(ms["retrieve"] / total, 3), "share_decode_attn": round(ms["attend"] / total, 3)}
    return row | {"kernels": dispatch.describe("cpu", DTYPES[dtype], HEAD_DIM, GROUP_SIZE)}


def main() -> int:
    """Run the bench; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a row on stdout")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768], help="prompt tokens")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1], help="shares of the rows that are kept")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--variants", nargs="+", choices=list(DYNAMIC_HEADS), default=list(DYNAMIC_HEADS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    help_text = "cosine similarity of the queries of consecutive steps (default: 0.95)"
    parser.add_argument("--similarity", type=float, default=0.95, help=help_text)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    metadata, console = run_metadata(), Console(stderr=True)
    cases = [(c, b, d, v) for c in args.contexts for b in args.budgets for d in args.dtypes for v in args.variants]
    table = Table("context", "budget", "dtype", "variant", "ms a layer", "full ms", "speed-up", "hit rate")
    for case in cases:
        console.print(f"bench_kernels {case}", style="dim")
        row = measure(*case, args.similarity, args.steps)
        names = ("context", "budget", "dtype", "variant", "ms", "full_ms", "speedup", "chunk_hit_rate")
        table.add_row(*(str(row[name]) for name in names))
        if args.json:
            print(json.dumps(row | metadata), flush=True)
    (console if args.json else Console()).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
