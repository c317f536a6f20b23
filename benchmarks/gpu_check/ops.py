"""Every kernel against its reference in higher precision: fresh random input, NaN-poisoned outputs.

As a program (``python -m benchmarks.gpu_check.ops``) it checks few cases with the implementation that HYBRIDKV_KERNELS
names and prints one JSON object a kernel: so the Triton kernels are interpreted in a process of their own. Its
arguments are the seed, and the kernels if not all.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu_check.pool import NAN, Pool, Shape, make_config
from benchmarks.gpu_check.reference import (
    TOLERANCE,
    PoolState,
    check_attention,
    check_retrieval,
    expect,
    expect_best,
    expect_close,
    expect_equal,
    poisoned_outputs,
)
from hybridkv_kernels import dispatch
from hybridkv_kernels.compact_kv import compact_kv
from hybridkv_kernels.extend_attn import extend_attn
from hybridkv_kernels.extend_attn import naive as extend_naive
from hybridkv_kernels.fetch_chunks import fetch_chunks
from hybridkv_kernels.score_heads import STATISTICS, score_heads
from hybridkv_kernels.score_heads import naive as score_naive
from hybridkv_kernels.select_chunks import (
    CHUNK_SCORES,
    ESTIMATING_SCORES,
    SUMMARY_SCORES,
    forced_chunks,
    select_chunks,
    summarize_chunks,
    summary_vectors,
)
from hybridkv_kernels.select_chunks import naive as select_naive

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGE_SIZES = (8, 16, 32, 64)
GROUP_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16)
HEAD_DIMS = (64, 80, 96, 128)
REDUCED = ((torch.float32, 8, 2, 64), (torch.bfloat16, 16, 7, 128), (torch.float16, 32, 16, 80))

REFERENCE_ONLY = {"cpu": ("select_chunks", "fetch_chunks"), "triton": ("fetch_chunks", "extend_attn")}
"""Kernels of which an implementation has no own one: it fused them into others, or SGLang's own does the work."""

Row = dict[str, Any]


def covering_shapes() -> list[Shape]:
    """Shapes in which every pair of values of two of the four properties occurs, compiled in minutes rather than
    hours."""
    shapes = []
    for (i, group_size), (j, head_dim) in itertools.product(enumerate(GROUP_SIZES), enumerate(HEAD_DIMS)):
        # i + j takes 12 values in a row, as many as there are pairs of dtype and page size.
        dtype, page_size = DTYPES[(i + j) % len(DTYPES)], PAGE_SIZES[(i + j) % len(PAGE_SIZES)]
        shapes.append(Shape(dtype, page_size, group_size, head_dim))
    return shapes


def reduced_shapes() -> list[Shape]:
    """A few, for the interpreter and for a quick look."""
    return [Shape(*values) for values in REDUCED]


def flashinfer_shapes() -> list[Shape]:
    """Those of the covering ones that FlashInfer's decode has kernels for."""
    from hybridkv_kernels.decode_attn.flashinfer import shape_obstacle

    return [shape for shape in covering_shapes() if shape_obstacle(shape.dtype, shape.head_dim) is None]


def ragged_lengths(page_size: int, longest: int) -> list[int]:
    """Around one page, and long."""
    return sorted({1, page_size - 1, page_size, page_size + 1, longest})


class Inputs:
    """Fresh random input of one shape on one device."""

    def __init__(self, shape: Shape, device: str, generator: torch.Generator, long_pages: int) -> None:
        self.shape, self.device, self.generator, self.long_pages = shape, device, generator, long_pages

    def randn(self, *sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=self.shape.dtype)

    def permutation(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self.generator, device=self.device)

    def lengths(self) -> list[int]:
        return ragged_lengths(self.shape.page_size, self.long_pages * self.shape.page_size + 3)

    def mixed_pool(self, chunk_score: str = "mean_max", **config: Any) -> tuple[Pool, list[int]]:
        """Dense requests of ragged lengths; compressed ones with an empty, a short and a full tail, all, one and none
        of their heads dynamic; padding. Returns the pool and the rows of a batch."""
        page_size, num_pages = self.shape.page_size, self.long_pages
        config_of = make_config(self.shape, 0.3, 0.5, chunk_score=chunk_score, **config)
        prompts = [(num_pages, 0, 2), (max(4, num_pages // 2), 1, 1), (4, page_size - 2, 0)]
        pool = Pool(
            self.shape,
            config_of,
            num_pages=8 * num_pages,
            num_host_pages=4 * num_pages,
            max_context=(num_pages + 3) * page_size,
            num_rows=len(prompts) + len(self.lengths()),
            device=self.device,
            generator=self.generator,
        )
        rows = []
        for pages, tail, num_dynamic in prompts:
            rows.append(pool.add(pages * page_size + tail))
            pool.compress(rows[-1], num_dynamic)
            pool.append_token(rows[-1])
        rows += [pool.add(length) for length in self.lengths()]
        rows.insert(2, 0)
        return pool, rows


def check_score_heads(inputs: Inputs) -> float:
    """Salience in fp64 and by the formula; statistics beside the naive kernel, in fp32."""
    shape, worst = inputs.shape, 0.0
    num_queries = shape.num_kv_heads * shape.group_size
    for length, statistic in itertools.product(inputs.lengths(), STATISTICS):
        pool = torch.full((length + 9, shape.num_kv_heads, shape.head_dim), NAN, dtype=shape.dtype).to(inputs.device)
        slots = inputs.permutation(length + 9)[:length]
        pool[slots] = inputs.randn(length, shape.num_kv_heads, shape.head_dim)
        q, scaling = inputs.randn(min(length, 5), num_queries, shape.head_dim), shape.head_dim**-0.5
        value, salience = score_heads(q, pool, slots, scaling=scaling, statistic=statistic)
        keys = pool[slots].double().permute(1, 2, 0).unsqueeze(1)
        queries = q.double().view(len(q), shape.num_kv_heads, -1, shape.head_dim).permute(1, 2, 0, 3)
        future = torch.ones(len(q), length, dtype=torch.bool, device=inputs.device).triu(length - len(q) + 1)
        exact = (queries @ keys * scaling).masked_fill(future, float("-inf")).softmax(-1).mean((1, 2))
        worst = max(worst, expect_close(f"salience of {length} keys", salience, exact, 1e-4))
        expected, _ = score_naive.score_heads(q, pool, slots, scaling, statistic, 0.01, 0.9, 16, 0.1)
        # A probability may sit on a threshold: a key or two of a row count the other way.
        worst_share = float((value - expected).abs().max())
        expect(worst_share <= max(0.05, 2 / length), f"{statistic} of {length} keys differs by {worst_share:.2e}")
    return worst


def check_compact_kv(inputs: Inputs) -> float:
    """Rows are copied bit by bit, others are not touched."""
    for count in (0, *inputs.lengths()):
        keys, values = (inputs.randn(3 * count + 5, inputs.shape.head_dim) for _ in range(2))
        src, dst = inputs.permutation(3 * count + 5)[: 2 * count].view(2, count)
        expected = [rows.clone() for rows in (keys, values)]
        for rows in expected:
            rows[dst] = rows[src]
        keys[dst], values[dst] = NAN, NAN
        compact_kv(keys, values, src.contiguous(), dst.contiguous())
        expect_equal(f"keys of {count} rows", keys, expected[0])
        expect_equal(f"values of {count} rows", values, expected[1])
    return 0.0


def check_select_chunks(inputs: Inputs) -> float:
    """Summaries in fp32; chosen chunks have no smaller fp64 score than those left out."""
    shape, worst, num_heads = inputs.shape, 0.0, 3
    for chunk_score, num_chunks in itertools.product(SUMMARY_SCORES, (1, 2, inputs.long_pages)):
        keys = inputs.randn(num_heads, num_chunks, shape.page_size, shape.head_dim)
        summaries = summarize_chunks(keys, chunk_score)
        exact = select_naive.summarize_chunks(keys.float(), chunk_score, None)
        what = f"{chunk_score} of {num_chunks} chunks"
        worst = max(worst, expect_close(f"summaries, {what}", summaries, exact, TOLERANCE[shape.dtype]))
        counts = torch.arange(1, num_heads + 1, device=inputs.device).clamp(max=num_chunks)
        q = inputs.randn(num_heads, shape.group_size, shape.head_dim)
        windows = {"num_sink_chunks": 1, "num_recent_chunks": 1}
        chosen = select_chunks(q, summaries, counts, **windows, chunk_score=chunk_score)
        expect_equal(f"number chosen, {what}", chosen.sum(1), counts)
        forced = forced_chunks(num_chunks, counts, 1, 1)
        expect(bool(chosen[forced].all()), f"{what}: a sink or recent chunk is missing")
        scores = select_naive.score_chunks(q.double(), summaries.double(), chunk_score)
        for head in range(num_heads):
            expect_best(what, scores[head], chosen[head] & ~forced[head], ~chosen[head])
    return worst


def check_fetch_chunks(inputs: Inputs) -> float:
    """Buffers hold what was selected, what stays keeps its page, and nothing else is written."""
    shape, num_heads, num_chunks, size = inputs.shape, 3, inputs.long_pages, 4
    by_page = (shape.page_size, shape.head_dim)
    host = [inputs.randn(2 * num_heads * num_chunks, *by_page) for _ in range(2)]
    host = [pages.cpu().pin_memory() if inputs.device == "cuda" else pages for pages in host]
    host_ids = inputs.permutation(len(host[0]))[: num_heads * num_chunks].view(num_heads, num_chunks)
    buffers = inputs.permutation(2 * num_heads * size)[: num_heads * size].view(num_heads, size)
    pages = [torch.full((2 * num_heads * size, *by_page), NAN, dtype=shape.dtype).to(inputs.device) for _ in range(2)]
    residency = torch.full((2 * num_heads * size,), -1, dtype=torch.int32, device=inputs.device)
    counts = torch.tensor([size, 1, size - 1], device=inputs.device)
    for head in range(num_heads):
        mine = buffers[head, : counts[head]]
        residency[mine] = inputs.permutation(num_chunks)[: len(mine)].to(torch.int32)
        for pool, store in zip(pages, host, strict=True):
            pool[mine] = store[host_ids[head, residency[mine].long()].to(store.device)].to(inputs.device)
    for _ in range(3):
        wanted = torch.stack([inputs.permutation(num_chunks) < count for count in counts])
        before = residency.clone()
        moved = fetch_chunks(wanted, buffers, counts, residency, *pages, host_ids, *host)
        expect(int(moved) == int((before != residency).sum()), "fetch_chunks: the number moved is not what moved")
        for head in range(num_heads):
            mine = buffers[head, : counts[head]]
            held = residency[mine].long()
            expect_equal("chosen chunks", held.sort().values, wanted[head].nonzero().squeeze(1))
            kept = wanted[head][before[mine].long()]
            expect_equal("chunks that stay", residency[mine][kept], before[mine][kept])
            for pool, store in zip(pages, host, strict=True):
                expect_equal("rows", pool[mine], store[host_ids[head, held].to(store.device)].to(inputs.device))
    outside = residency == -1
    expect(bool(pages[0][outside].isnan().all() and pages[1][outside].isnan().all()), "fetch_chunks wrote elsewhere")
    return 0.0


def check_retrieve_chunks(inputs: Inputs) -> float:
    """Several steps, in every chunk score, by its default size of chunks; by key codes also in other ones."""
    sizes = [*((score, None) for score in CHUNK_SCORES), ("key_codes", 2), ("key_codes", inputs.shape.page_size)]
    for chunk_score, chunk_size in sizes:
        pool, rows = inputs.mixed_pool(chunk_score, chunk_size=chunk_size)
        for layer_idx in (0, 1, 0):
            before, q = PoolState.of(pool), pool.queries(len(rows))
            pool.retrieve(layer_idx, q, torch.tensor(rows, device=inputs.device))
            check_retrieval(pool, before, {layer_idx: q}, rows)
    return 0.0


def check_decode_attn(inputs: Inputs) -> float:
    """Compressed, dense and padding rows in one batch, whole and with estimated chunks."""
    worst = 0.0
    variants: list[tuple[str, dict[str, Any]]] = [("mean_max", {})]
    variants += [(score, {"unretrieved": "estimate"}) for score in ESTIMATING_SCORES if summary_vectors(score) != 4]
    for chunk_score, config in variants:
        pool, rows = inputs.mixed_pool(chunk_score, **config)
        places = torch.tensor(rows, device=inputs.device)
        for layer_idx in range(inputs.shape.num_layers):
            q = pool.queries(len(rows))
            out = pool.attend(layer_idx, q, places, pool.lens(rows))
            worst = max(worst, check_attention(pool, layer_idx, q, rows, out))
    return worst


def check_extend_attn(inputs: Inputs) -> float:
    """New tokens over a cached prefix and themselves; where there is no twin the reference is compared with itself."""
    shape = inputs.shape
    lengths = inputs.lengths()
    prefixes = [0, *lengths[:-1]]
    total = sum(lengths) + sum(prefixes)
    keys, values = (inputs.randn(total, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    slots, req_to_token = inputs.permutation(total), torch.zeros(len(lengths), 2 * max(lengths), dtype=torch.int32)
    start = 0
    for row, length in enumerate(a + b for a, b in zip(prefixes, lengths, strict=True)):
        req_to_token[row, :length] = slots[start : start + length]
        start += length
    q = inputs.randn(sum(lengths), shape.num_kv_heads * shape.group_size, shape.head_dim)
    rows, req_to_token = torch.arange(len(lengths), device=inputs.device), req_to_token.to(inputs.device)
    scaling = shape.head_dim**-0.5
    out = extend_attn(q, keys, values, req_to_token, rows, prefixes, lengths, scaling=scaling)
    wide = (q.double(), keys.double(), values.double())
    expected = extend_naive.extend_attn(*wide, req_to_token, rows, prefixes, lengths, scaling)
    return expect_close("extend_attn", out, expected, TOLERANCE[shape.dtype])


def check_flashinfer(inputs: Inputs, wrapper_class: Any = None) -> float:
    """Head pages by FlashInfer: each compressed request without its tail, dense and padding rows beside it."""
    from hybridkv_kernels.decode_attn.flashinfer import HeadPageDecode

    if wrapper_class is None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper as wrapper_class

    pool, rows = inputs.mixed_pool()
    places, worst = torch.tensor(rows, device=inputs.device), 0.0
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=inputs.device)
    decode = HeadPageDecode(pool.table, pool.views, inputs.shape.group_size, workspace, wrapper_class)
    decode.plan(places, pool.table.num_head_pages[places].cpu(), in_graph=False)
    compressed = [i for i, row in enumerate(rows) if int(pool.table.num_pages[row])]
    covered = pool.table.covered[places[compressed]]
    for layer_idx in range(inputs.shape.num_layers):
        q = pool.queries(len(rows))
        out, lse = decode.run(layer_idx, q, pool.scaling)
        expect(bool(lse[compressed].isfinite().all()), "FlashInfer: a log-sum-exp is not finite")
        mine = [rows[i] for i in compressed]
        worst = max(worst, check_attention(pool, layer_idx, q[compressed], mine, out[compressed], covered))
    return worst


OPS: dict[str, Callable[[Inputs], float]] = {
    "compact_kv": check_compact_kv,
    "score_heads": check_score_heads,
    "select_chunks": check_select_chunks,
    "fetch_chunks": check_fetch_chunks,
    "retrieve_chunks": check_retrieve_chunks,
    "decode_attn": check_decode_attn,
    "extend_attn": check_extend_attn,
}
FLASHINFER = "decode_attn by flashinfer"
_CHECKS = OPS | {FLASHINFER: check_flashinfer}


def check_op(op: str, shapes: Sequence[Shape], device: str, seed: int, long_pages: int) -> Row:
    """One kernel over all shapes: its row. A failure is in the row, with the shape and the seed that repeat it."""
    errors: dict[str, float] = {}
    failures, started = [], time.perf_counter()
    for index, shape in enumerate(shapes):
        generator = torch.Generator(device).manual_seed(seed + index)
        try:
            with poisoned_outputs():
                error = _CHECKS[op](Inputs(shape, device, generator, long_pages))
        except Exception as problem:
            failures.append(f"{shape}, seed {seed + index}: {type(problem).__name__}: {problem}")
        else:
            name = str(shape.dtype).removeprefix("torch.")
            errors[name] = max(errors.get(name, 0.0), error)
    row: Row = {
        "op": op,
        "device": device,
        "kernels": _kernels_of(op, device),
        "cases": len(shapes),
        "ok": not failures,
    }
    row |= {"max_error": {name: float(f"{error:.3g}") for name, error in errors.items()}, "failures": failures[:5]}
    return row | {"failed_cases": len(failures), "seed": seed, "seconds": round(time.perf_counter() - started, 2)}


def _kernels_of(op: str, device: str) -> str:
    """The implementation that ran, for people."""
    if op == FLASHINFER:
        return f"flashinfer {metadata.version('flashinfer-python')}"
    plain = (device, torch.float32, HEAD_DIMS[0], 1)
    if op in REFERENCE_ONLY.get(dispatch.choose(*plain), ()):
        return "naive (the torch reference is what runs)"
    return dispatch.describe(*plain)


def main() -> int:
    """Check kernels on few and small shapes on the CPU; the exit status is 1 when one failed."""
    seed, names, failed = int(sys.argv[1]), sys.argv[2:] or list(OPS), False
    for op in names:
        row = check_op(op, reduced_shapes(), "cpu", seed, long_pages=6)
        print(json.dumps(row), flush=True)
        failed |= not row["ok"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
