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
    if config.option.markexpr != "gpu":  # there the kernels are compiled
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
    interpret_faster()


def interpret_faster():
    """Have Triton's interpreter prepare `triton.language` once a launch, and not for each call of a device function.

    That takes milliseconds a call, a third of the time of our kernels, and changes nothing after the first one.
    """
    from triton.runtime import interpreter

    patch, prepared = interpreter._patch_lang, set()

    def patch_once(function):
        visible = {id(value) for value in function.__globals__.values()}
        languages = {id(language) for language in LANGUAGES} & visible
        if languages <= prepared:
            return interpreter._LangPatchScope()
        prepared.update(languages)
        return patch(function)

    def run_launch(launch, *args, **kwargs):
        prepared.clear()  # the scope of the launch before has restored what it changed
        return call(launch, *args, **kwargs)

    LANGUAGES = (interpreter.tl, interpreter.tl.core)
    call = interpreter.GridExecutor.__call__
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_launch


# An implementation of the kernels, and where: `builders.use_kernels`. "cuda" is the Triton kernels on a GPU.
ON_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


# Class scope is that of one test function, too, and unlike function scope it goes with hypothesis.
@pytest.fixture(params=["naive", "cpu", "triton", ON_CUDA], scope="class")
def kernels(request):
    """Runs the test once with each implementation; few and small cases, please: on the CPU Triton is interpreted."""
    yield from _used(request.param)


@pytest.fixture(params=["naive", "cpu", ON_CUDA], scope="class")
def fast_kernels(request):
    """The same without Triton's interpreter, for laws that are tried on many examples."""
    yield from _used(request.param)


@pytest.fixture(params=["cpu scalar", "cpu avx2", "cpu avx512", "triton", ON_CUDA], scope="class")
def twin(request):
    """Runs the test with each fast implementation, every instruction set of C++ too: for comparisons with `naive`."""
    yield from _used(request.param)


def _used(name):
    from tests.builders import use_kernels

    with use_kernels(name):
        yield name


@pytest.fixture(scope="session")
def vl_model():
    """Folder of a tiny Qwen2.5-VL with random weights."""
    from benchmarks.models.make_models import make_model

    return make_model("tiny-qwen2_5_vl")


def pytest_collection_modifyitems(config, items):
    """Fast tests first, then slow ones, then those that need a server; GPU tests only with `-m gpu`, and on a GPU."""
    items.sort(key=lambda item: 2 if has_marker(item, "server") else 1 if has_marker(item, "slow") else 0)
    if config.option.markexpr != "gpu" or not cuda_is_available():
        gpu_items = [item for item in items if has_marker(item, "gpu")]
        config.hook.pytest_deselected(items=gpu_items)
        items[:] = [item for item in items if item not in set(gpu_items)]


def has_marker(item, name):
    return item.get_closest_marker(name) is not None


def cuda_is_available():
    import torch

    return torch.cuda.is_available()
