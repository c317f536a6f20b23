"""Which implementation of a kernel runs: chosen by device, dtype and shape, visible, and forced by HYBRIDKV_KERNELS."""

from __future__ import annotations

import os

import torch

from hybridkv_kernels import cpu

ENVIRONMENT = "HYBRIDKV_KERNELS"
IMPLEMENTATIONS = ("naive", "cpu")


def choose(device: torch.device | str, dtype: torch.dtype, head_dim: int, group_size: int) -> str:
    """Name of the implementation that serves these tensors, one of IMPLEMENTATIONS.

    Raises
    ------
    ValueError
        HYBRIDKV_KERNELS names an implementation that is unknown or cannot serve them; there is no fallback then.
    """
    return _choose(cpu.obstacle(device, dtype, head_dim, group_size))


def choose_copy(device: torch.device | str) -> str:
    """The same for kernels that only copy rows, whatever their type and size."""
    return _choose(cpu.copy_obstacle(device))


def _choose(obstacle: str | None) -> str:
    forced = os.environ.get(ENVIRONMENT)
    if forced is not None and forced not in IMPLEMENTATIONS:
        raise ValueError(f"{ENVIRONMENT} = {forced!r} is not allowed; legal: one of {', '.join(IMPLEMENTATIONS)}")
    if forced == "cpu" and obstacle is not None:
        raise ValueError(f"{ENVIRONMENT} = 'cpu' is impossible here: {obstacle}")
    return forced or ("cpu" if obstacle is None else "naive")


def describe(device: torch.device | str, dtype: torch.dtype, head_dim: int, group_size: int) -> str:
    """The choice for people: its name, the instruction set, and why it is not a faster one."""
    chosen = choose(device, dtype, head_dim, group_size)
    if chosen == "cpu":
        return f"cpu ({cpu.instruction_set()})"
    obstacle = cpu.obstacle(device, dtype, head_dim, group_size)
    return f"naive ({obstacle or f'{ENVIRONMENT} is set'})"
