"""Decode attention over head pages, the dense tail and the means of what is not retrieved, one softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hybridkv_kernels import checks, dispatch, gpu
from hybridkv_kernels.chunks import Retrieval
from hybridkv_kernels.decode_attn import cpu, naive
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews

if TYPE_CHECKING:
    from hybridkv_kernels.decode_attn.triton_plan import DecodePlan

_IMPLEMENTATIONS = {"naive": naive.decode_attn, "cpu": cpu.decode_attn, "triton": gpu.twin("decode_attn")}
_plan = gpu.twin("decode_attn", "plan_decode")


def decode_attn(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    layer_idx: int,
    req_rows: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scaling: float,
    retrieval: Retrieval | None = None,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    """Attention output of one new token per request, compressed or dense, in one call.

    Parameters
    ----------
    q : [B, H * G, D], bf16 | fp16 | fp32. Queries after RoPE.
    views : the KV pool, same dtype; read by token slot and by head page.
    table : where each request's head pages lie. A row with num_pages 0 is dense. In a layer for which its layout has
        a window, only a head's last rows count, head pages before the tail; so these pages have to be in order.
    layer_idx : layer within the pool, from 0.
    req_rows : [B], integer. Rows of `table` and of `req_to_token`.
    req_to_token : [R, max_context], int32, contiguous. Token slots; read in [covered, seq_len) only.
    seq_lens : [B], integer. Logical lengths, the new token included; each at least covered + 1.
    scaling : factor of q . k before the softmax.
    retrieval : how dynamic heads retrieve; with None nothing is estimated. With `retrieval.estimate`, each chunk that a
        dynamic head's buffer does not hold, by `views.held_chunks`, takes part through its V means. The logit of a
        mean is scaling * q . mean_key + log(P / V), and its value is mean_value. Static heads and dense requests have
        nothing to estimate. Where every chunk is resident, estimating changes no bit of the result.
    plan : what `plan_decode` returned for this step; None plans this layer alone, where there is something to plan.

    Returns
    -------
    [B, H * G, D], dtype of q.

    Raises
    ------
    ValueError
        A shape, dtype, device or name is not as above, or the batch is empty.

    Notes
    -----
    Every page of a head is full: budgets are whole pages and the rest of the prompt is in the tail. The order of
    pages does not matter without a window. `naive` syncs, so it is not capturable. Cost: the kept pages and the tail
    are read once.
    Where chunks are estimated, each dynamic head reads C * 2 V * D elements more, C being its chunks that are not
    resident. The estimate is the estimation zone of RetroInfer (arXiv 2505.02922), with all chunks in place of some of
    its clusters.
    """
    layout = table.layout
    checks.check_shape("q", q, (None, None, None))
    checks.check_dtype("q", q, checks.FLOATS)
    checks.check_group("q", q, layout.num_kv_heads)
    views.check(q, layer_idx)
    checks.check_shape("req_rows", req_rows, (q.shape[0],))
    checks.check_shape("seq_lens", seq_lens, (q.shape[0],))
    checks.check_shape("req_to_token", req_to_token, (None, None))
    checks.check_dtype("req_to_token", req_to_token, (torch.int32,))
    checks.check_contiguous("req_to_token", req_to_token)
    num_means = 0
    if retrieval is not None and retrieval.estimate:
        retrieval.check(layout.page_size)
        views.check_chunks(retrieval.chunk_size)
        num_means = retrieval.num_means
    if checks.is_debug():
        table.check_rows(req_rows, layer_idx)
        if num_means:
            table.check_summaries(req_rows, layer_idx, 2 * num_means, views)
        slots_per_layer = layout.pages_per_layer * layout.page_size
        for row, covered, seq_len in zip(req_rows, table.covered[req_rows.long()], seq_lens, strict=True):
            checks.check_range(f"req_to_token[{int(row)}]", req_to_token[row, covered:seq_len], slots_per_layer)
    chosen = dispatch.choose(q.device, q.dtype, q.shape[2], q.shape[1] // layout.num_kv_heads)
    more = {} if plan is None else {"plan": plan}
    return _IMPLEMENTATIONS[chosen](
        q, views, table, layer_idx, req_rows, req_to_token, seq_lens, scaling, num_means, **more
    )


def plan_decode(
    q: torch.Tensor,
    table: HeadPageTable,
    req_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    retrieval: Retrieval | None = None,
) -> DecodePlan | None:
    """Share out the rows that all layers of one step read, in one launch; None where the kernels need no plan.

    Parameters
    ----------
    q, table, req_rows, seq_lens, retrieval : as `decode_attn` of every layer gets them; of q only the shape counts.

    Notes
    -----
    The plan is one of the contents that the table, the rows and the lengths have now: a step whose lengths or rows
    differ needs another one, and so does one after a row was bound, compressed or cleared. Retrieval changes nothing
    of it. The layers of a step attend one after the other, as they share counters. CUDA graph: capturable, no sync.
    """
    checks.check_shape("q", q, (None, None, None))
    checks.check_group("q", q, table.layout.num_kv_heads)
    checks.check_shape("req_rows", req_rows, (q.shape[0],))
    checks.check_shape("seq_lens", seq_lens, (q.shape[0],))
    chosen = dispatch.choose(q.device, q.dtype, q.shape[2], q.shape[1] // table.layout.num_kv_heads)
    if chosen != "triton":
        return None
    return _plan(table, req_rows, seq_lens, 0 if retrieval is None else retrieval.num_means)
