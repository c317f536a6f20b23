"""Readable reference of `retrieve_chunks`: one request at a time, its dynamic heads at once."""

import torch

from hybridkv_kernels.fetch_chunks import fetch_chunks
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.select_chunks import forced_chunks, summary_vectors
from hybridkv_kernels.select_chunks.naive import select_chunks


def retrieve_chunks(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    k_host_pages: torch.Tensor,
    v_host_pages: torch.Tensor,
    counters: torch.Tensor,
    layer_idx: int,
    req_rows: torch.Tensor,
    num_sink_chunks: int,
    num_recent_chunks: int,
    chunk_score: str,
    estimate: bool = False,
) -> None:
    """Arguments as the public function's."""
    for i, row in enumerate(req_rows.tolist()):
        heads = table.is_dynamic[row, layer_idx].nonzero().squeeze(1)
        if len(heads) == 0:
            continue
        num_chunks = int(table.num_chunks[row])
        stored = summary_vectors(chunk_score, estimate=estimate)
        summaries = read_summaries(views, table, row, layer_idx, heads, num_chunks, stored)
        num_pages = table.num_head_pages[row, layer_idx, heads].to(torch.int64)
        selected = select_chunks(
            q[i].view(table.layout.num_kv_heads, -1, q.shape[-1])[heads],
            summaries[:, :, : summary_vectors(chunk_score)],
            num_pages,
            num_sink_chunks,
            num_recent_chunks,
            chunk_score,
        )
        moved = fetch_chunks(
            selected,
            table.buffer_page_ids(row, layer_idx, heads, num_pages),
            num_pages,
            views.chunk_of_head_page,
            views.k_pages,
            views.v_pages,
            table.host_chunk_ids(row, layer_idx, heads, num_chunks),
            k_host_pages,
            v_host_pages,
        )
        by_score = num_pages.sum() - forced_chunks(num_chunks, num_pages, num_sink_chunks, num_recent_chunks).sum()
        counters += torch.stack((by_score, by_score - moved))


def read_summaries(
    views: HeadPageViews,
    table: HeadPageTable,
    row: int,
    layer_idx: int,
    heads: torch.Tensor,
    num_chunks: int,
    vectors: int,
) -> torch.Tensor:
    """[E, C, vectors, D]: chunk summaries of the dynamic `heads` [E] of one layer."""
    ids, half, place = table.summary_places(row, layer_idx, heads, num_chunks * vectors)
    read = torch.where((half == 0)[:, None], views.k_pages[ids, place], views.v_pages[ids, place])
    return read.unflatten(1, (num_chunks, vectors))
