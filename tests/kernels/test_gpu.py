"""When Triton's kernels serve, and why not; that importing costs nothing; that interpreting stays in this process."""

import os
import subprocess
import sys

import pytest
import torch

from hybridkv_kernels import dispatch, gpu
from hybridkv_kernels.decode_attn import decode_attn
from hybridkv_kernels.extend_attn import extend_attn
from tests.kernels.test_dispatch import tiny_call

FITTING = {"device": "cpu", "dtype": torch.bfloat16, "head_dim": 128, "group_size": 7}
CUDA = FITTING | {"device": "cuda:0"}
IMPOSSIBLE = [
    ({"device": "meta"}, "run on CUDA devices, not on meta"),
    ({"dtype": torch.float64}, "have the types float32, bfloat16, float16, not float64"),
    ({"head_dim": 48}, "have head sizes 32, 64, 80, 96, 128, not 48"),
    ({"group_size": 17}, "have groups of 1 to 16 query heads, not 17"),
    ({"group_size": 0}, "have groups of 1 to 16 query heads, not 0"),
]
INTERPRETING = "TRITON_INTERPRET=1"
REFUSED = "^HYBRIDKV_KERNELS = 'triton' is impossible here: "

needs_triton = pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")


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


def run_python(code, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_importing_the_kernels_does_not_import_triton():
    imports = "import sys, hybridkv_kernels.decode_attn, hybridkv_kernels.extend_attn, hybridkv_kernels.compact_kv, "
    imports += "hybridkv_kernels.retrieve_chunks, hybridkv_kernels.score_heads, hybridkv_kernels.fetch_chunks, "
    imports += "hybridkv_kernels.select_chunks, hybridkv_kernels.gpu, torch\n"
    choose = "hybridkv_kernels.dispatch.describe('cpu', torch.bfloat16, 128, 7)\n"
    done = run_python(imports + choose + "sys.exit('triton' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_interpreter_stays_in_this_process():
    """SGLang servers of the tests would interpret their kernels, too."""
    assert "TRITON_INTERPRET" not in os.environ


@needs_triton
def test_triton_is_never_chosen_on_the_cpu_but_can_be_forced(monkeypatch):
    assert dispatch.choose(**FITTING) in ("cpu", "naive")
    assert dispatch.choose_copy("cpu") in ("cpu", "naive")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    assert dispatch.choose(**FITTING) == dispatch.choose_copy("cpu") == "triton"
    assert dispatch.describe(**FITTING).startswith("triton (")
    assert dispatch.describe(**FITTING).endswith(", interpreted)")


@needs_triton
def test_forced_on_the_cpu_without_the_interpreter_it_is_refused():
    code = "import torch; from hybridkv_kernels import dispatch; dispatch.choose('cpu', torch.bfloat16, 128, 7)"
    refused = run_python(code, HYBRIDKV_KERNELS="triton")
    assert (
        "ValueError: HYBRIDKV_KERNELS = 'triton' is impossible here: the Triton kernels run on CUDA" in refused.stderr
    )
    assert refused.returncode != 0
    served = run_python(code, HYBRIDKV_KERNELS="triton", TRITON_INTERPRET="1")
    assert served.returncode == 0, served.stderr


@needs_triton
@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_what_does_not_fit_is_refused_when_forced(monkeypatch, change, message):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    with pytest.raises(ValueError, match=f"{REFUSED}the Triton kernels {message}$"):
        dispatch.choose(**FITTING | change)


@pytest.mark.usefixtures("cuda_machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", gpu.HEAD_DIMS)
@pytest.mark.parametrize("group_size", [1, 7, 16])
def test_on_cuda_it_serves_what_fits(dtype, head_dim, group_size):
    assert dispatch.choose("cuda", dtype, head_dim, group_size) == "triton"
    assert dispatch.choose_copy(torch.device("cuda:1")) == "triton"
    assert dispatch.choose("cuda", dtype, head_dim, group_size, has_triton=False) == "naive"


@pytest.mark.usefixtures("cuda_machine")
@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE[1:])
def test_on_cuda_the_reference_serves_the_rest_and_says_why(change, message):
    assert dispatch.choose(**CUDA | change) == "naive"
    assert dispatch.describe(**CUDA | change) == f"naive (the Triton kernels {message})"


@needs_triton
@pytest.mark.usefixtures("cuda_machine")
def test_the_choice_on_cuda_is_described(monkeypatch):
    assert dispatch.describe(**CUDA).startswith("triton (")
    assert dispatch.describe(**CUDA).endswith(", sm_90)")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "naive")
    assert dispatch.describe(**CUDA) == "naive (HYBRIDKV_KERNELS is set)"


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
    ],
)
def test_what_stands_in_the_way_on_cuda_is_said(monkeypatch, where, name, value, message):
    monkeypatch.setattr(where, name, lambda: value)
    assert dispatch.describe(**CUDA) == f"naive ({message})"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    with pytest.raises(ValueError, match=f"{REFUSED}{message}$"):
        dispatch.choose(**CUDA)
    with pytest.raises(ValueError, match=f"{REFUSED}{message}$"):
        dispatch.choose_copy(CUDA["device"])


@pytest.mark.usefixtures("cuda_machine")
def test_old_devices_are_named(monkeypatch):
    monkeypatch.setattr(gpu, "capability", lambda device: (7, 5))
    assert dispatch.describe(**CUDA) == "naive (the Triton kernels need compute capability 8.0 or later, not 7.5)"


@needs_triton
@pytest.mark.parametrize("shape", [{"head_dim": 48}, {"group_size": 17}])
@pytest.mark.parametrize("op", [decode_attn, extend_attn])
def test_forced_kernels_do_not_fall_back(monkeypatch, op, shape):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    with pytest.raises(ValueError, match=f"{REFUSED}.*{next(iter(shape.values()))}$"):
        tiny_call(op, **shape)
