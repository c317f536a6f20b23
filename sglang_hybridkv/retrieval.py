"""Decode: choose and fetch the chunks that the current query of a dynamic head needs."""

from __future__ import annotations

import torch

from hybridkv_kernels.fetch_chunks import fetch_chunks
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.select_chunks import forced_chunks, select_chunks
from sglang_hybridkv.compaction import forced_chunk_counts, host_chunk_ids, read_summaries
from sglang_hybridkv.config import CompressorConfig
from sglang_hybridkv.host_store import HostStore


def retrieve_chunks(
    views: HeadPageViews,
    table: HeadPageTable,
    store: HostStore,
    config: CompressorConfig,
    row: int,
    layer_idx: int,
    q: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Bring one request's dynamic heads of one layer up to date with its new query.

    Parameters
    ----------
    views : chunk buffers and residency map are written in place.
    q : [H * G, D]. Query of the new token, after RoPE.
    counters : [2], int64, in place. Chunks chosen by score, and those of them that were resident already.
    """
    heads = table.is_dynamic[row, layer_idx].nonzero().squeeze(1)
    if len(heads) == 0:
        return
    num_chunks = int(table.num_chunks[row])
    num_pages = table.num_head_pages[row, layer_idx, heads].to(torch.int64)
    num_sinks, num_recent = forced_chunk_counts(config)
    selected = select_chunks(
        q.view(table.layout.num_kv_heads, -1, q.shape[-1])[heads],
        read_summaries(views, table, row, layer_idx, heads, num_chunks, config.summary_vectors_per_chunk()),
        num_pages,
        num_sink_chunks=num_sinks,
        num_recent_chunks=num_recent,
        chunk_score=config.chunk_score,
    )
    moved = fetch_chunks(
        selected,
        _buffer_page_ids(table, row, layer_idx, heads, num_pages),
        num_pages,
        views.chunk_of_head_page,
        views.k_pages,
        views.v_pages,
        host_chunk_ids(table, row, layer_idx, heads, num_chunks),
        store.k_pages,
        store.v_pages,
    )
    by_score = num_pages.sum() - forced_chunks(num_chunks, num_pages, num_sinks, num_recent).sum()
    counters += torch.stack((by_score, by_score - moved))


def _buffer_page_ids(
    table: HeadPageTable, row: int, layer_idx: int, heads: torch.Tensor, num_pages: torch.Tensor
) -> torch.Tensor:
    """[E, S], int64; columns beyond a head's number of pages repeat its first."""
    places = torch.arange(int(num_pages.max()), device=heads.device)
    first = table.first_head_page[row, layer_idx, heads].to(torch.int64)[:, None]
    return table.layout.head_page_ids(table.pages[row], torch.where(places < num_pages[:, None], first + places, first))
