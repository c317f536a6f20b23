"""The plan of `decode_attn` on a GPU: how the rows that a step reads are shared out, for all layers in one launch.

Rows are cut into splits of about equal length, about as many as the device runs at once. The plan reads the lengths on
the device and follows from the table, the rows and the lengths of one step: a step needs it before its first layer
attends, and its layers do not change it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from hybridkv_kernels import gpu
from hybridkv_kernels.head_pages import HeadPageTable

# Splits for each processor that the plan aims at. They are one fewer than its registers and shared memory let run at
# once: this leaves room for the short splits that entries end in, and keeps enough loads in flight.
SPLITS_PER_PROCESSOR = 4
BLOCK_ROWS = 32  # a multiple of the usual page sizes, or a part of them
BLOCK_ENTRIES = 256
FIELDS = 8  # numbers of a line: 32 bytes, which memory hands over together

_FIELDS = tl.constexpr(FIELDS)


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Splits of a step.

    Attributes
    ----------
    splits : [layers, kinds, S, FIELDS], int32. A line for each split: entry (request, KV head) or -1 beyond the last
        one, row of the table, first row and end, kept rows, first page (linear), where the tail begins in
        `req_to_token` less the kept rows, and the number of the entry's splits of both kinds. Kinds are kept rows with
        the tail, and means where chunks are estimated.
    entries : [layers, E, FIELDS], int32. How many splits have ended, which is 0 between launches; first split and
        number of splits of rows, the same of means.
    first_layer : the layer that comes first in both.
    req_rows, seq_lens : of the step, as they were handed over.
    num_means : of the step.
    """

    splits: torch.Tensor
    entries: torch.Tensor
    first_layer: int
    req_rows: torch.Tensor
    seq_lens: torch.Tensor
    num_means: int

    def is_for(self, req_rows: torch.Tensor, seq_lens: torch.Tensor) -> bool:
        """Whether these very tensors were planned for; it says nothing of what they have held since."""
        return self.req_rows is req_rows and self.seq_lens is seq_lens

    def of_layer(self, layer_idx: int, num_entries: int, num_means: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits [kinds, S, FIELDS] and entries [E, FIELDS] of one layer.

        Raises
        ------
        ValueError
            The plan is one of other layers, another number of entries, or other means.
        """
        index = layer_idx - self.first_layer
        expected, got = (num_entries, num_means), (self.entries.shape[1], self.num_means)
        if expected != got or not 0 <= index < len(self.splits):
            raise ValueError(
                f"plan: expected {num_entries} entries, {num_means} means and layer {layer_idx}, got {got[0]} entries, "
                f"{got[1]} means and layers from {self.first_layer} to {self.first_layer + len(self.splits) - 1}"
            )
        return self.splits[index], self.entries[index]


@triton.jit
def _load_rows(
    entry,
    mask,
    req_rows,
    seq_lens,
    num_pages,
    covered,
    num_head_pages,
    layer_idx,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
):
    """Of entries: table row, head in [R, L, H] tables, whether compressed, covered tokens, rows kept and rows read.

    Rows read are those kept and those of the request's tail.
    """
    row = tl.load(req_rows + entry // H, mask=mask, other=0).to(tl.int64)
    is_compressed = mask & (tl.load(num_pages + row, mask=mask, other=0) > 0)
    head = (row * L + layer_idx) * H + entry % H
    kept = tl.load(num_head_pages + head, mask=is_compressed, other=0) * P
    seq_len = tl.load(seq_lens + entry // H, mask=mask, other=0).to(tl.int32)
    behind = tl.load(covered + row, mask=mask, other=0)
    return row, head, is_compressed, behind, kept, kept + tl.maximum(seq_len - behind, 0)


@triton.jit
def _count_means(row, head, is_compressed, num_prompt_pages, is_dynamic, V: tl.constexpr):
    """Means of all chunks of dynamic heads; `_attend_means` sees which of them count."""
    estimates = is_compressed & (tl.load(is_dynamic + head, mask=is_compressed, other=0) != 0)
    return tl.load(num_prompt_pages + row, mask=estimates, other=0) * V


@triton.jit
def _write_splits(
    splits, first, count, blocks, rows, skipped, entry, row, kept, page, tail, num_parts, BLOCK_ROWS: tl.constexpr
):
    """Lines of the splits of some entries: whole blocks, shared out evenly, of the rows behind those skipped."""
    for place in range(tl.max(count, 0)):
        mask = place < count
        line = splits + (first + place) * _FIELDS
        shares = tl.maximum(count, 1)
        begin, end = place * blocks // shares * BLOCK_ROWS, (place + 1) * blocks // shares * BLOCK_ROWS
        tl.store(line, entry, mask=mask)
        tl.store(line + 1, row.to(tl.int32), mask=mask)
        tl.store(line + 2, skipped + begin, mask=mask)
        tl.store(line + 3, skipped + tl.minimum(end, rows), mask=mask)
        tl.store(line + 4, kept, mask=mask)
        tl.store(line + 5, page, mask=mask)
        tl.store(line + 6, tail, mask=mask)
        tl.store(line + 7, num_parts, mask=mask)


@triton.jit
def _write_end(splits, begin, end, BLOCK: tl.constexpr):
    """Lines without a split."""
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(splits + i * _FIELDS, -1, mask=i < end)


@triton.jit(do_not_specialize=["num_entries", "num_splits", "first_layer"])
def _plan(
    splits,
    entries,
    req_rows,
    seq_lens,
    num_pages,
    covered,
    num_prompt_pages,
    first_head_page,
    num_head_pages,
    first_summary_page,
    is_dynamic,
    windows,
    num_entries,
    num_splits,
    first_layer,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """One program a layer: it counts blocks of rows, and then writes the splits and the entries."""
    layer_idx = first_layer + tl.program_id(0)
    most_splits = num_splits + num_entries
    splits += tl.program_id(0).to(tl.int64) * most_splits * (_FIELDS * (2 if V > 0 else 1))
    entries += tl.program_id(0).to(tl.int64) * num_entries * _FIELDS
    window = tl.load(windows + layer_idx)
    row_blocks, mean_blocks = tl.zeros([BLOCK_ENTRIES], tl.int32), tl.zeros([BLOCK_ENTRIES], tl.int32)
    for start in range(0, num_entries, BLOCK_ENTRIES):
        entry = start + tl.arange(0, BLOCK_ENTRIES)
        row, head, is_compressed, _, _, rows = _load_rows(
            entry, entry < num_entries, req_rows, seq_lens, num_pages, covered, num_head_pages, layer_idx, L, H, P
        )
        row_blocks += tl.cdiv(tl.minimum(rows, window), BLOCK_ROWS)
        if V > 0:
            means = _count_means(row, head, is_compressed, num_prompt_pages, is_dynamic, V)
            mean_blocks += tl.cdiv(means, BLOCK_ROWS)
    # At most num_splits splits of a kind are this long, in blocks. Each entry may end in a shorter one, or have an
    # empty one, which writes its output: so all are at most num_splits + E.
    most_rows = tl.maximum(tl.cdiv(tl.sum(row_blocks, 0), num_splits), 1)
    most_means = tl.maximum(tl.cdiv(tl.sum(mean_blocks, 0), num_splits), 1)
    first_rows, first_means = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, num_entries, BLOCK_ENTRIES):
        entry = start + tl.arange(0, BLOCK_ENTRIES)
        mask = entry < num_entries
        row, head, is_compressed, behind, kept, rows = _load_rows(
            entry, mask, req_rows, seq_lens, num_pages, covered, num_head_pages, layer_idx, L, H, P
        )
        counted = tl.minimum(rows, window)
        blocks = tl.cdiv(counted, BLOCK_ROWS)
        count = tl.where(mask, tl.maximum(tl.cdiv(blocks, most_rows), 1), 0)
        first = first_rows + tl.cumsum(count, 0) - count
        first_rows += tl.sum(count, 0)
        num_parts = count
        if V > 0:
            means = _count_means(row, head, is_compressed, num_prompt_pages, is_dynamic, V)
            mean_blocks = tl.cdiv(means, BLOCK_ROWS)
            mean_count = tl.cdiv(mean_blocks, most_means)
            mean_first = first_means + tl.cumsum(mean_count, 0) - mean_count
            first_means += tl.sum(mean_count, 0)
            num_parts += mean_count
            page = tl.load(first_summary_page + head, mask=mean_count > 0, other=0)
            mean_splits = splits + most_splits * _FIELDS
            _write_splits(
                mean_splits,
                mean_first,
                mean_count,
                mean_blocks,
                means,
                0,
                entry,
                row,
                0,
                page,
                0,
                num_parts,
                BLOCK_ROWS,
            )
            tl.store(entries + entry * _FIELDS + 3, mean_first, mask=mask)
            tl.store(entries + entry * _FIELDS + 4, mean_count, mask=mask)
        page = tl.load(first_head_page + head, mask=is_compressed, other=0)
        _write_splits(
            splits,
            first,
            count,
            blocks,
            counted,
            rows - counted,
            entry,
            row,
            kept,
            page,
            behind - kept,
            num_parts,
            BLOCK_ROWS,
        )
        tl.store(entries + entry * _FIELDS, 0, mask=mask)
        tl.store(entries + entry * _FIELDS + 1, first, mask=mask)
        tl.store(entries + entry * _FIELDS + 2, count, mask=mask)
    _write_end(splits, first_rows, most_splits, BLOCK_ENTRIES)
    if V > 0:
        _write_end(splits + most_splits * _FIELDS, first_means, most_splits, BLOCK_ENTRIES)


def plan_decode(
    table: HeadPageTable,
    req_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    num_means: int = 0,
    layer_idx: int | None = None,
) -> DecodePlan:
    """Plan all layers, or one of them; arguments as those of `decode_attn`. Capturable: no sync, one launch."""
    layout = table.layout
    num_layers, first_layer = (layout.num_layers, 0) if layer_idx is None else (1, layer_idx)
    num_entries = len(req_rows) * layout.num_kv_heads
    num_splits = SPLITS_PER_PROCESSOR * gpu.num_processors(req_rows.device)
    sizes = (num_layers, 2 if num_means else 1, num_splits + num_entries, FIELDS)
    splits = torch.empty(sizes, dtype=torch.int32, device=req_rows.device)
    entries = splits.new_empty(num_layers, num_entries, FIELDS)
    _plan[(num_layers,)](
        splits,
        entries,
        req_rows,
        seq_lens,
        table.num_pages,
        table.covered,
        table.num_prompt_pages,
        table.first_head_page,
        table.num_head_pages,
        table.first_summary_page,
        table.is_dynamic.view(torch.uint8),
        table.windows,
        num_entries,
        num_splits,
        first_layer,
        L=layout.num_layers,
        H=layout.num_kv_heads,
        P=layout.page_size,
        V=num_means,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_ENTRIES=BLOCK_ENTRIES,
    )
    return DecodePlan(splits, entries, first_layer, req_rows, seq_lens, num_means)
