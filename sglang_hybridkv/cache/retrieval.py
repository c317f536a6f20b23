"""Decode: what the settings mean for the retrieval of chunks."""

from __future__ import annotations

import torch

from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.retrieve_chunks import retrieve_chunks
from sglang_hybridkv.cache.host_store import HostStore
from sglang_hybridkv.config import RetrievalConfig


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
    pages = (store.k_pages, store.v_pages)
    retrieve_chunks(q, views, table, *pages, counters, layer_idx, req_rows, config.retrieval)
