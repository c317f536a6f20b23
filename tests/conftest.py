import importlib
import os
from pathlib import Path
from unittest import mock

import pytest


def pytest_addoption(parser):
    parser.addoption("--cpu-library", help="C++ kernels to test in place of the installed ones (make test-sanitize)")


def pytest_configure(config):
    path = config.getoption("--cpu-library")
    if path is not None:
        from hybridkv_kernels import cpu

        cpu._LIBRARY = Path(path).resolve(strict=True)
    import_triton_interpreted()


def import_triton_interpreted():
    """Have Triton interpret our kernels in this process, and in no other.

    Triton reads TRITON_INTERPRET when it is imported, and again when a kernel is defined. Here, before anything is
    collected, both happen with the variable set; then it is gone. So the order of tests does not matter, servers that
    tests start do not inherit it, and SGLang's own kernels, defined later in this process, are what they always are.
    """
    import hybridkv_kernels
    from hybridkv_kernels import gpu

    if not gpu.is_installed():
        return
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        for twin in Path(hybridkv_kernels.__file__).parent.glob("*/triton.py"):
            importlib.import_module(f"hybridkv_kernels.{twin.parent.name}.triton")
        importlib.import_module("triton.experimental.gluon")  # the first launch would import it, and asks again
        assert gpu.is_interpreted(), "Triton was imported before the tests' configuration"


@pytest.fixture(params=["naive", "cpu"], scope="class")
def kernels(request):
    """Runs the test once with each implementation of the kernels; the value is its name.

    Class scope is that of one test function, too, and unlike function scope it goes with hypothesis.
    """
    from tests.builders import NO_CPU_KERNELS, forced_kernels

    if request.param == "cpu" and NO_CPU_KERNELS:
        pytest.skip("the C++ kernels were not compiled, and there is no compiler")
    with forced_kernels(request.param):
        yield request.param


@pytest.fixture(scope="class")
def triton_kernels():
    """Runs the test with the Triton kernels, interpreted; few and small tests, please."""
    from tests.builders import forced_kernels

    pytest.importorskip("triton")
    with forced_kernels("triton"):
        yield


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """Fast tests first, then slow ones, then those that need a server; GPU tests are skipped without a GPU.

    Where tests run on several workers, one of them has all servers: there is one at a time, and fixtures share it.
    """
    items.sort(key=lambda item: 2 if has_marker(item, "server") else 1 if has_marker(item, "slow") else 0)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if has_marker(item, "server"):
                item.add_marker(pytest.mark.xdist_group("server"))
    gpu_items = [item for item in items if has_marker(item, "gpu")]
    if gpu_items and not cuda_is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def has_marker(item, name):
    return item.get_closest_marker(name) is not None


def cuda_is_available():
    import torch

    return torch.cuda.is_available()
