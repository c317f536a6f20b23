import contextlib
from pathlib import Path

import pytest
import torch

from hybridkv_kernels import cpu, dispatch
from hybridkv_kernels.decode_attn import decode_attn
from hybridkv_kernels.extend_attn import extend_attn
from hybridkv_kernels.head_pages import HeadPageLayout, HeadPageTable
from hybridkv_kernels.retrieve_chunks import retrieve_chunks
from tests.builders import NO_CPU_KERNELS, make_views

FITTING = {"device": "cpu", "dtype": torch.bfloat16, "head_dim": 128, "group_size": 7}
# What the C++ kernels cannot serve, and what the refusal says: the value and what is legal.
IMPOSSIBLE = [
    ({"device": "cuda"}, r"on the CPU, not on cuda$"),
    ({"device": "cuda:1"}, r"on the CPU, not on cuda$"),
    ({"device": torch.device("meta")}, r"on the CPU, not on meta$"),
    ({"dtype": torch.float64}, r"types float32, bfloat16, float16, not float64$"),
    ({"dtype": torch.int8}, r"types float32, bfloat16, float16, not int8$"),
    ({"head_dim": 48}, r"head sizes 32, 64, 80, 96, 128, not 48$"),
    ({"head_dim": 256}, r"head sizes 32, 64, 80, 96, 128, not 256$"),
    ({"group_size": 17}, r"groups of 1 to 16 query heads, not 17$"),
    ({"group_size": 0}, r"groups of 1 to 16 query heads, not 0$"),
]
IMPOSSIBLE_HERE = "^HYBRIDKV_KERNELS = 'cpu' is impossible here: "
NO_LIBRARY = r"not compiled; install a C\+\+ compiler and install the project again$"

needs_library = pytest.mark.skipif(NO_CPU_KERNELS, reason="the C++ kernels were not compiled; there is no compiler")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(cpu, "_LIBRARY", Path("/nowhere/_cpu.so"))


@pytest.mark.parametrize("value", ["", "CPU", "cuda", "auto", "naive,cpu", "1"])
@pytest.mark.parametrize("change", [{}, {"head_dim": 48}])
def test_unknown_implementations_are_refused(monkeypatch, value, change):
    monkeypatch.setenv(dispatch.ENVIRONMENT, value)
    with pytest.raises(
        ValueError, match=rf"^HYBRIDKV_KERNELS = '{value}' is not allowed; legal: one of naive, cpu, triton$"
    ):
        dispatch.choose(**FITTING | change)


@needs_library
@pytest.mark.parametrize("dtype", cpu.ELEMENT_TYPES)
@pytest.mark.parametrize("head_dim", cpu.HEAD_DIMS)
@pytest.mark.parametrize("group_size", [1, 16])
def test_what_fits_is_served_by_cpp(dtype, head_dim, group_size):
    assert dispatch.choose("cpu", dtype, head_dim, group_size) == "cpu"
    assert dispatch.choose(torch.device("cpu"), dtype, head_dim, group_size) == "cpu"


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_what_does_not_fit_is_served_by_the_reference(change, message):
    assert dispatch.choose(**FITTING | change) == "naive"


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_forcing_the_impossible_is_an_error(monkeypatch, change, message):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cpu")
    with pytest.raises(ValueError, match=rf"{IMPOSSIBLE_HERE}the C\+\+ kernels .*{message}"):
        dispatch.choose(**FITTING | change)


@pytest.mark.parametrize("change", [{}, *(change for change, _ in IMPOSSIBLE)])
def test_the_reference_can_always_be_forced(monkeypatch, change):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "naive")
    assert dispatch.choose(**FITTING | change) == "naive"


@pytest.mark.usefixtures("without_library")
def test_without_a_library_the_reference_serves_and_says_so(monkeypatch):
    assert dispatch.choose(**FITTING) == "naive"
    assert dispatch.describe(**FITTING).startswith("naive (the C++ kernels were not compiled; ")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cpu")
    with pytest.raises(ValueError, match=f"{IMPOSSIBLE_HERE}.*{NO_LIBRARY}"):
        dispatch.choose(**FITTING)


@needs_library
def test_the_choice_is_described(monkeypatch):
    assert dispatch.describe(**FITTING) in {"cpu (scalar)", "cpu (avx2)", "cpu (avx512)"}
    assert dispatch.describe(**FITTING | {"head_dim": 48}) == (
        "naive (the C++ kernels have head sizes 32, 64, 80, 96, 128, not 48)"
    )
    monkeypatch.setenv(dispatch.ENVIRONMENT, "naive")
    assert dispatch.describe(**FITTING) == "naive (HYBRIDKV_KERNELS is set)"


def flags_of_this_machine():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()


@needs_library
def test_the_best_instruction_set_is_one_the_machine_has():
    flags = flags_of_this_machine()
    wanted = {"scalar": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    possible = [name for name in cpu.INSTRUCTION_SETS if wanted[name] <= flags]
    assert cpu.instruction_set() == possible[-1]


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
    counters = torch.zeros(2, dtype=torch.int64)
    windows = {"num_sink_chunks": 0, "num_recent_chunks": 0, "chunk_score": "key_codes", "chunk_size": 1}
    retrieve_chunks(q, views, table, views.k_pages, views.v_pages, counters, 0, rows, **windows)
    return values[0, :1]


@pytest.mark.parametrize("op", [decode_attn, extend_attn, retrieve_chunks])
@pytest.mark.parametrize("shape", [{"head_dim": 48}, {"group_size": 17}])
def test_every_kernel_asks(monkeypatch, op, shape):
    """Served by the reference as it is; refused when C++ is forced."""
    assert (tiny_call(op, **shape) == 2.0).all()
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cpu")
    with pytest.raises(ValueError, match=f"{IMPOSSIBLE_HERE}.*{next(iter(shape.values()))}$"):
        tiny_call(op, **shape)


@pytest.mark.parametrize("op", [decode_attn, extend_attn, retrieve_chunks])
def test_the_environment_is_read_at_each_call(monkeypatch, op):
    for forced in ("naive", *(() if NO_CPU_KERNELS else ("cpu",))):
        monkeypatch.setenv(dispatch.ENVIRONMENT, forced)
        assert (tiny_call(op) == 2.0).all()
    monkeypatch.setenv(dispatch.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="^HYBRIDKV_KERNELS = 'fast' is not allowed"):
        tiny_call(op)
