"""Triton twin of `decode_attn`: split-KV over kept head pages and dense tail, over estimated chunks, then one merge.

An entry is one (request, KV head); its G queries share every key and value row that is read. `_plan` cuts the rows of
all entries into splits of about equal length, about as many as the device runs at once, and writes where each entry's
splits begin. It reads the lengths on the device: nothing here syncs, and every grid and buffer has a size that follows
from shapes alone. `_attend` and `_attend_means` find their entry in that list; programs beyond the last split end at
once. `_merge` combines the splits of an entry by their log-sum-exp. Logits and sums are in base 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hybridkv_kernels import gpu
from hybridkv_kernels.gpu.head_pages import dot, head_page_ids, summary_rows
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews

# Splits for each processor that the plan aims at. They are one fewer than its registers and shared memory let run at
# once: this leaves room for the short splits that entries end in, and keeps enough loads in flight.
SPLITS_PER_PROCESSOR = 4
BLOCK_ROWS = 32  # a multiple of the usual page sizes, or a part of them
BLOCK_ENTRIES = 256
BLOCK_SPLITS = 16
MARK_PROGRAMS = 8

_VARYING = (
    "num_entries",
    "num_splits",
    "layer_idx",
    "max_pages",
    "max_context",
    "max_chunks",
    "pages_per_layer",
    "window",
)


@triton.jit(do_not_specialize=_VARYING)
def _plan(
    first_split,
    split_blocks,
    req_rows,
    seq_lens,
    num_pages,
    covered,
    num_prompt_pages,
    num_head_pages,
    is_dynamic,
    num_entries,
    num_splits,
    layer_idx,
    window,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """first_split[e]: splits before entry e, [E + 1]; split_blocks: most blocks that one of them has.

    Program 0 plans the kept rows and the tail, program 1 the means (V a chunk, resident or not), each in its own row.
    """
    is_exact = tl.program_id(0) == 0
    first_split += tl.program_id(0) * (num_entries + 1)
    split_blocks += tl.program_id(0)
    block_sum = tl.zeros([BLOCK_ENTRIES], tl.int32)
    for start in range(0, num_entries, BLOCK_ENTRIES):
        entry = start + tl.arange(0, BLOCK_ENTRIES)
        mask = entry < num_entries
        row = tl.load(req_rows + entry // H, mask=mask, other=0).to(tl.int64)
        _, rows = _exact_rows(entry, row, mask, seq_lens, num_pages, covered, num_head_pages, layer_idx, L, H, P)
        rows = tl.minimum(rows, window)
        if V > 0:
            means = _mean_rows(entry, row, mask, num_pages, num_prompt_pages, is_dynamic, layer_idx, L, H, V)
            rows = tl.where(is_exact, rows, means)
        blocks = tl.cdiv(rows, BLOCK_ROWS)
        # Kept for the second pass, which replaces it.
        tl.store(first_split + entry, blocks, mask=mask)
        block_sum += tl.where(mask, blocks, 0)
    # At most num_splits splits are this long. Each entry may end in a shorter one, so that all are at most
    # num_splits + E.
    most = tl.maximum(tl.cdiv(tl.sum(block_sum), num_splits), 1)
    tl.store(split_blocks, most)
    tl.debug_barrier()
    before = tl.sum(tl.zeros([BLOCK_ENTRIES], tl.int32))
    for start in range(0, num_entries, BLOCK_ENTRIES):
        entry = start + tl.arange(0, BLOCK_ENTRIES)
        mask = entry < num_entries
        splits = tl.cdiv(tl.load(first_split + entry, mask=mask, other=0), most)
        tl.store(first_split + entry, before + tl.cumsum(splits) - splits, mask=mask)
        before += tl.sum(splits)
    tl.store(first_split + num_entries, before)


@triton.jit
def _exact_rows(
    entry,
    row,
    mask,
    seq_lens,
    num_pages,
    covered,
    num_head_pages,
    layer_idx,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
):
    """Rows that entries keep, and the rows that they read: these and their request's tail."""
    is_compressed = tl.load(num_pages + row, mask=mask, other=0) > 0
    head = (row * L + layer_idx) * H + entry % H
    kept = tl.load(num_head_pages + head, mask=mask & is_compressed, other=0) * P
    seq_len = tl.load(seq_lens + entry // H, mask=mask, other=0).to(tl.int32)
    return kept, kept + tl.maximum(seq_len - tl.load(covered + row, mask=mask, other=0), 0)


@triton.jit
def _mean_rows(
    entry,
    row,
    mask,
    num_pages,
    num_prompt_pages,
    is_dynamic,
    layer_idx,
    L: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
):
    """Means of all chunks of dynamic heads; `_attend_means` sees which of them count."""
    is_compressed = tl.load(num_pages + row, mask=mask, other=0) > 0
    head = (row * L + layer_idx) * H + entry % H
    estimates = tl.load(is_dynamic + head, mask=mask & is_compressed, other=0) != 0
    return tl.load(num_prompt_pages + row, mask=mask & estimates, other=0) * V


@triton.jit
def _find_entry(first_split, split, num_entries, BLOCK_ENTRIES: tl.constexpr):
    """Entry of a split, and the split's place in it."""
    begun = tl.sum(tl.zeros([BLOCK_ENTRIES], tl.int32))
    for start in range(0, num_entries, BLOCK_ENTRIES):
        entry = start + tl.arange(0, BLOCK_ENTRIES)
        first = tl.load(first_split + entry, mask=entry < num_entries, other=2147483647)
        begun += tl.sum((first <= split).to(tl.int32))
    entry = begun - 1
    return entry, split - tl.load(first_split + entry)


@triton.jit
def _split_range(place, rows, split_blocks, BLOCK: tl.constexpr):
    """Rows [begin, end) of a split: whole blocks, shared out evenly. No split is empty: blocks are as many or more."""
    blocks = tl.cdiv(rows, BLOCK)
    splits = tl.cdiv(blocks, tl.load(split_blocks))
    begin, end = place * blocks // splits * BLOCK, (place + 1) * blocks // splits * BLOCK
    return begin, tl.minimum(end, rows)


@triton.jit
def _add_rows(q, k, v, is_row, scale, bonus, top, total, acc, INTERPRETED: tl.constexpr):
    """Running softmax over one block of rows: those of k and v that `is_row`; the others are 0."""
    logits = dot(q, tl.trans(k), INTERPRETED) * scale + bonus
    logits = tl.where(is_row[None, :], logits, -float("inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    # Where no row has counted so far, every exponent is -inf minus something finite.
    finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(logits - finite_top[:, None])
    keep = tl.exp2(top - finite_top)
    acc = acc * keep[:, None] + dot(p.to(v.dtype), v, INTERPRETED)
    return new_top, total * keep + tl.sum(p, 1), acc


@triton.jit
def _store_split(partial, partial_lse, split, top, total, acc, g, d, G: tl.constexpr, D: tl.constexpr):
    """A split's output, divided by its sum, and its log-sum-exp. Where no row counts, output and weight are 0."""
    is_empty = total == 0.0
    divisor = tl.where(is_empty, 1.0, total)
    at = split.to(tl.int64) * G
    inside = (g < G)[:, None] & (d < D)[None, :]
    tl.store(partial + at * D + g[:, None] * D + d[None, :], acc / divisor[:, None], mask=inside)
    tl.store(partial_lse + at + g, tl.where(is_empty, -float("inf"), top + tl.log2(divisor)), mask=g < G)


@triton.jit(do_not_specialize=_VARYING)
def _attend(
    partial,
    partial_lse,
    q,
    k_flat,
    v_flat,
    first_split,
    split_blocks,
    pages,
    num_pages,
    covered,
    first_head_page,
    num_head_pages,
    req_rows,
    req_to_token,
    seq_lens,
    scale,
    num_entries,
    layer_idx,
    window,
    max_pages,
    max_context,
    pages_per_layer,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One split of the kept rows and the tail of one entry: of its last `window` rows."""
    split = tl.program_id(0)
    if split >= tl.load(first_split + num_entries):
        return
    entry, place = _find_entry(first_split, split, num_entries, BLOCK_ENTRIES)
    row = tl.load(req_rows + entry // H).to(tl.int64)
    kept, rows = _exact_rows(entry, row, entry >= 0, seq_lens, num_pages, covered, num_head_pages, layer_idx, L, H, P)
    if HAS_WINDOW:  # costs registers
        counted = tl.minimum(rows, window)
        begin, end = _split_range(place, counted, split_blocks, BLOCK_ROWS)
        begin, end = begin + rows - counted, end + rows - counted
    else:
        begin, end = _split_range(place, rows, split_blocks, BLOCK_ROWS)

    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    is_query = (g < G)[:, None] & (d < D)[None, :]
    queries = tl.load(q + entry.to(tl.int64) * (G * D) + g[:, None] * D + d[None, :], mask=is_query, other=0.0)
    top = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)

    request_pages = pages + row * max_pages
    first_linear = tl.load(first_head_page + (row * L + layer_idx) * H + entry % H)
    kept_end = tl.minimum(end, kept)
    for start in range(begin, kept_end, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        is_row = i < kept_end
        ids = head_page_ids(request_pages, first_linear + i // P, is_row, pages_per_layer, L, H)
        places = (ids * P + i % P)[:, None] * D + d[None, :]
        inside = is_row[:, None] & (d < D)[None, :]
        k = tl.load(k_flat + places, mask=inside, other=0.0)
        v = tl.load(v_flat + places, mask=inside, other=0.0)
        top, total, acc = _add_rows(queries, k, v, is_row, scale, 0.0, top, total, acc, INTERPRETED)

    slots = req_to_token + row * max_context + tl.load(covered + row) - kept
    first_slot = layer_idx.to(tl.int64) * pages_per_layer * P
    for start in range(tl.maximum(begin, kept), end, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        is_row = i < end
        slot = tl.load(slots + i, mask=is_row, other=0).to(tl.int64)
        places = ((first_slot + slot) * H + entry % H)[:, None] * D + d[None, :]
        inside = is_row[:, None] & (d < D)[None, :]
        k = tl.load(k_flat + places, mask=inside, other=0.0)
        v = tl.load(v_flat + places, mask=inside, other=0.0)
        top, total, acc = _add_rows(queries, k, v, is_row, scale, 0.0, top, total, acc, INTERPRETED)
    _store_split(partial, partial_lse, split, top, total, acc, g, d, G, D)


@triton.jit(do_not_specialize=_VARYING)
def _mark_resident(
    is_resident,
    held_chunks,
    pages,
    num_pages,
    first_head_page,
    num_head_pages,
    is_dynamic,
    req_rows,
    layer_idx,
    max_pages,
    max_chunks,
    pages_per_layer,
    L: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """is_resident[e, chunk] = 1 for the chunks in a dynamic head's buffer; the rest stays 0."""
    entry = tl.program_id(0)
    row = tl.load(req_rows + entry // H).to(tl.int64)
    head = (row * L + layer_idx) * H + entry % H
    if tl.load(num_pages + row) == 0:
        return
    if tl.load(is_dynamic + head) == 0:
        return
    first, count = tl.load(first_head_page + head), tl.load(num_head_pages + head)
    for start in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        ids = head_page_ids(pages + row * max_pages, first + place, place < count, pages_per_layer, L, H)
        chunk = tl.load(held_chunks + ids, mask=place < count, other=-1)
        is_chunk = (chunk >= 0) & (chunk < max_chunks)
        tl.store(is_resident + entry.to(tl.int64) * max_chunks + chunk, 1, mask=is_chunk)


@triton.jit(do_not_specialize=_VARYING)
def _attend_means(
    partial,
    partial_lse,
    q,
    k_flat,
    v_flat,
    is_resident,
    first_split,
    split_blocks,
    pages,
    num_pages,
    num_prompt_pages,
    first_summary_page,
    is_dynamic,
    req_rows,
    scale,
    bonus,
    num_entries,
    layer_idx,
    max_pages,
    max_chunks,
    pages_per_layer,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One split of the means of one dynamic head: those of chunks that its buffer does not hold."""
    split = tl.program_id(0)
    if split >= tl.load(first_split + num_entries):
        return
    entry, place = _find_entry(first_split, split, num_entries, BLOCK_ENTRIES)
    row = tl.load(req_rows + entry // H).to(tl.int64)
    rows = _mean_rows(entry, row, entry >= 0, num_pages, num_prompt_pages, is_dynamic, layer_idx, L, H, V)
    begin, end = _split_range(place, rows, split_blocks, BLOCK_ROWS)

    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    is_query = (g < G)[:, None] & (d < D)[None, :]
    queries = tl.load(q + entry.to(tl.int64) * (G * D) + g[:, None] * D + d[None, :], mask=is_query, other=0.0)
    top = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)

    request_pages = pages + row * max_pages
    first_page = tl.load(first_summary_page + (row * L + layer_idx) * H + entry % H)
    is_resident += entry.to(tl.int64) * max_chunks
    for start in range(begin, end, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        is_row = tl.load(is_resident + i // V, mask=i < end, other=1) == 0
        inside = is_row[:, None] & (d < D)[None, :]
        vector = i // V * (2 * V) + i % V
        at, is_in_v = summary_rows(request_pages, first_page, vector, is_row, pages_per_layer, L, H, P)
        pool = tl.where(is_in_v, v_flat, k_flat)
        k = tl.load(pool[:, None] + (at[:, None] * D + d[None, :]), mask=inside, other=0.0)
        at, is_in_v = summary_rows(request_pages, first_page, vector + V, is_row, pages_per_layer, L, H, P)
        pool = tl.where(is_in_v, v_flat, k_flat)
        v = tl.load(pool[:, None] + (at[:, None] * D + d[None, :]), mask=inside, other=0.0)
        top, total, acc = _add_rows(queries, k, v, is_row, scale, bonus, top, total, acc, INTERPRETED)
    _store_split(partial, partial_lse, split, top, total, acc, g, d, G, D)


@triton.jit
def _add_splits(
    partial,
    partial_lse,
    first_split,
    entry,
    g,
    d,
    top,
    total,
    acc,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Running softmax over the splits of one query head."""
    end = tl.load(first_split + entry + 1)
    for start in range(tl.load(first_split + entry), end, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        at = split.to(tl.int64) * G + g
        lse = tl.load(partial_lse + at, mask=split < end, other=-float("inf"))
        inside = (split < end)[:, None] & (d < D)[None, :]
        rows = tl.load(partial + at[:, None] * D + d[None, :], mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(lse))
        finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight, keep = tl.exp2(lse - finite_top), tl.exp2(top - finite_top)
        total = total * keep + tl.sum(weight)
        acc = acc * keep + tl.sum(rows * weight[:, None], 0)
        top = new_top
    return top, total, acc


@triton.jit
def _merge(
    out,
    partial,
    partial_lse,
    partial_means,
    partial_means_lse,
    first_split,
    first_means,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Output of one query head: its entry's splits, weighted by their sums of exponentials; 0 where there are none."""
    entry, g = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    top = tl.max(tl.full([BLOCK_SPLITS], -float("inf"), tl.float32))
    total = tl.sum(tl.zeros([BLOCK_SPLITS], tl.float32))
    acc = tl.zeros([BLOCK_D], tl.float32)
    top, total, acc = _add_splits(partial, partial_lse, first_split, entry, g, d, top, total, acc, G, D, BLOCK_SPLITS)
    if V > 0:
        top, total, acc = _add_splits(
            partial_means, partial_means_lse, first_means, entry, g, d, top, total, acc, G, D, BLOCK_SPLITS
        )
    merged = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (entry.to(tl.int64) * G + g) * D + d, merged.to(out.dtype.element_ty), mask=d < D)


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
    """As the public function; `num_means` mean keys of a chunk, and as many values, estimate it where it is absent.

    Requests of length 0, as CUDA graphs pad with, read nothing; their output is 0. Capturable: no sync, and sizes
    follow from the shapes of the arguments.
    """
    q = q.contiguous()
    out = torch.empty_like(q)
    layout, (batch, num_q_heads, head_dim) = table.layout, q.shape
    num_entries, group = batch * layout.num_kv_heads, num_q_heads // layout.num_kv_heads
    num_splits = SPLITS_PER_PROCESSOR * gpu.num_processors(q.device)
    kinds = 2 if num_means else 1
    window = layout.window(layer_idx) or 2**31 - 1
    max_chunks = req_to_token.shape[1] // layout.page_size  # chunks are pages where they are estimated
    is_dynamic = table.is_dynamic.view(torch.uint8)
    model = {"L": layout.num_layers, "H": layout.num_kv_heads}
    heads = {"G": group, "D": head_dim}
    block_d = triton.next_power_of_2(head_dim)
    # Five stages load two blocks ahead: page ids come two stages before their rows. Without tensor cores, fp32 takes
    # so many registers and so much time that it gains nothing by loading ahead.
    # Rows of more than 128 elements take the registers of eight warps.
    num_warps, num_stages = (8, 2) if q.dtype == torch.float32 else (4, 5) if block_d <= 128 else (8, 3)
    tiles = {"BLOCK_G": 16, "BLOCK_D": block_d, "BLOCK_ENTRIES": BLOCK_ENTRIES, "INTERPRETED": gpu.is_interpreted()}

    def scratch(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=q.device)

    first_split, split_blocks = scratch(kinds, num_entries + 1, dtype=torch.int32), scratch(kinds, dtype=torch.int32)
    partial = scratch(kinds, num_splits + num_entries, group, head_dim)
    partial_lse = scratch(kinds, num_splits + num_entries, group)
    _plan[(kinds,)](
        first_split,
        split_blocks,
        req_rows,
        seq_lens,
        table.num_pages,
        table.covered,
        table.num_prompt_pages,
        table.num_head_pages,
        is_dynamic,
        num_entries,
        num_splits,
        layer_idx,
        window,
        **model,
        P=layout.page_size,
        V=num_means,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_ENTRIES=BLOCK_ENTRIES,
    )
    _attend[(num_splits + num_entries,)](
        partial,
        partial_lse,
        q,
        views.k_flat,
        views.v_flat,
        first_split,
        split_blocks,
        table.pages,
        table.num_pages,
        table.covered,
        table.first_head_page,
        table.num_head_pages,
        req_rows,
        req_to_token,
        seq_lens,
        scaling * math.log2(math.e),
        num_entries,
        layer_idx,
        window,
        table.pages.shape[1],
        req_to_token.shape[1],
        layout.pages_per_layer,
        **model,
        **heads,
        P=layout.page_size,
        BLOCK_ROWS=BLOCK_ROWS,
        HAS_WINDOW=layout.window(layer_idx) > 0,
        **tiles,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if num_means:
        is_resident = torch.zeros(num_entries, max_chunks, dtype=torch.uint8, device=q.device)
        _mark_resident[(num_entries, MARK_PROGRAMS)](
            is_resident,
            views.held_chunks,
            table.pages,
            table.num_pages,
            table.first_head_page,
            table.num_head_pages,
            is_dynamic,
            req_rows,
            layer_idx,
            table.pages.shape[1],
            max_chunks,
            layout.pages_per_layer,
            **model,
            BLOCK=128,
        )
        _attend_means[(num_splits + num_entries,)](
            partial[1],
            partial_lse[1],
            q,
            views.k_flat,
            views.v_flat,
            is_resident,
            first_split[1],
            split_blocks[1:],
            table.pages,
            table.num_pages,
            table.num_prompt_pages,
            table.first_summary_page,
            is_dynamic,
            req_rows,
            scaling * math.log2(math.e),
            math.log2(layout.page_size / num_means),
            num_entries,
            layer_idx,
            table.pages.shape[1],
            max_chunks,
            layout.pages_per_layer,
            **model,
            **heads,
            P=layout.page_size,
            V=num_means,
            BLOCK_ROWS=BLOCK_ROWS,
            **tiles,
            num_warps=num_warps,
            num_stages=2,
        )
    _merge[(num_entries, group)](
        out,
        partial,
        partial_lse,
        partial[-1],
        partial_lse[-1],
        first_split,
        first_split[-1],
        **heads,
        V=num_means,
        BLOCK_D=block_d,
        BLOCK_SPLITS=BLOCK_SPLITS,
    )
    return out
