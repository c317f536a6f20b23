"""Decode attention over head pages and the dense tail, one softmax."""

import torch

from hybridkv_kernels import checks
from hybridkv_kernels.decode_attn import naive
from hybridkv_kernels.head_pages import HeadPageTable


def decode_attn(
    q: torch.Tensor,
    k_rows: torch.Tensor,
    v_rows: torch.Tensor,
    k_head_pages: torch.Tensor,
    v_head_pages: torch.Tensor,
    table: HeadPageTable,
    layer_idx: int,
    req_rows: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scaling: float,
) -> torch.Tensor:
    """Attention output of one new token per request, compressed or dense, in one call.

    Parameters
    ----------
    q : [B, H * G, D], bf16 | fp16 | fp32. Queries after RoPE.
    k_rows, v_rows : [slots, H, D], same dtype. This layer's view of the pool, by token slot.
    k_head_pages, v_head_pages : [M, P, D]. The head-page view of the whole pool, same memory.
    table : where each request's head pages lie. A row with num_pages 0 is dense.
    layer_idx : layer within the pool, from 0.
    req_rows : [B], integer. Rows of `table` and of `req_to_token`.
    req_to_token : [R, max_context], integer. Token slots; read in [covered, seq_len) only.
    seq_lens : [B], integer. Logical lengths, the new token included.
    scaling : factor of q . k before the softmax.

    Returns
    -------
    [B, H * G, D], dtype of q.

    Raises
    ------
    ValueError
        A shape, dtype or device is not as above, or the batch is empty.

    Notes
    -----
    Every page of a head is full: budgets are whole pages and the rest of the prompt is in the tail. The order of
    pages does not matter. Cost: bytes of the kept pages and of the tail. `naive` syncs; it is not capturable.
    """
    checks.check_shape("q", q, (None, None, None))
    checks.check_dtype("q", q, checks.FLOATS)
    if q.shape[0] == 0:
        raise ValueError("q: expected at least one request, got an empty batch")
    num_kv_heads, head_dim = table.layout.num_kv_heads, q.shape[2]
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"q: expected a multiple of {num_kv_heads} query heads, got {q.shape[1]}")
    for name, rows in (("k_rows", k_rows), ("v_rows", v_rows)):
        checks.check_shape(name, rows, (None, num_kv_heads, head_dim))
        checks.check_same(name, rows, "q", q)
    for name, pages in (("k_head_pages", k_head_pages), ("v_head_pages", v_head_pages)):
        checks.check_shape(name, pages, (None, table.layout.page_size, head_dim))
        checks.check_same(name, pages, "q", q)
    checks.check_shape("v_head_pages", v_head_pages, tuple(k_head_pages.shape))
    checks.check_shape("req_rows", req_rows, (q.shape[0],))
    checks.check_shape("seq_lens", seq_lens, (q.shape[0],))
    return naive.decode_attn(
        q, k_rows, v_rows, k_head_pages, v_head_pages, table, layer_idx, req_rows, req_to_token, seq_lens, scaling
    )
