"""Decode attention over head pages by FlashInfer: each (request, KV head) is a sequence of one KV head.

FlashInfer plans on the host, and a plan knows the length of every sequence. Heads differ in length, but while a
request decodes none of them changes: the rows that a static head keeps are fixed, and chunks of a dynamic head are
swapped into the same pages. So a plan holds from one composition of the batch to the next. The dense tail, which
grows with each step, is not in it: it is FlashInfer's usual decode, and `merge` joins the two.

Importing this module does not import flashinfer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.transfer import pinned, to_device

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
# A plan lists its work items, each some 30 bytes long. There is one for each sequence, or there are a few for each
# multiprocessor if those are more.
_INT_WORKSPACE_BYTES, _INT_WORKSPACE_BYTES_AN_ENTRY = 1 << 16, 64


def obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashInfer cannot decode over this pool, in words; None when it can."""
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer is not installed"
    return shape_obstacle(dtype, head_dim)


def shape_obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashInfer cannot decode for this model, whether the package is installed or not; None when it can."""
    if dtype not in DTYPES:
        return f"FlashInfer decodes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"FlashInfer decodes head sizes {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


class HeadPageEntries(NamedTuple):
    """Page lists of all layers of a batch in FlashInfer's form; entry b * H + h is KV head h of request b.

    Attributes
    ----------
    indptr : [L, B * H + 1], int32, on the CPU. Entry e of layer l has indices [indptr[l, e], indptr[l, e + 1]): the
        layers follow each other in one list, so that row l starts where row l - 1 ends.
    indices : [indptr[-1, -1]], int32, on the table's device. Head pages, rows of `HeadPageViews.k_pages`.
    last_page_len : [L, B * H], int32, on the CPU. P, as every page of a head is full; 0 where it has none.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


def head_page_entries(table: HeadPageTable, req_rows: torch.Tensor, num_head_pages: torch.Tensor) -> HeadPageEntries:
    """Page lists of the kept and buffer pages of a batch, without a host sync.

    Parameters
    ----------
    table : where the pages lie.
    req_rows : [B], integer, on the table's device. Rows of `table`; what a row without pages says is not read.
    num_head_pages : [B, L, H], int32, on the CPU. `table.num_head_pages` as the host knows it; 0 for dense requests.
    """
    layout, device = table.layout, req_rows.device
    counts = num_head_pages.permute(1, 0, 2).reshape(layout.num_layers, -1)  # [B, L, H] -> [L, B * H]
    ends = counts.flatten().cumsum(0)
    indptr = torch.zeros(layout.num_layers, counts.shape[1] + 1, dtype=torch.int32)
    indptr[:, 1:] = ends.view_as(counts)
    indptr[1:, 0] = indptr[:-1, -1]
    total = int(ends[-1])
    counts_there = to_device(counts.flatten(), device)
    places = torch.arange(counts_there.numel(), device=device)
    entry = torch.repeat_interleave(places, counts_there, output_size=total)
    place = torch.arange(total, device=device) - (counts_there.cumsum(0) - counts_there)[entry]
    kv_head, request = entry % layout.num_kv_heads, entry // layout.num_kv_heads % len(req_rows)
    layer_idx, row = entry // counts.shape[1], req_rows.to(torch.int64)[request]
    linear = table.first_head_page[row, layer_idx, kv_head].to(torch.int64) + place
    # `head_page_ids` wants one list of pages, so it gets the page of each index, at the place of that index.
    per_page = layout.head_pages_per_page
    pages = table.pages[row, linear // per_page]
    ids = layout.head_page_ids(pages, torch.arange(total, device=device) * per_page + linear % per_page)
    last_page_len = (counts > 0).to(torch.int32) * layout.page_size
    return HeadPageEntries(indptr, ids.to(torch.int32), last_page_len)


class HeadPageDecode:
    """Wrappers of FlashInfer, one for each layer and batch size, and what they share.

    `plan` changes state, `run` only computes. Each layer has its own plan, since layers differ in how many pages a head
    has. One plan for the longest would launch empty blocks in every layer, and its kernel would have to read other
    lengths than it was planned with.

    Parameters
    ----------
    table, views : the pool's head-page table and views.
    group_size : query heads per KV head.
    workspace : [bytes], uint8, on the pool's device. Scratch, shared with any FlashInfer wrapper of the same stream.
    wrapper_class : FlashInfer's BatchDecodeWithPagedKVCacheWrapper.

    Attributes
    ----------
    num_plans : calls of FlashInfer's plan so far.

    Raises
    ------
    ValueError
        FlashInfer cannot decode this dtype or head size, or the pool has more head pages than an int32 counts.
    """

    def __init__(
        self, table: HeadPageTable, views: HeadPageViews, group_size: int, workspace: torch.Tensor, wrapper_class: Any
    ):
        reason = shape_obstacle(views.k_pages.dtype, views.k_pages.shape[2])
        if reason is not None:
            raise ValueError(f"views.k_pages: {reason}")
        if len(views.k_pages) > torch.iinfo(torch.int32).max:
            raise ValueError(f"views.k_pages: expected at most 2147483647 head pages, got {len(views.k_pages)}")
        self.table, self.views, self.group_size = table, views, group_size
        self.workspace, self._wrapper_class = workspace, wrapper_class
        self.num_plans = 0
        self._wrappers: list[Any] = []
        self._eager: list[Any] | None = None
        self._of_size: dict[int, list[Any]] = {}
        # One composition is planned at a time, so a layer needs one list of pages, whatever the size of the batch.
        num_bytes = _int_workspace_bytes(len(table.num_pages) * table.layout.num_kv_heads)
        self._int_workspaces = [
            torch.empty(num_bytes, dtype=torch.uint8, device=workspace.device) for _ in range(table.layout.num_layers)
        ]

    def init_graphs(self, max_batch_size: int) -> None:
        """Allocate what captured kernels read at fixed places: 4 bytes for each head page, and little else."""
        layout, device = self.table.layout, self.workspace.device
        if max_batch_size > len(self.table.num_pages):
            raise ValueError(f"max_batch_size: expected at most {len(self.table.num_pages)}, got {max_batch_size}")
        num_entries = max_batch_size * layout.num_kv_heads
        self._indices = torch.zeros(len(self.views.k_pages), dtype=torch.int32, device=device)
        self._indptr = torch.zeros(layout.num_layers, num_entries + 1, dtype=torch.int32, device=device)
        self._last_page_len = torch.zeros(layout.num_layers, num_entries, dtype=torch.int32, device=device)

    def plan(self, req_rows: torch.Tensor, num_head_pages: torch.Tensor, *, in_graph: bool) -> None:
        """Plan every layer for a batch; parameters as in `head_page_entries`.

        Notes
        -----
        No host sync. Not capturable: runs before the launch or the replay. `in_graph` selects the wrappers that a graph
        of this batch size has captured, or is about to capture. Wrappers of other sizes lose their plan.
        """
        views, head_dim = self.views, self.views.k_pages.shape[2]
        entries = head_page_entries(self.table, req_rows, num_head_pages)
        indices = entries.indices
        if in_graph:
            indices = self._indices[: len(entries.indices)]
            indices.copy_(entries.indices)
        self._wrappers = self._captured(len(req_rows)) if in_graph else self._uncaptured()
        for wrapper, indptr, last_page_len in zip(self._wrappers, entries.indptr, entries.last_page_len, strict=True):
            wrapper.plan(
                pinned(indptr, self.workspace.device),
                indices,
                pinned(last_page_len, self.workspace.device),
                num_qo_heads=self.group_size,
                num_kv_heads=1,
                head_dim=head_dim,
                page_size=views.layout.page_size,
                q_data_type=views.k_pages.dtype,
                kv_data_type=views.k_pages.dtype,
                sm_scale=1.0,  # `run` has the layer's
            )
            self.num_plans += 1

    def run(self, layer_idx: int, q: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention [B, H * G, D] of `q` over the head pages, and its log-sum-exp [B, H * G], base 2; capturable."""
        pools = (self.views.k_pages.unsqueeze(2), self.views.v_pages.unsqueeze(2))  # [M, P, 1, D]
        grouped = q.view(-1, self.group_size, q.shape[2])  # [B, H * G, D] -> [B * H, G, D]
        out, lse = self._wrappers[layer_idx].run(grouped, pools, q_scale=scaling, return_lse=True)
        return out.view_as(q), lse.view(q.shape[:2])

    def _uncaptured(self) -> list[Any]:
        if self._eager is None:
            self._eager = self._make_wrappers(len(self.table.num_pages), lambda layer_idx: {})
        return self._eager

    def _captured(self, batch_size: int) -> list[Any]:
        num_entries = batch_size * self.table.layout.num_kv_heads

        def buffers(layer_idx: int) -> dict[str, Any]:
            return {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": self._indptr[layer_idx, : num_entries + 1],
                "paged_kv_indices_buffer": self._indices,
                "paged_kv_last_page_len_buffer": self._last_page_len[layer_idx, :num_entries],
            }

        if batch_size not in self._of_size:
            self._of_size[batch_size] = self._make_wrappers(batch_size, buffers)
        return self._of_size[batch_size]

    def _make_wrappers(self, max_batch_size: int, buffers: Callable[[int], dict[str, Any]]) -> list[Any]:
        wrappers = []
        for layer_idx, int_workspace in enumerate(self._int_workspaces):
            wrapper = self._wrapper_class(
                self.workspace, "NHD", use_tensor_cores=True, backend="fa2", **buffers(layer_idx)
            )
            num_bytes = _int_workspace_bytes(max_batch_size * self.table.layout.num_kv_heads)
            wrapper.reset_workspace_buffer(self.workspace, int_workspace[:num_bytes])
            wrappers.append(wrapper)
        return wrappers


def merge(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    group_size: int,
    merge_state: Any,
) -> torch.Tensor:
    """Attention [B, H * G, D] over two sets of rows from that over each; the log-sum-exps [B, H * G] are of base 2.

    FlashInfer's `merge_state` starts a thread block with all heads of a token, too many for some models: here its
    tokens are the (request, KV head) pairs.
    """
    shape = (-1, group_size, out_a.shape[2])  # [B * H, G, D]
    merged, _ = merge_state(out_a.view(shape), lse_a.view(shape[:2]), out_b.view(shape), lse_b.view(shape[:2]))
    return merged.view_as(out_a)


def _int_workspace_bytes(num_entries: int) -> int:
    return _INT_WORKSPACE_BYTES + num_entries * _INT_WORKSPACE_BYTES_AN_ENTRY
