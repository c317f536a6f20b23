"""Readable reference of `retrieve_chunks`: one request at a time, its dynamic heads at once."""

import torch

from hybridkv_kernels.fetch_chunks import fetch_chunks
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.select_chunks import KEY_CODES, count_vectors, forced_chunks, summary_vectors
from hybridkv_kernels.select_chunks.naive import as_plain_score, choose_chunks, score_chunks, score_coded_chunks


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
    chunk_size: int,
    estimate: bool = False,
) -> None:
    """Arguments as the public function's."""
    page_size, head_dim = table.layout.page_size, q.shape[-1]
    pages = (views.k_pages, views.v_pages, k_host_pages, v_host_pages)
    k_chunks, v_chunks, k_host_chunks, v_host_chunks = (x.view(-1, chunk_size, head_dim) for x in pages)
    for i, row in enumerate(req_rows.tolist()):
        heads = table.is_dynamic[row, layer_idx].nonzero().squeeze(1)
        if len(heads) == 0:
            continue
        num_pages = int(table.num_chunks[row])
        queries = q[i].view(table.layout.num_kv_heads, -1, head_dim)[heads]
        scores = score_row(queries, views, table, row, layer_idx, heads, chunk_score, chunk_size, estimate)
        counts = table.num_head_pages[row, layer_idx, heads].to(torch.int64)
        num_selected = counts * (page_size // chunk_size)
        selected = choose_chunks(scores, num_selected, num_sink_chunks, num_recent_chunks)
        moved = fetch_chunks(
            selected,
            chunk_places(table.buffer_page_ids(row, layer_idx, heads, counts), page_size // chunk_size),
            num_selected,
            views.held_chunks.view(-1),
            k_chunks,
            v_chunks,
            chunk_places(table.host_chunk_ids(row, layer_idx, heads, num_pages), page_size // chunk_size),
            k_host_chunks,
            v_host_chunks,
        )
        forced = forced_chunks(selected.shape[1], num_selected, num_sink_chunks, num_recent_chunks)
        by_score = num_selected.sum() - forced.sum()
        counters += torch.stack((by_score, by_score - moved))


def chunk_places(page_ids: torch.Tensor, chunks_per_page: int) -> torch.Tensor:
    """[E, S * chunks_per_page]: the same memory counted in chunks, for pages [E, S]."""
    inside = torch.arange(chunks_per_page, device=page_ids.device)
    return (page_ids.unsqueeze(2) * chunks_per_page + inside).flatten(1)


def score_row(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    row: int,
    layer_idx: int,
    heads: torch.Tensor,
    chunk_score: str,
    chunk_size: int,
    estimate: bool,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[E, C], dtype: how much the query groups q [E, G, D] of the dynamic `heads` [E] want each chunk of a request."""
    num_tokens = int(table.num_chunks[row]) * table.layout.page_size
    stored = count_vectors(chunk_score, num_tokens, chunk_size, estimate=estimate)
    vectors = read_vectors(views, table, row, layer_idx, heads, stored)
    if chunk_score == KEY_CODES:
        return score_coded_chunks(q, vectors, chunk_size, dtype)
    summaries = vectors.unflatten(1, (num_tokens // chunk_size, -1))[:, :, : summary_vectors(chunk_score)]
    q, chunk_score = as_plain_score(q, chunk_score)
    return score_chunks(q.to(dtype), summaries.to(dtype), chunk_score)


def read_vectors(
    views: HeadPageViews, table: HeadPageTable, row: int, layer_idx: int, heads: torch.Tensor, count: int
) -> torch.Tensor:
    """[E, count, D]: the first summary vectors of the dynamic `heads` [E] of one layer."""
    ids, half, place = table.summary_places(row, layer_idx, heads, count)
    return torch.where((half == 0)[:, None], views.k_pages[ids, place], views.v_pages[ids, place])
