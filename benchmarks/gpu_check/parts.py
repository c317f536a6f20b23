"""The parts of the check: what each one does where, what of it needs a GPU, and how it ends."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.bench_memory import AdmissionLoad, admission_rows
from benchmarks.gpu_check import bandwidth, e2e, e2e_plan, servers
from benchmarks.gpu_check.reference import Mismatch
from hybridkv_kernels import dispatch
from sglang_hybridkv.config import ChunkScore, HostDtype

KERNEL_SECONDS = 3600.0
"""Time limit for the tests of the kernels. Most of it goes into compiling, or into interpreting without a GPU."""
ROOT = Path(__file__).parents[2]
MOST_WORDS = 3000
"""Characters of a server's failure, the end of its log among them."""
SERVER_LOAD = {
    "cpu": servers.Load((200, 333), 8),
    "cuda": servers.Load((200, 333, 1500, 2049, 4000, 8191), 64),
}
ADMISSION = {"cpu": AdmissionLoad(12, 1024, 48, 3), "cuda": AdmissionLoad()}
BANDWIDTH_CHUNKS: tuple[tuple[int, ChunkScore, HostDtype], ...] = (
    (8, "mean_max", "same"),
    (16, "mean_max", "same"),
    (8, "key_codes", "same"),
    (8, "half_codes", "same"),
    (8, "half_codes", "int8"),
)
"""Page size, chunk score and type of the host rows of the rows."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Context:
    """What the parts share.

    Attributes
    ----------
    device : "cpu" or "cuda".
    model : checkpoint of the servers; a callable, as it may have to be made.
    seed : seed of all random input.
    setups : names of servers, as "triton:float16"; a part of which none is named runs all that it runs by itself.
    plan : what the part e2e asks; None is what it asks by itself.
    """

    device: str
    model: Callable[[], Path]
    seed: int
    setups: tuple[str, ...] = ()
    plan: e2e_plan.Plan | None = None

    @property
    def has_gpu(self) -> bool:
        return self.device == "cuda"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a part ended: "ran" (all of it), "reduced" (what does not need a GPU) or "failed"."""

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
    """Free the device memory that torch would keep for this process, as servers of a later part need it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _fault_of(row: Row) -> str:
    return f"{row.get('op', '')} {'; '.join(row['failures'])}".strip()


def kernel_rows(context: Context) -> Iterator[Row]:
    """Run the tests of the kernels, on a GPU those of Triton's and FlashInfer's; yield a row for each file of tests."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        raise Mismatch(
            f"the kernels are checked by their tests, which need pytest and hypothesis: no {missing[0]} here"
        )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # pyproject.toml asks more of pytest for our own runs, such as a plugin for timeouts. It is left out here.
        command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
        command += ["-m", "gpu" if context.has_gpu else "not gpu", f"--junitxml={report}", "tests/kernels"]
        command += [f"--hypothesis-seed={context.seed}"]
        environment = os.environ | {"HYBRIDKV_TEST_SEED": str(context.seed)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=KERNEL_SECONDS, check=False
        )
        rows = list(rows_of_report(report)) if report.exists() else []
    kernels = dispatch.describe(context.device, torch.bfloat16, 128, 7)
    for row in rows:
        yield row | {"device": context.device, "kernels": kernels, "seed": context.seed}
    if done.returncode and all(row["ok"] for row in rows):
        last_words = ((done.stdout + done.stderr).strip().splitlines() or ["no word"])[-1]
        raise Mismatch(f"the tests of the kernels ended with status {done.returncode}: {last_words}")


def rows_of_report(report: Path) -> Iterator[Row]:
    """A row for each file of tests in pytest's JUnit report: how many ran, how long, and the first that failed."""
    files: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        files.setdefault(case.get("classname", "").split(".test_")[-1].split(".")[0], []).append(case)
    for name, cases in files.items():
        problems = [(case, fault) for case in cases for fault in (*case.iter("failure"), *case.iter("error"))]
        failures = [f"{case.get('name')}: {fault.get('message')}" for case, fault in problems]
        ran = sum(case.find("skipped") is None for case in cases)
        seconds = sum(float(case.get("time", 0)) for case in cases)
        row: Row = {"op": name, "cases": ran, "ok": not failures, "failures": failures[:5]}
        yield row | {"failed_cases": len(failures), "seconds": round(seconds, 2)}


def server_rows(context: Context) -> Iterator[Row]:
    """Each attention backend: stock, budget 1.0 and budget 0.1."""
    known = servers.setups(context.device)[0]
    for setup in [one for one in known if one.name in context.setups] or known:
        try:
            yield from servers.comparisons(setup, context.model(), SERVER_LOAD[context.device])
        except Exception as error:  # the other backends are worth a look all the same
            traceback.print_exc()
            failure = f"{setup.name}: {type(error).__name__}: {error}"
            yield dataclasses.asdict(setup) | {"ok": False, "failures": [failure[-MOST_WORDS:]]}


def bandwidth_rows(context: Context) -> Iterator[Row]:
    """The workload of the criteria, which are judged on a GPU only."""
    for page_size, chunk_score, host_dtype in BANDWIDTH_CHUNKS:
        full = bandwidth.Workload() if context.has_gpu else bandwidth.SMALL
        chunks = {"page_size": page_size, "chunk_score": chunk_score, "host_dtype": host_dtype}
        workload = dataclasses.replace(full, **chunks)
        row = bandwidth.measure(workload, context.device, context.seed)
        missed = bandwidth.unmet(row) if context.has_gpu else []
        if not context.has_gpu:
            # Quotients of another device, length and baseline say nothing about those that count.
            row = {name: value for name, value in row.items() if name not in bandwidth.QUOTIENTS}
        yield row | {"page_size": page_size, "judged": context.has_gpu, "ok": not missed, "failures": missed}


def concurrency_rows(context: Context) -> Iterator[Row]:
    """Requests that run at once in the same pool, stock and compressed."""
    for row in admission_rows(context.model(), ADMISSION[context.device]):
        ratio = row.get("max_running_ratio")
        missed = [] if ratio is None or ratio > 1 else [f"{ratio:g} times as many requests run at once as on stock"]
        yield row | {"bench": "gpu_check", "ok": not missed, "failures": missed}


def e2e_rows(context: Context) -> Iterator[Row]:
    """Whole servers, stock beside ours; aims are judged on a GPU only."""
    standard, named, _ = e2e_plan.setups(context.device)
    chosen = [one for one in (*standard, *named) if one.name in context.setups] or standard
    plan = context.plan or e2e_plan.Plan(context.device, e2e_plan.LOADS[context.device])
    yield from e2e.e2e_rows(plan, chosen, context.seed)


def _without_gpu(*what: str) -> Callable[[str], Sequence[str]]:
    return lambda device: () if device == "cuda" else what


PARTS = (
    Part(
        "kernels",
        "the tests of every kernel, and of a captured decode step while the batch changes",
        kernel_rows,
        _without_gpu("compiled Triton kernels, FlashInfer and CUDA graphs: they need a GPU (Triton is interpreted)"),
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
    Part("e2e", "whole servers beside stock, and the memory wall", e2e_rows, lambda device: e2e_plan.setups(device)[2]),
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


def chosen_setups(names: str, device: str) -> tuple[str, ...]:
    """Names of a comma-separated list; ValueError when one is none of the device's."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    standard, named, _ = e2e_plan.setups(device)
    legal = [setup.name for setup in (*servers.setups(device)[0], *standard, *named)]
    for name in wanted:
        if name not in legal:
            raise ValueError(f"--setups = {name!r} is not allowed; legal: {', '.join(legal)}, comma-separated")
    return tuple(wanted)
