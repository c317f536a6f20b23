"""Argument checks of the public kernels: each failure names the argument, what was expected and what came."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """ValueError unless `tensor` has the `expected` shape; None matches any size."""
    actual = tuple(tensor.shape)
    if len(actual) != len(expected) or any(e is not None and e != a for e, a in zip(expected, actual, strict=True)):
        wanted = "[" + ", ".join("*" if e is None else str(e) for e in expected) + "]"
        raise ValueError(f"{name}: expected shape {wanted}, got {list(actual)}")


def check_dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """ValueError unless the dtype of `tensor` is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = " | ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    """ValueError unless `tensor` is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def check_same(name: str, tensor: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """ValueError unless dtype and device of `tensor` are those of `reference`."""
    if tensor.dtype != reference.dtype or tensor.device != reference.device:
        raise ValueError(
            f"{name}: expected {reference.dtype} on {reference.device} like {reference_name}, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def check_group(name: str, q: torch.Tensor, num_kv_heads: int) -> None:
    """ValueError unless q [B, heads, D] has requests, and a multiple of `num_kv_heads` query heads."""
    if q.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one request, got an empty batch")
    if q.shape[1] == 0 or q.shape[1] % num_kv_heads:
        raise ValueError(f"{name}: expected a multiple of {num_kv_heads} query heads, got {q.shape[1]}")
