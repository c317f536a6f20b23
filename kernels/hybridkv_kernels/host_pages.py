"""Rows of dynamic heads in host memory: one record a token, its key and its value side by side, as they are or rounded.

A fetch of a single token then reads one contiguous piece. Rows are rounded to int8 with a scale of their own. On keys
and values of SmolLM2-135M attention outputs differ so by 1.6 % in the mean, and by 4.8 % with e4m3, whose three bits of
mantissa are too few for keys; on a tiny Qwen2.5-VL by 0.7 % and 3.2 %. bfloat16 alone costs 0.4 % and 0.2 %.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from hybridkv_kernels import checks
from hybridkv_kernels.transfer import pinned

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
    """The host store's memory as the kernels see it; the store owns it, and adds segments while it is served from.

    Head page p lies in segment p // segment_pages. The table of addresses has room for all segments that there may ever
    be, and never moves, so that a captured CUDA graph finds what was added after its capture.

    Attributes
    ----------
    segments : [segment_pages, P, record_bytes], uint8, each; the last one may be shorter. Beside a CUDA pool they are
        pinned, and kernels read and write their addresses.
    addresses : [most segments, at least 1], int64, on the pool's device. Of the segments, 0 where there is none yet.
    segment_pages : head pages of a segment.
    page_size, head_dim : P and D.
    dtype : of the pool's rows.
    host_dtype : one of HOST_DTYPES: "same" keeps rows as they are, "int8" rounds them (`round_rows`).
    """

    segments: list[torch.Tensor]
    addresses: torch.Tensor
    segment_pages: int
    page_size: int
    head_dim: int
    dtype: torch.dtype
    host_dtype: str = "same"

    @classmethod
    def empty(
        cls,
        most_pages: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        host_dtype: str,
        device: torch.device | str,
        segment_pages: int | None = None,
    ) -> HostPages:
        """Room for `most_pages` head pages beside a pool on `device`, without a segment yet; None: one has them all.

        ValueError when `host_dtype` is unknown.
        """
        if host_dtype not in HOST_DTYPES:
            raise ValueError(f"host_dtype: expected one of {', '.join(HOST_DTYPES)}, got {host_dtype!r}")
        segment_pages = segment_pages or max(1, most_pages)
        addresses = torch.zeros(max(1, -(-most_pages // segment_pages)), dtype=torch.int64, device=device)
        return cls([], addresses, segment_pages, page_size, head_dim, dtype, host_dtype)

    @property
    def num_pages(self) -> int:
        """M_host: head pages that there are."""
        return sum(map(len, self.segments[-1:])) + self.segment_pages * max(0, len(self.segments) - 1)

    @property
    def record_bytes(self) -> int:
        """Bytes of one token."""
        return record_bytes(self.head_dim, self.dtype.itemsize, self.host_dtype)

    def segment_shape(self, num_pages: int) -> tuple[int, int, int]:
        """Shape of a segment of `num_pages` head pages."""
        return num_pages, self.page_size, self.record_bytes

    def add(self, segment: torch.Tensor) -> None:
        """Take one more segment, after which there is none where it is shorter than others.

        Its address is copied in the order of the current stream, and the host does not wait.
        """
        checks.check_shape("segment", segment, self.segment_shape(len(segment)))
        checks.check_dtype("segment", segment, (torch.uint8,))
        checks.check_contiguous("segment", segment)
        assert self.num_pages == len(self.segments) * self.segment_pages, "a shorter segment is the last one"
        assert 0 < len(segment) <= self.segment_pages, "a segment is longer than others"
        address = torch.tensor([segment.data_ptr()], dtype=torch.int64, device="cpu")
        self.addresses[len(self.segments) :][:1].copy_(pinned(address, self.addresses.device), non_blocking=True)
        self.segments.append(segment)

    def read(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [..., D], in the pool's type, of record rows [...] (head page * P + token), int64."""
        records = torch.empty(*rows.shape, self.record_bytes, dtype=torch.uint8, device="cpu")
        for segment, is_here, inside in self._by_segment(rows):
            records[is_here] = segment[inside]
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
        for segment, is_here, inside in self._by_segment(rows):
            segment[inside] = records[is_here]

    def _by_segment(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each segment that has some of record `rows`: its records, which rows these are, and where they lie."""
        per_segment = self.segment_pages * self.page_size
        for i in (rows // per_segment).unique().tolist():
            is_here = rows // per_segment == i
            yield self.segments[i].flatten(0, 1), is_here, rows[is_here] % per_segment

    def check(self, page_size: int, head_dim: int, dtype: torch.dtype) -> None:
        """ValueError unless these are pages of `page_size` records of rows of `head_dim` elements of `dtype`."""
        wanted = {"page_size": page_size, "head_dim": head_dim, "dtype": dtype}
        for name, expected in wanted.items():
            if getattr(self, name) != expected:
                raise ValueError(f"host_pages.{name}: expected {expected}, got {getattr(self, name)}")
        if head_dim % 2:
            raise ValueError(f"host_pages.head_dim: expected an even number, got {head_dim}")
        if self.host_dtype not in HOST_DTYPES:
            expected = f"one of {', '.join(HOST_DTYPES)}"
            raise ValueError(f"host_pages.host_dtype: expected {expected}, got {self.host_dtype!r}")
