"""C++ twin of `retrieve_chunks`: all dynamic heads of all requests of a layer in one call."""

from __future__ import annotations

import ctypes

import torch

from hybridkv_kernels import cpu
from hybridkv_kernels.chunks import CHUNK_SCORES, Retrieval
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.host_pages import HOST_DTYPES, HostPages
from hybridkv_kernels.retrieve_chunks.naive import as_plain_score

_POINTERS = (
    "q k_flat v_flat host_segments held_chunks counters pages host_pages num_pages num_prompt_pages first_head_page "
    "num_head_pages first_summary_page host_rank is_dynamic req_rows"
)
_SIZES = (
    "batch num_q_heads num_kv_heads num_layers pages_per_layer page_size layer_idx head_dim type num_threads "
    "chunk_score chunk_size score_vectors stored_vectors num_sink_chunks num_recent_chunks record_bytes host_dtype"
)


class RetrieveArgs(ctypes.Structure):
    """Mirror of RetrieveArgs in cpu/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in ("max_pages", "max_host_pages", "segment_pages")),
        *((name, ctypes.c_int32) for name in _SIZES.split()),
        ("hysteresis", ctypes.c_float),
    ]


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
    """Arguments as the public function's."""
    q, chunk_score = as_plain_score(q, retrieval.chunk_score)
    q, req_rows = q.contiguous(), req_rows.to(torch.int64)
    layout = table.layout
    arguments = RetrieveArgs(
        *(
            tensor.data_ptr()
            for tensor in (
                q,
                views.k_flat,
                views.v_flat,
                host_pages.addresses,
                views.held_chunks,
                counters,
                table.pages,
                table.host_pages,
                table.num_pages,
                table.num_prompt_pages,
                table.first_head_page,
                table.num_head_pages,
                table.first_summary_page,
                table.host_rank,
                table.is_dynamic,
                req_rows,
            )
        ),
        table.pages.shape[1],
        table.host_pages.shape[1],
        host_pages.segment_pages,
        q.shape[0],
        q.shape[1],
        layout.num_kv_heads,
        layout.num_layers,
        layout.pages_per_layer,
        layout.page_size,
        layer_idx,
        q.shape[2],
        cpu.ELEMENT_TYPES[q.dtype],
        torch.get_num_threads(),
        CHUNK_SCORES.index(chunk_score),
        retrieval.chunk_size,
        retrieval.score_vectors,
        retrieval.stored_vectors,
        retrieval.num_sink_chunks,
        retrieval.num_recent_chunks,
        host_pages.record_bytes,
        HOST_DTYPES.index(host_pages.host_dtype),
        retrieval.hysteresis,
    )
    cpu.call("hk_retrieve", arguments)
