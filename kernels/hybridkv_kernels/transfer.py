"""Copies from the host to the device that the host does not wait for."""

from __future__ import annotations

import torch


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` in memory that `device` copies from without waiting."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host `tensor` on `device`, without waiting for it."""
    return pinned(tensor, device).to(device, non_blocking=True)
