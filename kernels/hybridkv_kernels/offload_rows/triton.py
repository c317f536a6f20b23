"""Triton twin of `offload_rows`: programs encode tiles of records and write them to pinned memory (zero copy).

The records of a page lie side by side, so a warp stores 512 contiguous bytes in pieces of 16 bytes.

The copy runs beside the forward (`offload_heads`), and the host link is its limit, at 50 GB/s. A program that waits a
microsecond for its tile of 8 kB, or half of that rounded, has 4 GB/s or more: so a few programs fill the link, and
leave the processors to the forward.
"""

import torch
import triton
import triton.language as tl

from hybridkv_kernels.gpu.records import record_pointers, round_record, tile_rows
from hybridkv_kernels.head_pages import HeadPageViews
from hybridkv_kernels.host_pages import HostPages

_MOST_PROGRAMS = 64


@triton.jit
def _tile_of_rows(
    tile,
    addresses,
    src_rows,
    host_page_ids,
    num_rows,
    PAGES: tl.constexpr,
    P: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of the pool [ROWS], int64, of a tile, where their records lie, and which of them there are."""
    i = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    page = tl.load(host_page_ids + i // P, mask=i < num_rows, other=-1)
    is_row = page >= 0
    records = record_pointers(addresses, page, i % P, is_row, PAGES, P, WORDS)
    return tl.load(src_rows + i, mask=is_row, other=0), records, is_row


@triton.jit(do_not_specialize=["num_rows"])
def _copy_kernel(
    k_words,
    v_words,
    addresses,
    src_rows,
    host_page_ids,
    num_rows,
    PAGES: tl.constexpr,
    P: tl.constexpr,
    HALF: tl.constexpr,
    WORDS: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copy rows as words of 4 bytes, HALF of a key and HALF of a value in a record of WORDS."""
    w = tl.arange(0, BW)
    from_key, from_value = w < HALF, (w >= HALF) & (w < 2 * HALF)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        src, records, is_row = _tile_of_rows(tile, addresses, src_rows, host_page_ids, num_rows, PAGES, P, WORDS, ROWS)
        at = src[:, None] * HALF + w[None, :]
        key = tl.load(k_words + at, mask=is_row[:, None] & from_key[None, :], other=0)
        value = tl.load(v_words + at - HALF, mask=is_row[:, None] & from_value[None, :], other=0)
        inside = is_row[:, None] & (w < WORDS)[None, :]
        tl.store(records[:, None] + w[None, :], tl.where(from_key[None, :], key, value), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _round_kernel(
    k_flat,
    v_flat,
    addresses,
    src_rows,
    host_page_ids,
    num_rows,
    PAGES: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round rows of D elements to records of WORDS words of 4 bytes."""
    e, w = tl.arange(0, 4 * BW), tl.arange(0, BW)
    from_key, from_value = e < D, (e >= D) & (e < 2 * D)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        src, records, is_row = _tile_of_rows(tile, addresses, src_rows, host_page_ids, num_rows, PAGES, P, WORDS, ROWS)
        at = src[:, None] * D + e[None, :]
        key = tl.load(k_flat + at, mask=is_row[:, None] & from_key[None, :], other=0.0)
        value = tl.load(v_flat + at - D, mask=is_row[:, None] & from_value[None, :], other=0.0)
        words = round_record(key.to(tl.float32), value.to(tl.float32), D, BW, ROWS)
        tl.store(records[:, None] + w[None, :], words, mask=is_row[:, None] & (w < WORDS)[None, :])


def offload_rows(
    views: HeadPageViews, host_pages: HostPages, src_rows: torch.Tensor, host_page_ids: torch.Tensor
) -> None:
    """Arguments as the public function's; on a CUDA device the host store is pinned."""
    num_rows = src_rows.numel()
    if num_rows == 0:
        return
    words = host_pages.record_bytes // 4
    block = triton.next_power_of_2(words)
    shape = {"PAGES": host_pages.segment_pages, "P": host_pages.page_size, "WORDS": words, "BW": block}
    arguments = (host_pages.addresses, src_rows.contiguous(), host_page_ids.contiguous(), num_rows)
    if host_pages.host_dtype == "same":
        pool, rows = (views.k_flat.view(torch.int32), views.v_flat.view(torch.int32)), tile_rows(block)
        grid = (min(triton.cdiv(num_rows, rows), _MOST_PROGRAMS),)
        _copy_kernel[grid](*pool, *arguments, **shape, HALF=pool[0].shape[1], ROWS=rows)
    else:
        # Four numbers of key and value are behind each word, and all are in registers until the scale is known.
        rows = max(1, tile_rows(block) // 2)
        grid = (min(triton.cdiv(num_rows, rows), _MOST_PROGRAMS),)
        _round_kernel[grid](views.k_flat, views.v_flat, *arguments, **shape, D=host_pages.head_dim, ROWS=rows)
