"""C++ twin of `decode_attn`: one pass over pages, tail and estimated chunks, split over threads."""

from __future__ import annotations

import ctypes

import torch

from hybridkv_kernels import cpu
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews

SPLIT_ROWS = 1024  # rows of one unit of work: long enough to amortise the merge, short enough to share out

_POINTERS = (
    "q out k_flat v_flat pages num_pages covered first_head_page num_head_pages num_prompt_pages first_summary_page "
    "is_dynamic held_chunks req_to_token req_rows seq_lens"
)
_SIZES = (
    "batch num_q_heads num_kv_heads num_layers pages_per_layer page_size layer_idx head_dim type num_threads num_means "
    "window"
)


class DecodeArgs(ctypes.Structure):
    """Mirror of DecodeArgs in cpu/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in ("max_pages", "max_context", "split_rows")),
        *((name, ctypes.c_int32) for name in _SIZES.split()),
        ("scaling", ctypes.c_float),
    ]


def decode_attn(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    layer_idx: int,
    req_rows: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    scaling: float,
    num_means: int = 0,
) -> torch.Tensor:
    """As the public function; `num_means` mean keys of a chunk, and as many values, estimate it where it is absent."""
    q = q.contiguous()
    out = torch.empty_like(q)
    req_rows, seq_lens = req_rows.to(torch.int64), seq_lens.to(torch.int64)
    layout = table.layout
    arguments = DecodeArgs(
        *(
            tensor.data_ptr()
            for tensor in (
                q,
                out,
                views.k_flat,
                views.v_flat,
                table.pages,
                table.num_pages,
                table.covered,
                table.first_head_page,
                table.num_head_pages,
                table.num_prompt_pages,
                table.first_summary_page,
                table.is_dynamic,
                views.held_chunks,
                req_to_token,
                req_rows,
                seq_lens,
            )
        ),
        table.pages.shape[1],
        req_to_token.shape[1],
        SPLIT_ROWS,
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
        num_means,
        layout.window(layer_idx),
        scaling,
    )
    cpu.call("hk_decode", arguments)
    return out
