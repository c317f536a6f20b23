"""Decode kernels on the CPU: one step of a compressed prompt beside our own full attention, layers rotated.

``python -m benchmarks.bench_kernels --json`` prints one JSON object a row and nothing else on stdout. Queries drift
from step to step as in decoding, so that part of the chunks a dynamic head wants is in its buffer; the row says which.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import run_metadata
from hybridkv_kernels import dispatch
from sglang_hybridkv.cache.compress import ObservedPrompt
from sglang_hybridkv.cache.compressed_cache import CompressedCache
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.requests.geometry import covered_tokens, prompt_geometry
from sglang_hybridkv.requests.ledger import Reservation

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, PAGE_SIZE = 4, 7, 128, 16
DYNAMIC_HEADS = {"static": 0, "hybrid": 1, "dynamic": NUM_KV_HEADS}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYERS = {2048: 28, 8192: 16, 32768: 6}
DENSE_ROW, COMPRESSED_ROW = 1, 2


@dataclass
class Case:
    """One prompt twice in one pool: dense in row 1, compressed in row 2."""

    cache: CompressedCache
    req_to_token: torch.Tensor
    context: int
    queries: torch.Tensor

    def full(self, layer_idx: int, q: torch.Tensor) -> torch.Tensor:
        """Attend to every row of the prompt."""
        return self._attend(layer_idx, q, DENSE_ROW, self.context)

    def retrieve(self, layer_idx: int, q: torch.Tensor) -> None:
        """Bring the chunk buffers up to date."""
        self.cache.retrieve(layer_idx, q, torch.tensor([COMPRESSED_ROW]))

    def compressed(self, layer_idx: int, q: torch.Tensor) -> torch.Tensor:
        """Attend to head pages and one row of tail."""
        return self._attend(layer_idx, q, COMPRESSED_ROW, self.context + 1)

    def _attend(self, layer_idx: int, q: torch.Tensor, row: int, seq_len: int) -> torch.Tensor:
        rows, lens = torch.tensor([row]), torch.tensor([seq_len])
        return self.cache.attend(layer_idx, q, rows, self.req_to_token, lens, HEAD_DIM**-0.5)


def make_case(context: int, budget: float, dtype: torch.dtype, variant: str, similarity: float, steps: int) -> Case:
    """Fill a pool with random keys and values, and compress the prompt with equal budgets for all heads."""
    num_layers, num_dynamic = LAYERS.get(context, 8), DYNAMIC_HEADS[variant]
    heads = num_layers * NUM_KV_HEADS
    share = num_dynamic / NUM_KV_HEADS
    config = HybridKVConfig(preset="paper", budget=budget, theta=0.5, dynamic_share=share, static_weight="uniform")
    vectors = config.summary_vectors(covered_tokens(context, PAGE_SIZE))
    sizes = {"page_size": PAGE_SIZE, "head_pages_per_page": heads, "summary_vectors": vectors}
    geometry = prompt_geometry(context, budget, **sizes)
    num_pages = context // PAGE_SIZE
    pages_per_layer = 2 + num_pages + geometry.num_pages
    shape = (num_layers, pages_per_layer * PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape).to(dtype) for _ in range(2))
    cache = CompressedCache.create(
        keys,
        values,
        HybridKV(config),
        num_rows=3,
        max_prompt_tokens=context,
        num_host_pages=geometry.num_host_pages,
    )
    order = torch.randperm(pages_per_layer - 1) + 1
    slots = (order[:num_pages, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
    host_pages = cache.memory.store.alloc(geometry.num_host_pages)
    assert host_pages is not None
    reservation = Reservation(
        geometry,
        order[num_pages : num_pages + geometry.num_pages],
        host_pages,
        context,
        (),
        True,
        torch.zeros(2).long(),
    )
    cache.observer.watch(COMPRESSED_ROW, range(context))
    cache.bind(COMPRESSED_ROW, reservation)
    statistic = torch.ones(num_layers, NUM_KV_HEADS)
    statistic[:, :num_dynamic] = 0.0
    salience = torch.rand(num_layers, NUM_KV_HEADS, context)
    cache.compress(COMPRESSED_ROW, slots, ObservedPrompt((), statistic, salience))
    req_to_token = torch.zeros(3, context + 8, dtype=torch.int32)
    req_to_token[DENSE_ROW, :context] = req_to_token[COMPRESSED_ROW, :context] = slots.to(torch.int32)
    req_to_token[COMPRESSED_ROW, context] = int(order[-1]) * PAGE_SIZE
    queries = drifting_queries(steps, num_layers, similarity).to(dtype)
    return Case(cache, req_to_token, context, queries)


def drifting_queries(steps: int, num_layers: int, similarity: float) -> torch.Tensor:
    """[steps, L, 1, H * G, D]: Gaussian queries with this cosine similarity between consecutive steps."""
    noise = torch.randn(steps, num_layers, 1, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM)
    for step in range(1, steps):
        noise[step] = similarity * noise[step - 1] + (1 - similarity**2) ** 0.5 * noise[step]
    return noise


def packed_sdpa(case: Case) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Full attention by torch with the group packed into the query rows, over keys that are contiguous already."""
    slots = case.req_to_token[DENSE_ROW, : case.context].long()
    layers = [[rows[slots].transpose(0, 1)[None] for rows in case.views.layer_rows(i)] for i in (0, 1, 2)]

    def attend(layer_idx: int, q: torch.Tensor) -> torch.Tensor:
        keys, values = layers[layer_idx % len(layers)]
        packed = q.view(1, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM)
        return torch.nn.functional.scaled_dot_product_attention(packed, keys, values)

    return attend


def time_steps(case: Case, functions: dict[str, Callable[[int, torch.Tensor], Any]]) -> dict[str, float]:
    """Median milliseconds a layer of each function; they take turns step by step, so that noise hits all alike."""
    num_layers = case.queries.shape[1]
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for step, queries in enumerate(case.queries):
        for name, function in functions.items():
            start = time.perf_counter()
            for layer_idx in range(num_layers):
                function(layer_idx, queries[layer_idx])
            if step:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / num_layers)
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def measure(context: int, budget: float, dtype: str, variant: str, similarity: float, steps: int) -> dict[str, Any]:
    """One row: a step of the variant beside full attention."""
    torch.manual_seed(0)
    case = make_case(context, budget, DTYPES[dtype], variant, similarity, steps)
    functions = {"full": case.full, "sdpa": packed_sdpa(case), "retrieve": case.retrieve, "attend": case.compressed}
    ms = time_steps(case, functions)
    chosen, hit = case.counters.tolist()
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
