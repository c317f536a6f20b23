"""Rows of dynamic heads in host memory: one record a token, its key and its value side by side, as they are or rounded.

A fetch of a single token then reads one contiguous piece. Rows are rounded to int8 with a scale of their own. On keys
and values of SmolLM2-135M attention outputs differ so by 1.6 % in the mean, and by 4.8 % with e4m3, whose three bits of
mantissa are too few for keys; on a tiny Qwen2.5-VL by 0.7 % and 3.2 %. bfloat16 alone costs 0.4 % and 0.2 %.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from hybridkv_kernels import checks

HOST_DTYPES = ("same", "int8")
LARGEST_CODE = 127
LEAST_MAXIMUM = 2.0**-100
"""Rows of only smaller numbers are stored as zeros, so that no scale is a subnormal number."""

_ALIGNMENT = 16  # bytes; the widest load of a GPU


def record_bytes(head_dim: int, itemsize: int, host_dtype: str) -> int:
    """Bytes of the key and the value of one token, of `head_dim` elements of `itemsize` bytes in the pool.

    "same" has both rows. "int8" has a byte an element and after them two scales in fp32, of the key and of the value.
    Either is padded to 16 bytes.
    """
    plain = 2 * head_dim * itemsize if host_dtype == "same" else 2 * head_dim + 2 * torch.float32.itemsize
    return -(-plain // _ALIGNMENT) * _ALIGNMENT


def round_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., D], int8, and scales [...], fp32, of rows [..., D].

    The scale is the largest magnitude of the row over 127, in fp32, and a code the element over the scale, rounded to
    the nearest integer, halves to even. A row with an infinity or a NaN has the scale NaN, and codes 0.
    """
    wide = rows.float()
    largest = wide.abs().amax(dim=-1)
    scale = torch.where(largest < LEAST_MAXIMUM, 0.0, largest / LARGEST_CODE)
    scale = torch.where(largest.isfinite(), scale, float("nan"))
    is_coded = (scale > 0).unsqueeze(-1)
    codes = torch.where(is_coded, wide / scale.unsqueeze(-1), 0.0).round()
    return codes.to(torch.int8), scale


def widen_rows(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., D], dtype: what codes [..., D] and scales [...] stand for, a product in fp32 that is rounded once."""
    return (codes.float() * scale.unsqueeze(-1)).to(dtype)


@dataclasses.dataclass(frozen=True)
class HostPages:
    """The host store's memory as the kernels see it; the store owns it.

    Attributes
    ----------
    data : [M_host, P, record_bytes], uint8. Beside a CUDA pool it is pinned, and kernels read and write its address.
    head_dim : D.
    dtype : of the pool's rows.
    host_dtype : one of HOST_DTYPES: "same" keeps rows as they are, "int8" rounds them (`round_rows`).
    """

    data: torch.Tensor
    head_dim: int
    dtype: torch.dtype
    host_dtype: str = "same"

    @classmethod
    def empty(
        cls, num_pages: int, page_size: int, head_dim: int, dtype: torch.dtype, host_dtype: str, pin: bool
    ) -> HostPages:
        """`num_pages` head pages that nobody has written; ValueError when `host_dtype` is unknown."""
        if host_dtype not in HOST_DTYPES:
            raise ValueError(f"host_dtype: expected one of {', '.join(HOST_DTYPES)}, got {host_dtype!r}")
        shape = (num_pages, page_size, record_bytes(head_dim, dtype.itemsize, host_dtype))
        data = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pin)
        return cls(data, head_dim, dtype, host_dtype)

    @property
    def page_size(self) -> int:
        """P."""
        return self.data.shape[1]

    @property
    def record_bytes(self) -> int:
        """Bytes of one token."""
        return self.data.shape[2]

    @functools.cached_property
    def words(self) -> torch.Tensor:
        """The same memory as int32: [M_host, P, record_bytes / 4]."""
        return self.data.view(torch.int32)

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [..., D], in the pool's type, of record rows [...] (head page * P + token), int64."""
        records = self.data.view(-1, self.record_bytes)[rows]
        size = self.head_dim
        if self.host_dtype == "same":
            plain = records.view(self.dtype)
            return plain[..., :size], plain[..., size : 2 * size]
        codes = records[..., : 2 * size].view(torch.int8).unflatten(-1, (2, size))
        scales = records[..., 2 * size : 2 * size + 8].contiguous().view(torch.float32)
        both = widen_rows(codes, scales, self.dtype)
        return both[..., 0, :], both[..., 1, :]

    def write(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [M, D] as record rows [M], int64, without repeats."""
        both = torch.stack((keys, values), dim=1)  # [M, 2, D]
        if self.host_dtype == "same":
            parts = [both.flatten(1).view(torch.uint8)]
        else:
            codes, scales = round_rows(both)
            parts = [codes.flatten(1).view(torch.uint8), scales.view(torch.uint8)]
        padding = self.record_bytes - sum(part.shape[1] for part in parts)
        records = torch.cat([*parts, parts[0].new_zeros(len(rows), padding)], dim=1)
        self.data.view(-1, self.record_bytes)[rows] = records

    def check(self, page_size: int, head_dim: int, dtype: torch.dtype) -> None:
        """ValueError unless these are pages of `page_size` records of rows of `head_dim` elements of `dtype`."""
        for name, expected, got in (("head_dim", head_dim, self.head_dim), ("dtype", dtype, self.dtype)):
            if got != expected:
                raise ValueError(f"host_pages.{name}: expected {expected}, got {got}")
        if head_dim % 2:
            raise ValueError(f"host_pages.head_dim: expected an even number, got {head_dim}")
        if self.host_dtype not in HOST_DTYPES:
            expected = f"one of {', '.join(HOST_DTYPES)}"
            raise ValueError(f"host_pages.host_dtype: expected {expected}, got {self.host_dtype!r}")
        size = record_bytes(head_dim, dtype.itemsize, self.host_dtype)
        checks.check_shape("host_pages.data", self.data, (None, page_size, size))
        checks.check_dtype("host_pages.data", self.data, (torch.uint8,))
        checks.check_contiguous("host_pages.data", self.data)
