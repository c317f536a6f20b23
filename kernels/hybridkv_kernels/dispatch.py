"""Which implementation of a kernel runs: chosen by device, dtype and shape, visible, and forced by HYBRIDKV_KERNELS."""

from __future__ import annotations

import os

import torch

from hybridkv_kernels import cpu, gpu

ENVIRONMENT = "HYBRIDKV_KERNELS"
IMPLEMENTATIONS = ("naive", "cpu", "triton")
_FAST = {"cpu": cpu, "triton": gpu}  # modules whose `obstacle` says why their kernels cannot run


def choose(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, group_size: int, *, has_triton: bool = True
) -> str:
    """Name of the implementation that serves these tensors, one of IMPLEMENTATIONS.

    The C++ kernels serve the CPU and the Triton kernels CUDA, where they can; the torch references serve the rest.
    `has_triton` is False for the kernel that has no Triton twin: where Triton is chosen, the reference runs.

    Raises
    ------
    ValueError
        HYBRIDKV_KERNELS names an implementation that is unknown or cannot serve them; there is no fallback then.
    """
    chosen = _choose(device, lambda fast: fast.obstacle(device, dtype, head_dim, group_size))
    return "naive" if chosen == "triton" and not has_triton else chosen


def choose_copy(device: torch.device | str) -> str:
    """Name of the implementation for kernels that only copy rows, whatever their type and size."""
    return _choose(device, lambda fast: fast.copy_obstacle(device))


def _choose(device, obstacle_of) -> str:
    forced = os.environ.get(ENVIRONMENT)
    if forced is None:
        fast = _fast_for(device)
        return fast if obstacle_of(_FAST[fast]) is None else "naive"
    if forced not in IMPLEMENTATIONS:
        raise ValueError(f"{ENVIRONMENT} = {forced!r} is not allowed; legal: one of {', '.join(IMPLEMENTATIONS)}")
    obstacle = obstacle_of(_FAST[forced]) if forced in _FAST else None
    if obstacle is not None:
        raise ValueError(f"{ENVIRONMENT} = {forced!r} is impossible here: {obstacle}")
    return forced


def _fast_for(device: torch.device | str) -> str:
    return "triton" if torch.device(device).type == "cuda" else "cpu"


def describe(device: torch.device | str, dtype: torch.dtype, head_dim: int, group_size: int) -> str:
    """The choice in words: its name, the instruction set or target, and why no faster one was chosen."""
    chosen = choose(device, dtype, head_dim, group_size)
    if chosen == "cpu":
        return f"cpu ({cpu.instruction_set()})"
    if chosen == "triton":
        return f"triton ({gpu.describe(device)})"
    obstacle = _FAST[_fast_for(device)].obstacle(device, dtype, head_dim, group_size)
    return f"naive ({obstacle or f'{ENVIRONMENT} is set'})"
