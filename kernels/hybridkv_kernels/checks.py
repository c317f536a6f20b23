"""Argument checks of the public kernels: each failure names the argument, what was expected and what came."""

from __future__ import annotations

import os

import torch

DEBUG_ENVIRONMENT = "HYBRIDKV_DEBUG"
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


def shape_obstacle(
    kernels: str, dtype: torch.dtype, head_dim: int, group_size: int, head_dims: tuple[int, ...], max_group_size: int
) -> str | None:
    """Why `kernels` of FLOATS, `head_dims` and groups up to `max_group_size` cannot serve a model; None if they can."""
    if dtype not in FLOATS:
        names = ", ".join(str(known).removeprefix("torch.") for known in FLOATS)
        return f"{kernels} have the types {names}, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in head_dims:
        return f"{kernels} have head sizes {', '.join(map(str, head_dims))}, not {head_dim}"
    if not 1 <= group_size <= max_group_size:
        return f"{kernels} have groups of 1 to {max_group_size} query heads, not {group_size}"
    return None


def is_debug() -> bool:
    """Whether HYBRIDKV_DEBUG=1 asks kernels to check the contents of index tensors, too, which syncs."""
    return os.environ.get(DEBUG_ENVIRONMENT, "0") not in ("", "0")


def check_range(name: str, values: torch.Tensor, limit: int) -> None:
    """ValueError unless every entry of the integer tensor `values` is in [0, limit)."""
    if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < limit):
        raise ValueError(f"{name}: expected 0 to {limit - 1}, got {int(values.min())} to {int(values.max())}")
