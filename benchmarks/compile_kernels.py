"""Compile the Triton kernels for GPUs that are not there, and read what resources they take: `make kernels-compile`.

Each case calls a kernel's Python twin on a few CPU tensors; the launches are caught, specialised as Triton would do it
(types, alignment, constants) and compiled for each target instead of run. Exits with 1 where a decode kernel spills or
takes more than 128 registers on sm_80 or sm_90. Needs no GPU and runs nothing.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.gpu_check.pool import Shape
from hybridkv_kernels import gpu
from hybridkv_kernels.chunks import CODED_SCORES, Retrieval
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable, HeadPageViews
from hybridkv_kernels.host_pages import HOST_DTYPES, HostPages

ARCHITECTURES = (80, 90, 100)
GATED_ARCHITECTURES = (80, 90)
MAX_REGISTERS = 128
LAYERS_AND_HEADS = {"num_layers": 28, "num_kv_heads": 4}
NUM_REQUESTS = 2
LONG, LONGER = 4096, 32768  # chunks or tokens of a prompt


def shape_of(dtype: torch.dtype = torch.bfloat16, **changes: int) -> Shape:
    """The head layout of Qwen2.5-VL-7B, with some changes."""
    return Shape(**{"dtype": dtype, "page_size": 16, "group_size": 7, "head_dim": 128, **LAYERS_AND_HEADS} | changes)


@dataclass(frozen=True)
class Case:
    """One call of a twin; `is_gated` holds its kernels to the limits."""

    name: str
    shape: Shape
    call: Callable[[Shape], Any]
    is_gated: bool = False


@dataclass(frozen=True)
class Usage:
    """What one kernel of a case takes on one architecture. Bytes are those of a thread, shared ones of a program."""

    case: Case
    kernel: str
    architecture: int
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    seconds: float

    @property
    def fault(self) -> str | None:
        """Why this usage is not allowed; None when it is."""
        if not self.case.is_gated or self.architecture not in GATED_ARCHITECTURES:
            return None
        where = f"{self.kernel} ({self.case.name}, {self.case.shape}) on sm_{self.architecture}"
        if self.spills or self.stack_bytes:
            return f"{where} spills: {self.spills} local loads and stores, {self.stack_bytes} bytes of stack"
        if self.registers > MAX_REGISTERS:
            return f"{where} takes {self.registers} registers, more than {MAX_REGISTERS}"
        return None


def zeros(shape: Shape, *sizes: int) -> torch.Tensor:
    """A tensor [*sizes, D] of the shape's type."""
    return torch.zeros(*sizes, shape.head_dim, dtype=shape.dtype)


def queries(shape: Shape, count: int) -> torch.Tensor:
    """[count, H * G, D]."""
    return zeros(shape, count, shape.num_kv_heads * shape.group_size)


def tiny_pool(
    shape: Shape, max_prompt_pages: int, chunk_size: int | None = None
) -> tuple[HeadPageViews, HeadPageTable]:
    """A pool and a table of which only types, shapes and alignment matter."""
    layout = HeadPageLayout(shape.num_layers, shape.num_kv_heads, 3, shape.page_size)
    keys, values = (zeros(shape, shape.num_layers, 3 * shape.page_size, shape.num_kv_heads) for _ in "kv")
    views = HeadPageViews.over(layout, keys, values, chunk_size)
    return views, HeadPageTable(NUM_REQUESTS + 1, 16, max_prompt_pages, layout, "cpu")


def decode_attn(num_means: int = 0) -> Callable[[Shape], Any]:
    """Decode attention over a pool of this shape."""

    def call(shape: Shape) -> Any:
        views, table = tiny_pool(shape, 16)
        q = queries(shape, NUM_REQUESTS)
        rows, lens = torch.ones(NUM_REQUESTS, dtype=torch.int64), torch.ones(NUM_REQUESTS, dtype=torch.int64)
        slots = torch.zeros(NUM_REQUESTS + 1, 64, dtype=torch.int32)
        return gpu.load_twin("decode_attn")(q, views, table, 0, rows, slots, lens, 1.0, num_means)

    return call


def host_pages(shape: Shape, views: HeadPageViews, host_dtype: str) -> HostPages:
    """As many host pages as the pool has head pages, in segments that hold no power of two of them."""
    per_page = shape.num_layers * shape.num_kv_heads
    sizes = (len(views.k_pages), shape.page_size, shape.head_dim, shape.dtype, host_dtype, "cpu", 2 * per_page)
    return HostPages.empty(*sizes)


def retrieve_chunks(
    chunk_score: str,
    estimate: bool = False,
    chunk_size: int | None = None,
    *,
    num_chunks: int = LONG,
    host_dtype: str = "same",
) -> Callable[[Shape], Any]:
    """Retrieval of one layer of a pool of this shape, for prompts of num_chunks chunks, which are pages with None."""

    def call(shape: Shape) -> Any:
        size = chunk_size or shape.page_size
        views, table = tiny_pool(shape, num_chunks * size // shape.page_size, size)
        q = queries(shape, NUM_REQUESTS)
        host = host_pages(shape, views, host_dtype)
        counters, rows = torch.zeros(2, dtype=torch.int64), torch.ones(NUM_REQUESTS, dtype=torch.int64)
        hysteresis = 0.5 if chunk_score in CODED_SCORES else 0.0
        retrieval = Retrieval(1, 2, chunk_score, size, estimate, hysteresis)
        return gpu.load_twin("retrieve_chunks")(q, views, table, host, counters, 0, rows, retrieval)

    return call


def score_heads(statistic: str) -> Callable[[Shape], Any]:
    """Observation of two prompts, one of LONG tokens by 32 rows, and one of fewer."""

    def call(shape: Shape) -> Any:
        k = zeros(shape, LONG, shape.num_kv_heads)
        prompts = [(queries(shape, rows), torch.arange(tokens)) for rows, tokens in ((32, LONG), (7, 100))]
        score = gpu.load_twin("score_heads", "score_heads_batch")
        return score(prompts, k, 1.0, statistic, 0.01, 0.9, shape.page_size, 0.1, 4, 16)

    return call


def compact_kv(shape: Shape) -> Any:
    """A copy of rows of this size."""
    k, rows = zeros(shape, 64), torch.arange(32)
    return gpu.load_twin("compact_kv")(k, k.clone(), rows, rows + 32)


def offload_rows(host_dtype: str) -> Callable[[Shape], Any]:
    """The rows of four pages, stored so."""

    def call(shape: Shape) -> Any:
        views, _ = tiny_pool(shape, 16)
        rows, ids = torch.zeros(2, 2 * shape.page_size, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
        return gpu.load_twin("offload_rows")(views, host_pages(shape, views, host_dtype), rows, ids)

    return call


def select_tokens(shape: Shape) -> Any:
    """Tokens of a prompt of LONG tokens, with a tier for each."""
    score, counts = torch.zeros(shape.num_kv_heads, LONG), torch.ones(shape.num_kv_heads, dtype=torch.int64)
    return gpu.load_twin("select_tokens")(score, counts, torch.zeros(LONG, dtype=torch.uint8), 4, 8)


def cases() -> Iterator[Case]:
    """Every Triton kernel, in the shapes that are worth a look. Kernels of other ops are added here."""
    for page_size in (8, 16, 32):
        yield Case("decode_attn", shape_of(page_size=page_size), decode_attn(), is_gated=True)
    yield Case("decode_attn", shape_of(torch.float32), decode_attn(), is_gated=True)
    for head_dim, group_size in ((64, 8), (80, 1), (128, 16), (256, 4)):
        yield Case(
            "decode_attn", shape_of(head_dim=head_dim, group_size=group_size, page_size=8), decode_attn(), is_gated=True
        )
    yield Case("decode_attn estimate", shape_of(page_size=8), decode_attn(1), is_gated=True)
    yield Case("decode_attn estimate", shape_of(), decode_attn(4), is_gated=True)
    # These kernels run in each decode step that has dynamic heads.
    for chunk_score in ("mean_max", "mean4_max", "arkvale"):
        yield Case(f"retrieve_chunks {chunk_score}", shape_of(page_size=8), retrieve_chunks(chunk_score), is_gated=True)
    yield Case("retrieve_chunks estimate", shape_of(page_size=8), retrieve_chunks("mean2_max", True), is_gated=True)
    for chunk_score, shape in (
        ("mean_mean", shape_of(torch.float16, head_dim=80, group_size=1)),
        ("quest", shape_of(head_dim=64, group_size=8, page_size=64)),
        ("mean4_max", shape_of(group_size=16, page_size=32)),
    ):
        yield Case(f"retrieve_chunks {chunk_score}", shape, retrieve_chunks(chunk_score), is_gated=True)
    codes = {size: retrieve_chunks("key_codes", chunk_size=size) for size in (1, 16)}
    yield Case("retrieve_chunks key_codes", shape_of(page_size=8), codes[1], is_gated=True)
    half = retrieve_chunks("half_codes", chunk_size=1)
    for shape in (shape_of(page_size=8), shape_of(head_dim=256, group_size=4, page_size=8)):
        yield Case("retrieve_chunks half_codes", shape, half, is_gated=True)
    yield Case(
        "retrieve_chunks key_codes", shape_of(torch.float16, head_dim=80, group_size=1), codes[16], is_gated=True
    )
    for shape in (shape_of(page_size=8), shape_of(torch.float16, head_dim=80), shape_of(head_dim=256, group_size=4)):
        rounded = retrieve_chunks("half_codes", chunk_size=1, host_dtype="int8")
        yield Case("retrieve_chunks int8", shape, rounded, is_gated=True)
    # The most images in registers; for longer prompts the kernel is the same.
    for chunk_score, chunk_size in (("half_codes", 1), ("mean_max", None)):  # with and without hysteresis
        longest = retrieve_chunks(chunk_score, chunk_size=chunk_size, num_chunks=LONGER)
        yield Case(f"retrieve_chunks {chunk_score}, long", shape_of(page_size=8), longest, is_gated=True)
    # These take more registers than the limit, but do not spill.
    yield Case("retrieve_chunks key_codes", shape_of(group_size=16, page_size=32), codes[1])
    yield Case("retrieve_chunks key_codes", shape_of(torch.float32), codes[1])
    yield Case("retrieve_chunks arkvale", shape_of(torch.float32), retrieve_chunks("arkvale"))
    # These run once for each layer of a batch of prompts.
    for shape in (
        shape_of(page_size=8),
        shape_of(torch.float32),
        shape_of(torch.float16, head_dim=80, group_size=1),
        shape_of(head_dim=64, group_size=8, page_size=64),
        shape_of(group_size=16, page_size=32),
        shape_of(head_dim=256, group_size=4),
    ):
        yield Case("score_heads", shape, score_heads("worst_capture+hit_cv"), is_gated=True)
    yield Case("score_heads capture", shape_of(), score_heads("capture"), is_gated=True)
    # These kernels run once a prompt, and are not held to the limits.
    yield Case("select_tokens", shape_of(), select_tokens)
    yield Case("compact_kv", shape_of(), compact_kv)
    for host_dtype in HOST_DTYPES:
        for shape in (shape_of(), shape_of(torch.float32), shape_of(torch.float16, head_dim=80, group_size=1)):
            yield Case(f"offload_rows {host_dtype}", shape, offload_rows(host_dtype))


@contextmanager
def caught_launches() -> Iterator[list[tuple[Any, tuple, dict[str, Any]]]]:
    """Kernels are not run but listed, each with its arguments."""
    launches = []

    def catch(kernel, *args, grid, warmup, **kwargs):
        assert all(isinstance(size, int) and size > 0 for size in grid), "a grid depends on something else than shapes"
        launches.append((kernel, args, {"debug": False, **kwargs}))

    with mock.patch.object(triton.JITFunction, "run", catch):
        yield launches


def specialize(kernel: Any, args: tuple, kwargs: dict[str, Any], target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """Source and options that the launch itself would have compiled on such a GPU."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def measure(case: Case, name: str, target: GPUTarget, source: ASTSource, options: dict[str, Any]) -> Usage:
    """Compile one kernel and read the resources from the binary."""
    started = time.perf_counter()
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, assembly = _dump("-res-usage", file.name), _dump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected the registers of {name}, got {resources!r}")
    return Usage(
        case=case,
        kernel=name,
        architecture=target.arch,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", assembly)),
        shared_bytes=compiled.metadata.shared,
        seconds=time.perf_counter() - started,
    )


def _dump(option: str, path: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, path], capture_output=True, text=True, check=True).stdout


def measured(wanted: list[Case], architectures: list[int]) -> Iterator[Usage]:
    """Usage of each kernel of each case, once where cases share it."""
    seen = set()
    for case in wanted:
        with caught_launches() as launches:
            case.call(case.shape)
        if not launches:
            raise RuntimeError(f"{case.name}: expected kernel launches, got none")
        targets = (GPUTarget("cuda", number, 32) for number in architectures)
        for target, (kernel, *arguments) in itertools.product(targets, launches):
            source, options = specialize(kernel, *arguments, target)
            key = (target.arch, source.hash(), str(options))
            if key not in seen:
                seen.add(key)
                yield measure(case, kernel.__name__, target, source, options)


def table_of(usages: list[Usage]) -> Table:
    """One row a kernel and architecture."""
    table = Table("op", "shape", "kernel", "sm", "registers", "stack B", "spills", "shared B", "s", box=None)
    for usage in usages:
        numbers = (usage.architecture, usage.registers, usage.stack_bytes, usage.spills, usage.shared_bytes)
        style = "red" if usage.fault else None
        texts = (usage.case.name, str(usage.case.shape), usage.kernel, *map(str, numbers), f"{usage.seconds:.1f}")
        table.add_row(*texts, style=style)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compile_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--op", default="", help="only cases of which the name starts so")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="repeatable; default: all")
    options = parser.parse_args(arguments)
    if gpu.is_interpreted():
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    wanted = [case for case in cases() if case.name.startswith(options.op)]
    if not wanted:
        print(f"--op {options.op!r} leaves no case", file=sys.stderr)
        return 2
    usages = list(measured(wanted, options.arch or list(ARCHITECTURES)))
    Console(width=140).print(table_of(usages))
    faults = [usage.fault for usage in usages if usage.fault]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
