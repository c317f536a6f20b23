"""Device functions that the Triton twins share: where a head page lies, and dot products of both kinds of run.

The Triton twin of the arithmetic in `hybridkv_kernels.head_pages`, which explains it. Addresses are 64 bits wide: a
pool has more than 2**31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def head_page_ids(request_pages, linear, mask, pages_per_layer, L: tl.constexpr, H: tl.constexpr):
    """Rows of the pool's head-page view, int64, for `linear` indices of one request; 0 where not `mask`.

    `request_pages` points to the request's row of `HeadPageTable.pages`; `linear` and `mask` have one shape.
    """
    inside = linear % (L * H)
    page = tl.load(request_pages + linear // (L * H), mask=mask, other=0).to(tl.int64)
    return tl.where(mask, ((inside // H) * pages_per_layer + page) * H + inside % H, 0)


@triton.jit
def host_page_ids(request_host_pages, linear, mask, L: tl.constexpr, H: tl.constexpr):
    """Rows of the host store, in the same way; `request_host_pages` points to the row of `HeadPageTable.host_pages`."""
    page = tl.load(request_host_pages + linear // (L * H), mask=mask, other=0).to(tl.int64)
    return tl.where(mask, page * (L * H) + linear % (L * H), 0)


@triton.jit
def dot(a, b, INTERPRETED: tl.constexpr):
    """a @ b in fp32, without TF32. The interpreter multiplies the bits of bf16 operands, so they are widened there."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def summary_rows(
    request_pages, first_page, vector, mask, pages_per_layer, L: tl.constexpr, H: tl.constexpr, P: tl.constexpr
):
    """Where summary vectors of a dynamic head lie: row of k_flat or v_flat, int64, and whether it is v_flat's.

    `HeadPageTable.summary_places`: vectors fill the K page, then the V page, of one summary page after the other.
    """
    page = head_page_ids(request_pages, first_page + vector // (2 * P), mask, pages_per_layer, L, H)
    return page * P + vector % P, vector // P % 2 == 1
