"""Decode attention against a copy of the same run, and a decode step against what its bytes allow.

The head layout is that of Qwen2.5-VL-7B. Everything is timed as a server runs it: all layers in one captured graph.
The weights of the step are not here; they count as the bytes they are, at the bandwidth of the copy.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_check.pool import Pool, Request, Shape, first_heads, make_config
from benchmarks.gpu_check.reference import check_attention
from benchmarks.gpu_check.step import NAN, DecodeStep, capture
from hybridkv_kernels import dispatch
from sglang_hybridkv.compressors.hybridkv import HybridKV, HybridKVConfig
from sglang_hybridkv.config import ChunkScore, HostDtype
from sglang_hybridkv.requests.geometry import covered_tokens

MIN_COPY_SHARE = 0.75
MIN_BOUND_SHARE = 0.8
NUM_LAYERS, WEIGHT_BYTES = 28, 15.2e9
"""Number of layers of Qwen2.5-VL-7B, and bytes of its weights in bfloat16."""
QUERY_SIMILARITY = 0.95
MEMORY_SHARE = 0.7
"""Share of the free device memory that the pool may take. Where all layers need more, fewer layers take turns."""

_WARM_UPS = 2
QUOTIENTS = ("bandwidth_share", "attention_speedup", "speedup", "byte_bound", "bound_share")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """`num_requests` prompts of `context` tokens at `budget`, with `num_dynamic` dynamic KV heads a layer."""

    num_requests: int = 16
    context: int = 32768
    budget: float = 0.1
    num_dynamic: int = 1
    num_steps: int = 20
    page_size: int = 16
    num_layers: int = NUM_LAYERS
    chunk_score: ChunkScore = "mean_max"
    host_dtype: HostDtype = "same"

    @property
    def shape(self) -> Shape:
        """Head layout of Qwen2.5-VL-7B."""
        return Shape(torch.bfloat16, self.page_size, 7, 128, self.num_layers, 4)

    @property
    def config(self) -> HybridKVConfig:
        """Settings of the compressor."""
        share = self.num_dynamic / self.shape.num_kv_heads
        return make_config(self.shape, self.budget, share, chunk_score=self.chunk_score, host_dtype=self.host_dtype)

    @property
    def summary_vectors(self) -> int:
        """Vectors in the summary of one dynamic head."""
        return self.config.summary_vectors(covered_tokens(self.context, self.page_size))


SMALL = Workload(2, 1024, num_steps=3, num_layers=2)
"""The workload of machines without a GPU. It runs the same code, but its times prove nothing."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes and milliseconds of `layers_measured` layers, and the bandwidth of a copy in GB/s.

    `decode` stands for the decode kernel, `summary` for what retrieval reads, `step` for both, and `stock` for
    attention to all rows.
    """

    decode_bytes: int
    summary_bytes: int
    stock_bytes: int
    decode_ms: float
    step_ms: float
    stock_ms: float
    copy_gb_s: float
    layers_measured: int


def quotients(measured: Measured) -> Row:
    """What the times say: two bandwidths in GB/s, then ratios without a unit.

    `bandwidth_share` divides the bandwidth of the decode kernel by that of the copy, whose reads and writes both count.
    `speedup` divides the time of a whole step of stock by ours; attention is measured, and the weights count by their
    bytes. `byte_bound` is what it would be if both sides only moved their bytes. `bound_share` is the speedup over it.
    """
    scale = NUM_LAYERS / measured.layers_measured
    weights_ms = WEIGHT_BYTES / measured.copy_gb_s / 1e6
    speedup = (weights_ms + scale * measured.stock_ms) / (weights_ms + scale * measured.step_ms)
    ours = WEIGHT_BYTES + scale * (measured.decode_bytes + measured.summary_bytes)
    bound = (WEIGHT_BYTES + scale * measured.stock_bytes) / ours
    decode_gb_s = measured.decode_bytes / measured.decode_ms / 1e6
    values = {
        "copy_gb_s": measured.copy_gb_s,
        "decode_gb_s": decode_gb_s,
        "bandwidth_share": decode_gb_s / measured.copy_gb_s,
        "attention_speedup": measured.stock_ms / measured.step_ms,
        "speedup": speedup,
        "byte_bound": bound,
        "bound_share": speedup / bound,
    }
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def unmet(row: Row) -> list[str]:
    """Criteria that a row of the full workload misses."""
    limits = {"bandwidth_share": MIN_COPY_SHARE, "bound_share": MIN_BOUND_SHARE}
    return [f"{name} is {row[name]:.2f}, expected at least {x}" for name, x in limits.items() if row[name] < x]


def measure(workload: Workload, device: str, seed: int) -> Row:
    """One row: copy, decode kernel, whole step and stock attention of the same run."""
    generator = torch.Generator(device).manual_seed(seed)
    workload = fit(workload, device)
    pool = _make_pool(workload, generator)
    shape, context = workload.shape, workload.context
    statistic, compressed = first_heads(shape, workload.num_dynamic).to(device), []
    for _ in range(workload.num_requests):
        compressed.append(pool.add_prompt(context))
        pool.compress(compressed[-1], statistic)
        pool.append_token(compressed[-1])
    dense = [pool.add_prompt(context + 1) for _ in range(workload.num_requests)]
    element = shape.head_dim * shape.dtype.itemsize
    rows = pool.rows(compressed)
    kept_rows = int(pool.table.num_head_pages[rows].sum()) * shape.page_size
    tail_rows = workload.num_requests * shape.num_layers * shape.num_kv_heads
    vectors = int(pool.table.is_dynamic[rows].sum()) * workload.summary_vectors
    sizes = {
        "decode_bytes": 2 * (kept_rows + tail_rows) * element,
        "summary_bytes": vectors * element,
        "stock_bytes": 2 * tail_rows * (context + 1) * element,
    }
    step = DecodeStep(pool, workload.num_requests)
    step.load(compressed)
    decode = _captured(lambda: step.attend_all(step.rows, step.lens), device)
    decode_ms = milliseconds(decode, device, workload.num_steps)
    error = check_step(step, compressed)
    still_ms = milliseconds(step.run, device, workload.num_steps)
    before = pool.counters.clone()
    step_ms = milliseconds(step.run, device, workload.num_steps, between=lambda: _drift(step))
    error = max(error, check_step(step, compressed))
    chosen, hits = (pool.counters - before).tolist()
    chunk_bytes = workload.config.tokens_per_chunk * pool.store.pages.record_bytes
    fetched_bytes = (chosen - hits) * chunk_bytes // (workload.num_steps + _WARM_UPS)
    stock_ms = stock_milliseconds(pool, step, dense, device, workload.num_steps)
    fastest = min(stock_ms, key=lambda name: stock_ms[name])
    times = {"decode_ms": decode_ms, "step_ms": step_ms, "stock_ms": stock_ms[fastest]}
    copy_gb_s = copy_bandwidth(sizes["decode_bytes"], device, workload.num_steps)
    row: Row = {"requests": workload.num_requests, "context": context, "budget": workload.budget, "shape": str(shape)}
    row |= {"max_error": float(f"{error:.3g}"), "chunk_score": workload.chunk_score}
    row |= {"host_dtype": workload.host_dtype}
    row |= {"layers_measured": shape.num_layers, "captured": device == "cuda", "stock_kernel": fastest}
    row |= {"kernels": dispatch.describe(device, shape.dtype, shape.head_dim, shape.group_size), **sizes}
    row |= {name: round(value, 4) for name, value in times.items()}
    row |= {"stock_ms_by_kernel": {name: round(value, 4) for name, value in stock_ms.items()}}
    row |= {"chunk_hit_rate": round(hits / chosen, 3) if chosen else None, "query_similarity": QUERY_SIMILARITY}
    # Where the time of a step goes: the same step with queries that stay, so that nothing is fetched, and the rest.
    row |= {"still_ms": round(still_ms, 4), "fetched_bytes": fetched_bytes}
    if step_ms > still_ms:
        row |= {"link_gb_s": round(fetched_bytes / (step_ms - still_ms) / 1e6, 1)}
    row |= {"stock_gb_s": round(sizes["stock_bytes"] / stock_ms[fastest] / 1e6, 1)}
    return row | quotients(Measured(**sizes, **times, copy_gb_s=copy_gb_s, layers_measured=shape.num_layers))


def fit(workload: Workload, device: str) -> Workload:
    """The workload with as many layers as the device has memory for; ValueError when there is none for two."""
    if device != "cuda":
        return workload
    shape = workload.shape
    # The pool of the row before is gone, but torch keeps its memory.
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    layer_bytes = 2 * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize * _pool_tokens(workload)
    layers = min(shape.num_layers, int(MEMORY_SHARE * free) // layer_bytes)
    if layers < 2:
        raise ValueError(f"device memory: expected {2 * layer_bytes / MEMORY_SHARE:.2e} bytes free, got {free:.2e}")
    return dataclasses.replace(workload, num_layers=layers)


def _pool_tokens(workload: Workload) -> int:
    """Dense requests, one prompt that is being compressed, and compressed ones with summaries and a tail."""
    page_size, context = workload.shape.page_size, workload.context
    compressed = context * workload.budget + workload.summary_vectors / 2 + 4 * page_size
    return int((workload.num_requests + 1) * (context + 2 * page_size) + workload.num_requests * compressed)


def _make_pool(workload: Workload, generator: torch.Generator) -> Pool:
    shape = workload.shape
    share = workload.num_dynamic / shape.num_kv_heads
    num_pages = workload.context // shape.page_size
    return Pool(
        shape,
        HybridKV(workload.config),
        num_pages=_pool_tokens(workload) // shape.page_size + 2,
        # A request reserves pages for the case that all its heads are dynamic, and gives back those it does not use.
        num_host_pages=int(num_pages * (1 + share * workload.num_requests)) + 1,
        max_context=workload.context + 2 * shape.page_size,
        num_rows=2 * workload.num_requests,
        generator=generator,
    )


def _captured(launch: Callable[[], None], device: str) -> Callable[[], None]:
    return capture(launch) if device == "cuda" else launch


def _drift(step: DecodeStep) -> None:
    """Queries of the next step. They are like those of the last one, so that part of the wanted chunks is there."""
    noise = step.pool.randn(*step.q.shape)
    step.q.copy_(QUERY_SIMILARITY * step.q + (1 - QUERY_SIMILARITY**2) ** 0.5 * noise)


def milliseconds(
    run: Callable[[], Any], device: str, repeats: int, between: Callable[[], None] = lambda: None
) -> float:
    """Median time of `run`; `between` is not timed."""
    times = []
    for repeat in range(repeats + _WARM_UPS):
        between()
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            started = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - started) * 1e3
        if repeat >= _WARM_UPS:
            times.append(elapsed)
    return statistics.median(times)


def copy_bandwidth(num_bytes: int, device: str, repeats: int) -> float:
    """GB/s, read and write both counted, of a copy on the device that moves `num_bytes` in all."""
    source = torch.ones(num_bytes // 4, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    elapsed = milliseconds(lambda: target.copy_(source), device, repeats)
    return 2 * source.nbytes / elapsed / 1e6


def stock_milliseconds(
    pool: Pool, step: DecodeStep, dense: list[Request], device: str, repeats: int
) -> dict[str, float]:
    """Full attention of the same requests, by kernel: our own on dense requests, and on a GPU SGLang's, too."""
    rows, lens = pool.rows(dense), pool.lens(dense)
    launches: dict[str, Callable[[], None]] = {"ours, dense": lambda: step.attend_all(rows, lens)}
    if device == "cuda":
        launches["sglang triton"] = sglang_decode(pool, step, dense)
        if importlib.util.find_spec("flashinfer") is not None:
            launches["flashinfer"] = _flashinfer_decode(pool, step, dense)
    times = {}
    for name, launch in launches.items():
        step.out.fill_(NAN)
        times[name] = milliseconds(_captured(launch, device), device, repeats)
        check_step(step, dense)
    return times


def check_step(step: DecodeStep, requests: list[Request]) -> float:
    """Largest relative error of what was timed: of the first and the last request, in the first and the last layer.

    On a GPU the pool has more elements than 32 bits can count.
    """
    places = itertools.product((0, len(step.q) - 1), (0, len(requests) - 1))
    return max(check_attention(step.pool, at, step.q[at, i], requests[i], step.out[at, i]) for at, i in places)


def token_lists(pool: Pool, requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """CSR token slots of dense requests: indptr [B + 1] and indices, int32, on the pool's device."""
    lens = pool.lens(requests)
    indptr = torch.zeros(len(requests) + 1, dtype=torch.int32, device=pool.device)
    indptr[1:] = lens.cumsum(0)
    return indptr, torch.cat([pool.req_to_token[each.row, : each.seq_len] for each in requests])


def sglang_decode(pool: Pool, step: DecodeStep, requests: list[Request], max_splits: int = 8) -> Callable[[], None]:
    """All layers by the Triton kernel of SGLang, called as its Triton backend does, with its default of splits."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    indptr, indices = token_lists(pool, requests)
    batch_size, num_heads, head_dim = step.q.shape[1:]
    logits = torch.zeros(batch_size, num_heads, max_splits, head_dim, dtype=torch.float32, device=pool.device)
    lse = torch.zeros(batch_size, num_heads, max_splits, dtype=torch.float32, device=pool.device)
    splits = torch.full((batch_size,), max_splits, dtype=torch.int32, device=pool.device)
    on_hopper = pool.device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)

    def launch() -> None:
        for layer_idx, q in enumerate(step.q):
            keys, values = pool.views.layer_rows(layer_idx)
            decode_attention_fwd(
                q, keys, values, step.out[layer_idx], indptr, indices, logits, lse, splits, max_splits, pool.scaling,
                1.0, 1.0, use_pdl=on_hopper,
            )  # fmt: skip

    return launch


def _flashinfer_decode(pool: Pool, step: DecodeStep, requests: list[Request]) -> Callable[[], None]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    shape = pool.shape
    indptr, indices = token_lists(pool, requests)
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device=pool.device)
    last_page_len = torch.ones(len(requests), dtype=torch.int32, device=pool.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr,
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last_page_len,
    )
    heads = (shape.num_kv_heads * shape.group_size, shape.num_kv_heads, shape.head_dim)
    types = {"q_data_type": shape.dtype, "kv_data_type": shape.dtype}
    wrapper.plan(indptr.cpu(), indices, last_page_len.cpu(), *heads, 1, **types)

    def launch() -> None:
        for layer_idx, q in enumerate(step.q):
            pages = tuple(flat.unsqueeze(1) for flat in pool.views.layer_rows(layer_idx))
            wrapper.run(q, pages, out=step.out[layer_idx])

    return launch
