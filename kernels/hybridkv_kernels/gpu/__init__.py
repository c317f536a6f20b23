"""Triton twins: where they can run, and how they are loaded. Importing this imports neither Triton nor CUDA.

The kernels of `<op>/triton.py` run on CUDA devices. In a process that was started with TRITON_INTERPRET=1 they run in
Triton's interpreter, on CPU tensors: the results are right, but it is very slow. Triton decides once which of the two
it is, when it is first imported. Setting the variable later changes nothing, so `is_interpreted` does not look at it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from hybridkv_kernels import checks

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
MAX_GROUP_SIZE = 16
MIN_CAPABILITY = (8, 0)  # bf16 tensor cores and asynchronous copies


def obstacle(device: torch.device | str, dtype: torch.dtype, head_dim: int, group_size: int) -> str | None:
    """Why the Triton kernels cannot serve these tensors; None when they can."""
    shape = checks.shape_obstacle("the Triton kernels", dtype, head_dim, group_size, HEAD_DIMS, MAX_GROUP_SIZE)
    return shape or copy_obstacle(device)


def copy_obstacle(device: torch.device | str) -> str | None:
    """Why the Triton kernels cannot serve these tensors where a kernel only copies rows; None when they can."""
    device = torch.device(device)
    if device.type not in ("cuda", "cpu"):
        return f"the Triton kernels run on CUDA devices, not on {device.type}"
    if not is_installed():
        return "Triton is not installed"
    if device.type == "cpu":
        if is_interpreted():
            return None
        return "the Triton kernels run on CUDA devices, on the CPU only in a process started with TRITON_INTERPRET=1"
    if is_interpreted():
        return "this process was started with TRITON_INTERPRET=1, which is for CPU tensors only"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if capability(device) < MIN_CAPABILITY:
        found, needed = (".".join(map(str, pair)) for pair in (capability(device), MIN_CAPABILITY))
        return f"the Triton kernels need compute capability {needed} or later, not {found}"
    return None


@functools.cache
def is_installed() -> bool:
    """Whether there is a Triton to import."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def is_interpreted() -> bool:
    """Whether this process interprets Triton's kernels; imports Triton, which `is_installed`."""
    import triton

    from hybridkv_kernels.gpu import head_pages

    return not isinstance(head_pages.head_page_ids, triton.JITFunction)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; a few where kernels are interpreted."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def describe(device: torch.device | str) -> str:
    """Version and target for people, of a device that has no obstacle."""
    import triton

    target = "interpreted" if is_interpreted() else "sm_{}{}".format(*capability(torch.device(device)))
    return f"{triton.__version__}, {target}"


def twin(op: str, function: str | None = None) -> Callable[..., Any]:
    """A function of `hybridkv_kernels/<op>/triton.py`, which is imported at its first call; None is the op's own."""

    def run(*args, **kwargs):
        return load_twin(op, function)(*args, **kwargs)

    return run


@functools.cache
def load_twin(op: str, function: str | None = None) -> Callable[..., Any]:
    """Import a twin."""
    return getattr(importlib.import_module(f"hybridkv_kernels.{op}.triton"), function or op)
