"""Decode: bring the dynamic heads of one layer up to date with the new queries of a batch."""

import torch

from hybridkv_kernels import checks, dispatch, gpu
from hybridkv_kernels.chunks import Retrieval
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.host_pages import HostPages
from hybridkv_kernels.retrieve_chunks import cpu, naive

_IMPLEMENTATIONS = {"naive": naive.retrieve_chunks, "cpu": cpu.retrieve_chunks, "triton": gpu.twin("retrieve_chunks")}


def retrieve_chunks(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    host_pages: HostPages,
    counters: torch.Tensor,
    layer_idx: int,
    req_rows: torch.Tensor,
    retrieval: Retrieval,
) -> None:
    """Score the chunks of every dynamic head from its summary vectors, choose the top ones, and fetch what is missing.

    Parameters
    ----------
    q : [B, H * G, D], bf16 | fp16 | fp32. Queries of the new tokens, after RoPE.
    views : chunk buffers and residency map are written in place.
    table : dense requests and static heads are left alone.
    host_pages : the host store, of rows of the same dtype; those that it has rounded are widened by the fetch.
    counters : [2], int64, in place. Chunks chosen by score, and those of them that were resident already.
    layer_idx : layer within the pool, from 0.
    req_rows : [B], integer. Rows of `table`.
    retrieval : how chunks are scored and which are always resident; its mean values, if any, are skipped here.

    Raises
    ------
    ValueError
        A shape, dtype, device or name is not as above, or the batch is empty.

    Notes
    -----
    A head's buffer then holds the forced chunks and the best of the others, and no other; among equal scores the
    earlier chunk wins. With hysteresis the scores of the chunks that the buffer holds already are raised by it, so that
    fewer are fetched. Cost: the summaries once, and T record_bytes a missing chunk of T tokens over the host link.
    Source: HybridKV (arXiv 2604.05887), its chunk-wise retrieval; Quest (arXiv 2406.10774); ArkVale (NeurIPS 2024).
    "mean2_max" and "mean4_max" score finer than they move: the mean of 16 neighbours that have nothing in common
    describes each of them badly. "mean_spread" (ours) expects more of a chunk whose keys differ: max over the group of
    q . mean, without element 0, plus SPREAD_WEIGHT |q| spread, in the memory of "mean_max".
    """
    checks.check_shape("q", q, (None, None, None))
    checks.check_dtype("q", q, checks.FLOATS)
    checks.check_group("q", q, table.layout.num_kv_heads)
    views.check(q, layer_idx)
    host_pages.check(table.layout.page_size, q.shape[2], q.dtype)
    checks.check_shape("counters", counters, (2,))
    checks.check_dtype("counters", counters, (torch.int64,))
    checks.check_shape("req_rows", req_rows, (q.shape[0],))
    retrieval.check(table.layout.page_size)
    views.check_chunks(retrieval.chunk_size)
    if checks.is_debug():
        table.check_rows(req_rows, layer_idx)
    chosen = dispatch.choose(q.device, q.dtype, q.shape[2], q.shape[1] // table.layout.num_kv_heads)
    _IMPLEMENTATIONS[chosen](q, views, table, host_pages, counters, layer_idx, req_rows, retrieval)
