"""Bring the chosen chunks of dynamic heads to their device buffers; only what is missing moves."""

import torch

from hybridkv_kernels import checks
from hybridkv_kernels.fetch_chunks import naive


def fetch_chunks(
    selected: torch.Tensor,
    buffer_page_ids: torch.Tensor,
    num_buffer_pages: torch.Tensor,
    chunk_of_head_page: torch.Tensor,
    k_head_pages: torch.Tensor,
    v_head_pages: torch.Tensor,
    host_page_ids: torch.Tensor,
    k_host_pages: torch.Tensor,
    v_host_pages: torch.Tensor,
) -> torch.Tensor:
    """Make the buffers of E dynamic heads hold exactly their `selected` chunks.

    Parameters
    ----------
    selected : [E, C], bool. num_buffer_pages[e] entries of row e are True.
    buffer_page_ids : [E, S], int64. Head pages of each buffer; columns from num_buffer_pages[e] on are not read.
    num_buffer_pages : [E], integer, in [1, S].
    chunk_of_head_page : [M], int32, in place. Chunk that each head page holds: the residency map.
    k_head_pages, v_head_pages : [M, P, D], in place. The pool.
    host_page_ids : [E, C], int64. Where each chunk lies in the host store.
    k_host_pages, v_host_pages : [M_host, P, D], same dtype. The host store (pinned where the pool is on CUDA).

    Returns
    -------
    Number of chunks that were moved, int64 scalar tensor.

    Notes
    -----
    A "head page" is here what holds one chunk of P tokens: a whole page, or a part of it where chunks are smaller than
    pages and all memory is counted in them. A chunk that stays keeps its place, so a buffer is not in position order.
    Cost: 2 P D itemsize bytes a moved chunk over the host link. Source: HybridKV (arXiv 2604.05887).
    """
    num_heads, num_chunks = selected.shape
    checks.check_dtype("selected", selected, (torch.bool,))
    checks.check_shape("buffer_page_ids", buffer_page_ids, (num_heads, None))
    checks.check_shape("num_buffer_pages", num_buffer_pages, (num_heads,))
    checks.check_shape("host_page_ids", host_page_ids, (num_heads, num_chunks))
    checks.check_shape("k_head_pages", k_head_pages, (None, None, None))
    checks.check_dtype("k_head_pages", k_head_pages, checks.FLOATS)
    checks.check_shape("v_head_pages", v_head_pages, tuple(k_head_pages.shape))
    for name, pages in (("k_host_pages", k_host_pages), ("v_host_pages", v_host_pages)):
        checks.check_shape(name, pages, (None, *k_head_pages.shape[1:]))
        checks.check_dtype(name, pages, (k_head_pages.dtype,))
    checks.check_same("v_head_pages", v_head_pages, "k_head_pages", k_head_pages)
    checks.check_dtype("chunk_of_head_page", chunk_of_head_page, (torch.int32,))
    checks.check_shape("chunk_of_head_page", chunk_of_head_page, (k_head_pages.shape[0],))
    return naive.fetch_chunks(
        selected,
        buffer_page_ids,
        num_buffer_pages,
        chunk_of_head_page,
        k_head_pages,
        v_head_pages,
        host_page_ids,
        k_host_pages,
        v_host_pages,
    )
