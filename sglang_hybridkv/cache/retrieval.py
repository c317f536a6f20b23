"""Decode: what the settings mean for the retrieval of chunks."""

from __future__ import annotations

import torch

from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.retrieve_chunks import retrieve_chunks
from sglang_hybridkv.cache.host_store import HostStore
from sglang_hybridkv.config import RetrievalConfig


def forced_chunk_counts(config: RetrievalConfig) -> tuple[int, int]:
    """Chunks of sinks and chunks of the recent window that are always resident."""
    chunk_size = config.tokens_per_chunk
    return -(-config.num_sink_tokens // chunk_size), -(-config.recent_window // chunk_size)


def retrieve(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    store: HostStore,
    counters: torch.Tensor,
    layer_idx: int,
    req_rows: torch.Tensor,
    config: RetrievalConfig,
) -> None:
    """`retrieve_chunks` from `store` as `config` has it; the other arguments, errors and cost are the kernel's."""
    num_sink_chunks, num_recent_chunks = forced_chunk_counts(config)
    retrieve_chunks(
        q,
        views,
        table,
        store.k_pages,
        store.v_pages,
        counters,
        layer_idx,
        req_rows,
        num_sink_chunks=num_sink_chunks,
        num_recent_chunks=num_recent_chunks,
        chunk_score=config.chunk_score,
        chunk_size=config.tokens_per_chunk,
        estimate=config.estimates,
    )
