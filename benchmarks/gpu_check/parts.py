"""The parts of the check: what each one does where, what of it needs a GPU, and how it ends."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_memory import AdmissionLoad, admission_rows
from benchmarks.gpu_check import bandwidth, graphs, ops, servers
from benchmarks.gpu_check.pool import Shape
from benchmarks.gpu_check.reference import Mismatch
from hybridkv_kernels import dispatch
from sglang_hybridkv.config import ChunkScore

LONG_PAGES = {"cpu": 12, "cuda": 40}
INTERPRETER_SECONDS = 1800.0
GRAPH_SHAPES = (
    Shape(torch.bfloat16, 8, 7, 128),
    Shape(torch.float32, 16, 2, 64),
    Shape(torch.float16, 32, 16, 80, num_kv_heads=4),
)
SERVER_LOAD = {
    "cpu": servers.Load((200, 333), 8),
    "cuda": servers.Load((200, 333, 1500, 2049, 4000, 8191), 64),
}
ADMISSION = {"cpu": AdmissionLoad(12, 1024, 48, 3), "cuda": AdmissionLoad()}
BANDWIDTH_CHUNKS: tuple[tuple[int, ChunkScore], ...] = ((8, "mean_max"), (16, "mean_max"), (8, "key_codes"))
"""Page size and chunk score of the rows."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Context:
    """What the parts share.

    Attributes
    ----------
    device : "cpu" or "cuda".
    model : checkpoint of the servers; a callable, as it may have to be made.
    seed : of all random input.
    """

    device: str
    model: Callable[[], Path]
    seed: int

    @property
    def has_gpu(self) -> bool:
        return self.device == "cuda"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a part ended: "ran" (all of it), "reduced" (as far as it goes without a GPU) or "failed"."""

    part: str
    status: str
    rows: int
    seconds: float
    skipped: tuple[str, ...]
    fault: str | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """`rows` yields result rows, `ok` False in those that failed, and raises what ends the part. `skipped` says what
    does not run on a device, with the reason; nothing means all of it runs."""

    name: str
    title: str
    rows: Callable[[Context], Iterator[Row]]
    skipped: Callable[[str], Sequence[str]]


def run_part(part: Part, context: Context, put: Callable[[Row], None]) -> Outcome:
    """Run one part and hand each of its rows to `put`; no exception leaves it."""
    started, count, faults = time.perf_counter(), 0, []
    skipped = tuple(part.skipped(context.device))
    try:
        for row in part.rows(context):
            put({"bench": "gpu_check", "part": part.name, **row})
            count += 1
            if not row["ok"]:
                faults.append(_fault_of(row))
    except Mismatch as error:
        faults.append(str(error))
    except Exception as error:
        traceback.print_exc()
        faults.append(f"{type(error).__name__}: {error}")
    finally:
        _free_device_memory(context.device)
    if not count and not faults:
        faults.append("no check ran")
    status = "failed" if faults else "reduced" if not context.has_gpu else "ran"
    fault = "; ".join(faults) or None
    return Outcome(part.name, status, count, round(time.perf_counter() - started, 1), skipped, fault)


def _free_device_memory(device: str) -> None:
    """Servers of a later part need what torch would keep for this process."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _fault_of(row: Row) -> str:
    return f"{row.get('op', '')} {'; '.join(row['failures'])}".strip()


def op_rows(context: Context) -> Iterator[Row]:
    """On a GPU every kernel over the covering shapes. Else the C++ kernels, and the Triton kernels interpreted."""
    for op in ops.OPS:
        yield ops.check_op(op, ops.covering_shapes(), context.device, context.seed, LONG_PAGES[context.device])
    if context.has_gpu:
        if servers.has_flashinfer():
            shapes = ops.flashinfer_shapes()
            yield ops.check_op(ops.FLASHINFER, shapes, context.device, context.seed, LONG_PAGES[context.device])
        return
    environment = os.environ | {"TRITON_INTERPRET": "1", dispatch.ENVIRONMENT: "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_check.ops", str(context.seed)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=INTERPRETER_SECONDS, check=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    yield from rows
    if done.returncode and all(row["ok"] for row in rows):
        last_words = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise Mismatch(f"interpreting the Triton kernels ended after {len(rows)} of {len(ops.OPS)}: {last_words}")


def graph_rows(context: Context) -> Iterator[Row]:
    """The decode step while the batch changes; without a GPU the same calls, not captured."""
    for index, shape in enumerate(GRAPH_SHAPES):
        num_steps = 24 if context.has_gpu else 6
        scores: tuple[ChunkScore, ...] = ("mean_max", "key_codes")
        for chunk_score in scores:
            yield graphs.check_shape(shape, context.device, context.seed + index, num_steps, chunk_score)


def server_rows(context: Context) -> Iterator[Row]:
    """Each attention backend: stock, budget 1.0 and budget 0.1."""
    for setup in servers.setups(context.device)[0]:
        yield from servers.comparisons(setup, context.model(), SERVER_LOAD[context.device])


def bandwidth_rows(context: Context) -> Iterator[Row]:
    """The workload of the criteria, which are judged on a GPU only."""
    for page_size, chunk_score in BANDWIDTH_CHUNKS:
        full = bandwidth.Workload() if context.has_gpu else bandwidth.SMALL
        workload = dataclasses.replace(full, page_size=page_size, chunk_score=chunk_score)
        row = bandwidth.measure(workload, context.device, context.seed)
        missed = bandwidth.unmet(row) if context.has_gpu else []
        if not context.has_gpu:
            # Quotients of another device, length and baseline say nothing of those that count.
            row = {name: value for name, value in row.items() if name not in bandwidth.QUOTIENTS}
        yield row | {"page_size": page_size, "judged": context.has_gpu, "ok": not missed, "failures": missed}


def concurrency_rows(context: Context) -> Iterator[Row]:
    """Requests that run at once in the same pool, stock and compressed."""
    for row in admission_rows(context.model(), ADMISSION[context.device]):
        ratio = row.get("max_running_ratio")
        missed = [] if ratio is None or ratio > 1 else [f"{ratio:g} times as many requests run at once as on stock"]
        yield row | {"bench": "gpu_check", "ok": not missed, "failures": missed}


def _without_gpu(*what: str) -> Callable[[str], Sequence[str]]:
    return lambda device: () if device == "cuda" else what


PARTS = (
    Part(
        "ops",
        "every kernel against its reference",
        op_rows,
        _without_gpu("compiled Triton kernels, and FlashInfer: they need a GPU (Triton is interpreted on few shapes)"),
    ),
    Part(
        "graphs",
        "a captured decode step while the batch changes",
        graph_rows,
        _without_gpu("capture and replay: CUDA graphs need a GPU (the same calls run uncaptured)"),
    ),
    Part("server", "servers beside stock", server_rows, lambda device: servers.setups(device)[1]),
    Part(
        "bandwidth",
        "decode against copy bandwidth and byte bound",
        bandwidth_rows,
        _without_gpu(
            "16 requests of 32k tokens, SGLang's kernels and the criteria: they need a GPU (a small row runs)"
        ),
    ),
    Part(
        "concurrency",
        "requests at once in a fixed pool",
        concurrency_rows,
        _without_gpu("60 requests of 4096 tokens: on a CPU fewer and shorter ones run"),
    ),
)
NAMES = tuple(part.name for part in PARTS)


def chosen_parts(names: str) -> list[Part]:
    """Parts of a comma-separated list, in the order in which they run: correctness first, timings last.

    Raises
    ------
    ValueError
        A name is unknown, or there is none.
    """
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in NAMES:
            raise ValueError(f"--parts = {name!r} is not allowed; legal: {', '.join(NAMES)}, comma-separated")
    return [part for part in PARTS if part.name in wanted]
