"""Device functions for records of the host store, the Triton twin of the arithmetic in `hybridkv_kernels.host_pages`.

A record is read and written as words of 4 bytes, so that one load of a warp takes all of it.
"""

import triton
import triton.language as tl

from hybridkv_kernels.host_pages import LARGEST_CODE, LEAST_MAXIMUM

_LARGEST_CODE, _LEAST_MAXIMUM = tl.constexpr(LARGEST_CODE), tl.constexpr(LEAST_MAXIMUM)
_MAGIC = tl.constexpr(1.5 * 2**23)  # fp32 numbers near it are integers, and the low bits of theirs are the integer's
_TILE_WORDS = 2048


def tile_rows(block: int) -> int:
    """Records of at most `block` words that a program of 4 warps holds at once: 4 loads of 16 bytes of each thread."""
    return max(1, _TILE_WORDS // block)


@triton.jit
def record_pointers(addresses, head_page, token, mask, PAGES: tl.constexpr, P: tl.constexpr, WORDS: tl.constexpr):
    """Where records of WORDS words begin, of tokens `token` of `head_page` [ROWS], int64, of the host store.

    `addresses` points to those of its segments, which have PAGES head pages each. A pinned tensor, and so each record,
    is aligned to 16 bytes; the compiler cannot know it of an address that was loaded.
    """
    base = tl.load(addresses + head_page // PAGES, mask=mask, other=0).to(tl.pointer_type(tl.int32))
    return tl.multiple_of(base, 16) + (head_page % PAGES * P + token) * WORDS


@triton.jit
def _row_scale(wide, ROWS: tl.constexpr):
    """[ROWS], fp32: `host_pages.round_rows`' scales of rows [ROWS, elements], fp32; what is beyond a row is 0."""
    size = tl.abs(wide)
    largest = tl.max(size, 1)
    is_broken = tl.max((size < float("inf")).to(tl.int32) ^ 1, 1) != 0
    scale = tl.where(largest < _LEAST_MAXIMUM, 0.0, tl.div_rn(largest, tl.full([ROWS], _LARGEST_CODE, tl.float32)))
    return tl.where(is_broken, float("nan"), scale)


@triton.jit
def round_record(key, value, D: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BW], int32: records of rows in [ROWS, 4 * BW], `key` at columns 0 to D - 1 and `value` at the next D."""
    e, w = tl.arange(0, 4 * BW), tl.arange(0, BW)
    key_scale, value_scale = _row_scale(key, ROWS), _row_scale(value, ROWS)
    scale = tl.where((e < D)[None, :], key_scale[:, None], value_scale[:, None])
    # Rows that are broken or zero have codes 0. The sum rounds halves to even; the division keeps it from being fused.
    is_coded = scale > 0.0
    quotient = tl.div_rn(tl.where((e < D)[None, :], key, value), tl.where(is_coded, scale, 1.0))
    codes = (tl.where(is_coded, quotient, 0.0) + _MAGIC).to(tl.int32, bitcast=True) & 255
    shifted = tl.reshape(codes, [ROWS, BW, 4]) << (8 * tl.arange(0, 4))[None, None, :]
    words = tl.where((w < D // 2)[None, :], tl.sum(shifted, 2), 0)
    words = tl.where((w == D // 2)[None, :], key_scale.to(tl.int32, bitcast=True)[:, None], words)
    return tl.where((w == D // 2 + 1)[None, :], value_scale.to(tl.int32, bitcast=True)[:, None], words)


@triton.jit
def widen_record(
    words, D: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """[ROWS, 4 * BW], DTYPE: keys at columns 0 to D - 1 and values after them, of records [ROWS, BW], int32."""
    e, w = tl.arange(0, 4 * BW), tl.arange(0, BW)
    # No other word of the row is added, so that the sum is the word.
    key_scale = tl.sum(tl.where((w == D // 2)[None, :], words, 0), 1).to(tl.float32, bitcast=True)
    value_scale = tl.sum(tl.where((w == D // 2 + 1)[None, :], words, 0), 1).to(tl.float32, bitcast=True)
    codes = (words[:, :, None] << (24 - 8 * tl.arange(0, 4))[None, None, :]) >> 24
    scale = tl.where((e < D)[None, :], key_scale[:, None], value_scale[:, None])
    wide = tl.reshape(codes, [ROWS, 4 * BW]).to(tl.float32) * scale
    if INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter cuts off what a GPU rounds
        bits = wide.to(tl.uint32, bitcast=True)
        # It makes another number of a subnormal one, and so no bits of zero may be left below.
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
        wide = tl.where(wide == wide, rounded, wide)
    return wide.to(DTYPE)
