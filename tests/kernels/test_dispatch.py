"""Which implementation serves, and why not a faster one; that importing costs nothing; that interpreting stays here."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridkv_kernels import cpu, dispatch, gpu
from hybridkv_kernels.chunks import Retrieval
from hybridkv_kernels.decode_attn import decode_attn
from hybridkv_kernels.extend_attn import extend_attn
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from hybridkv_kernels.host_pages import HostPages
from hybridkv_kernels.retrieve_chunks import retrieve_chunks
from tests.builders import NO_CPU_KERNELS, make_views

FITTING = {"dtype": torch.bfloat16, "head_dim": 128, "group_size": 7}
# What the fast kernels cannot serve, and what the refusal says: the value and what is legal.
IMPOSSIBLE = [
    ({"dtype": torch.float64}, "have the types float32, bfloat16, float16, not float64"),
    ({"dtype": torch.int8}, "have the types float32, bfloat16, float16, not int8"),
    ({"head_dim": 48}, "have head sizes 32, 64, 80, 96, 128, 256, not 48"),
    ({"head_dim": 512}, "have head sizes 32, 64, 80, 96, 128, 256, not 512"),
    ({"group_size": 17}, "have groups of 1 to 16 query heads, not 17"),
    ({"group_size": 0}, "have groups of 1 to 16 query heads, not 0"),
]
LABELS = {"cpu": "the C++ kernels", "triton": "the Triton kernels"}

needs_library = pytest.mark.skipif(NO_CPU_KERNELS, reason="the C++ kernels were not compiled; there is no compiler")
needs_triton = pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")
each_op = pytest.mark.parametrize("op", [decode_attn, extend_attn, retrieve_chunks])


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)


@pytest.fixture
def cuda_machine(monkeypatch):
    """A CUDA device of compute capability 9.0 as the obstacles see it, kernels compiled."""
    monkeypatch.setattr(gpu, "is_interpreted", lambda: False)
    monkeypatch.setattr(gpu, "is_installed", lambda: True)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture(params=[pytest.param("cpu", marks=needs_library), "triton"])
def fast(request):
    """Name of a fast implementation, and the device that it serves."""
    if request.param == "triton":
        request.getfixturevalue("cuda_machine")
    return request.param, {"cpu": "cpu", "triton": "cuda:0"}[request.param]


def refused(name, message):
    return pytest.raises(ValueError, match=rf"^HYBRIDKV_KERNELS = '{name}' is impossible here: {message}$")


def words(name, message):
    """A refusal of an implementation, as a pattern."""
    return f"{LABELS[name]} {message}".replace("+", r"\+")


def run_python(code, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("value", ["", "CPU", "cuda", "auto", "naive,cpu", "1"])
@pytest.mark.parametrize("change", [{}, {"head_dim": 48}])
def test_unknown_implementations_are_refused(monkeypatch, value, change):
    monkeypatch.setenv(dispatch.ENVIRONMENT, value)
    message = rf"^HYBRIDKV_KERNELS = '{value}' is not allowed; legal: one of naive, cpu, triton$"
    with pytest.raises(ValueError, match=message):
        dispatch.choose("cpu", **FITTING | change)


@pytest.mark.parametrize("dtype", cpu.ELEMENT_TYPES)
@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
@pytest.mark.parametrize("group_size", [1, 7, 16])
def test_what_fits_is_served(fast, dtype, head_dim, group_size):
    name, device = fast
    assert dispatch.choose(device, dtype, head_dim, group_size) == name
    assert dispatch.choose(torch.device(device), dtype, head_dim, group_size) == dispatch.choose_copy(device) == name
    without_triton = dispatch.choose(device, dtype, head_dim, group_size, has_triton=False)
    assert without_triton == ("naive" if name == "triton" else name)


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_what_does_not_fit_is_served_by_the_reference_which_says_why(monkeypatch, fast, change, message):
    """Unless another implementation is forced: there is no fallback then."""
    name, device = fast
    assert dispatch.choose(device, **FITTING | change) == "naive"
    assert dispatch.describe(device, **FITTING | change) == f"naive ({LABELS[name]} {message})"
    monkeypatch.setenv(dispatch.ENVIRONMENT, name)
    with refused(name, words(name, message)):
        dispatch.choose(device, **FITTING | change)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "naive")
    assert dispatch.choose(device, **FITTING | change) == dispatch.choose(device, **FITTING) == "naive"
    assert dispatch.describe(device, **FITTING) == "naive (HYBRIDKV_KERNELS is set)"


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("cpu", "cuda", "run on the CPU, not on cuda"),
        ("cpu", "cuda:1", "run on the CPU, not on cuda"),
        ("cpu", torch.device("meta"), "run on the CPU, not on meta"),
        ("triton", "meta", "run on CUDA devices, not on meta"),
    ],
)
def test_other_devices_are_refused(monkeypatch, name, device, message):
    assert dispatch.choose(device, **FITTING) == "naive"
    monkeypatch.setenv(dispatch.ENVIRONMENT, name)
    with refused(name, words(name, message)):
        dispatch.choose(device, **FITTING)


def test_without_a_library_the_reference_serves_and_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "_LIBRARY", Path("/nowhere/_cpu.so"))
    assert dispatch.choose("cpu", **FITTING) == "naive"
    assert dispatch.describe("cpu", **FITTING).startswith("naive (the C++ kernels were not compiled; ")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cpu")
    no_library = "were not compiled; install a C++ compiler and install the project again"
    with refused("cpu", words("cpu", no_library)):
        dispatch.choose("cpu", **FITTING)


@needs_triton
def test_the_choice_is_described(fast):
    name, device = fast
    targets = {"cpu (scalar)", "cpu (avx2)", "cpu (avx512)"}
    described = dispatch.describe(device, **FITTING)
    assert described in targets if name == "cpu" else described.startswith("triton (") and described.endswith("sm_90)")


@needs_library
def test_the_best_instruction_set_is_one_the_machine_has():
    flags = set()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    wanted = {"scalar": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    possible = [name for name in cpu.INSTRUCTION_SETS if wanted[name] <= flags]
    assert cpu.instruction_set() == possible[-1]


@pytest.mark.usefixtures("cuda_machine")
@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        (gpu, "is_installed", False, "Triton is not installed"),
        (torch.cuda, "is_available", False, "torch finds no CUDA device"),
        (
            gpu,
            "is_interpreted",
            True,
            "this process was started with TRITON_INTERPRET=1, which is for CPU tensors only",
        ),
        (gpu, "capability", (7, 5), "the Triton kernels need compute capability 8.0 or later, not 7.5"),
    ],
)
def test_what_stands_in_the_way_on_cuda_is_said(monkeypatch, where, name, value, message):
    monkeypatch.setattr(where, name, lambda *device: value)
    assert dispatch.describe("cuda:0", **FITTING) == f"naive ({message})"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    with refused("triton", message):
        dispatch.choose("cuda:0", **FITTING)
    with refused("triton", message):
        dispatch.choose_copy("cuda:0")


def test_importing_the_kernels_does_not_import_triton():
    ops = ("decode_attn", "extend_attn", "compact_kv", "offload_rows", "retrieve_chunks", "score_heads")
    imports = f"import sys, torch, {', '.join(f'hybridkv_kernels.{op}' for op in ops)}\n"
    choose = "hybridkv_kernels.dispatch.describe('cpu', torch.bfloat16, 128, 7)\n"
    done = run_python(imports + choose + "sys.exit('triton' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_interpreter_stays_in_this_process():
    """SGLang servers of the tests would interpret their kernels, too."""
    assert "TRITON_INTERPRET" not in os.environ


@needs_triton
def test_triton_is_never_chosen_on_the_cpu_but_can_be_forced_where_it_is_interpreted(monkeypatch):
    assert dispatch.choose("cpu", **FITTING) in ("cpu", "naive")
    assert dispatch.choose_copy("cpu") in ("cpu", "naive")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    assert dispatch.choose("cpu", **FITTING) == dispatch.choose_copy("cpu") == "triton"
    assert dispatch.describe("cpu", **FITTING).endswith(", interpreted)")
    code = "import torch; from hybridkv_kernels import dispatch; dispatch.choose('cpu', torch.bfloat16, 128, 7)"
    here = run_python(code, HYBRIDKV_KERNELS="triton")
    assert "HYBRIDKV_KERNELS = 'triton' is impossible here: the Triton kernels run on CUDA" in here.stderr
    assert here.returncode != 0
    served = run_python(code, HYBRIDKV_KERNELS="triton", TRITON_INTERPRET="1")
    assert served.returncode == 0, served.stderr


def tiny_call(op, dtype=torch.float32, head_dim=32, group_size=1):
    """Call a kernel for one dense request of one token."""
    layout, rows = HeadPageLayout(1, 1, 2, 1), torch.tensor([0])
    keys, values, views = make_views(layout, head_dim, dtype)
    keys.zero_()
    values.fill_(2.0)
    q, slots = torch.zeros(1, group_size, head_dim, dtype=dtype), torch.zeros(1, 1, dtype=torch.int32)
    table = HeadPageTable(1, 1, 1, layout, "cpu")
    if op is decode_attn:
        return decode_attn(q, views, table, 0, rows, slots, torch.tensor([1]), scaling=1.0)
    if op is extend_attn:
        return extend_attn(q, keys[0], values[0], slots, rows, [0], [1], scaling=1.0)
    host, counters = HostPages.empty(2, 1, head_dim, dtype, "same", "cpu"), torch.zeros(2, dtype=torch.int64)
    retrieve_chunks(q, views, table, host, counters, 0, rows, Retrieval(0, 0, "key_codes", 1))
    return values[0, :1]


@each_op
@pytest.mark.parametrize("shape", [{"head_dim": 48}, {"group_size": 17}])
def test_every_kernel_asks(monkeypatch, op, shape):
    """Served by the reference as it is; refused when another implementation is forced."""
    assert (tiny_call(op, **shape) == 2.0).all()
    for name in ("cpu", *(("triton",) if gpu.is_installed() else ())):
        monkeypatch.setenv(dispatch.ENVIRONMENT, name)
        with refused(name, f".*{next(iter(shape.values()))}"):
            tiny_call(op, **shape)


@each_op
def test_the_environment_is_read_at_each_call(monkeypatch, op):
    for forced in ("naive", *(() if NO_CPU_KERNELS else ("cpu",))):
        monkeypatch.setenv(dispatch.ENVIRONMENT, forced)
        assert (tiny_call(op) == 2.0).all()
    monkeypatch.setenv(dispatch.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="^HYBRIDKV_KERNELS = 'fast' is not allowed"):
        tiny_call(op)
