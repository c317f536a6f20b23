"""C++ kernels for the CPU, loaded with ctypes: they depend on neither Python's nor torch's binary interface.

The library `_cpu.so` beside this package is compiled when the project is installed; without a compiler it is missing
and `obstacle` says so.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from hybridkv_kernels import checks

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
MAX_GROUP_SIZE = 16
INSTRUCTION_SETS = ("scalar", "avx2", "avx512")

_LIBRARY = Path(__file__).parent.parent / "_cpu.so"


def obstacle(device: torch.device | str, dtype: torch.dtype, head_dim: int, group_size: int) -> str | None:
    """Why the C++ kernels cannot serve these tensors; None when they can."""
    shape = checks.shape_obstacle("the C++ kernels", dtype, head_dim, group_size, HEAD_DIMS, MAX_GROUP_SIZE)
    return shape or copy_obstacle(device)


def copy_obstacle(device: torch.device | str) -> str | None:
    """Why the C++ kernels cannot serve these tensors where a kernel only copies rows; None when they can."""
    if torch.device(device).type != "cpu":
        return f"the C++ kernels run on the CPU, not on {torch.device(device).type}"
    if not _LIBRARY.exists():
        return "the C++ kernels were not compiled; install a C++ compiler and install the project again"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; OSError when `obstacle` would have named one."""
    return ctypes.CDLL(str(_LIBRARY))


@functools.cache
def best_isa() -> int:
    """Index into INSTRUCTION_SETS of the best one that this machine has."""
    return library().hk_best_isa()


def instruction_set() -> str:
    """Name of the instruction set in use."""
    return INSTRUCTION_SETS[best_isa()]


def call(function: str, arguments: ctypes.Structure) -> None:
    """Run a kernel with the best instruction set of this machine."""
    done = getattr(library(), function)(ctypes.byref(arguments), best_isa())
    assert done, f"{function} has no kernel for arguments that `obstacle` let pass"
