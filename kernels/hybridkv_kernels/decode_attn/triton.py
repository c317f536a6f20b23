"""Triton twin of `decode_attn`: split-KV over kept head pages and dense tail, and over estimated chunks.

An entry is one (request, KV head); its G queries share every key and value row that is read. `triton_plan` has cut the
rows of all entries into splits, for all layers of a step in one launch: a program of `_attend` or `_attend_means` reads
all that it needs of its split from one line of that plan. Nothing here syncs, and every grid and buffer has a size that
follows from shapes alone; programs beyond the last split end at once.

The program that ends last among those of an entry combines its splits by their log-sum-exp, in their order: so it does
not matter which program that is. Each one adds itself to the entry's counter after it has written its own part; the
addition releases and acquires, so that the last one sees all parts, and it sets the counter back. Logits and sums are
in base 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hybridkv_kernels import gpu
from hybridkv_kernels.decode_attn.triton_plan import BLOCK_ROWS, FIELDS, DecodePlan, plan_decode
from hybridkv_kernels.gpu.head_pages import dot, head_page_ids, summary_rows
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews

BLOCK_SPLITS = 16
MARK_PROGRAMS = 8

_VARYING = ("layer_idx", "max_pages", "max_context", "max_chunks", "pages_per_layer")
_FIELDS = tl.constexpr(FIELDS)


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
def _add_sums(partial_lse, first, count, g, top, total, G: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """Running maximum and sum [BLOCK_G] of the weights of an entry's splits."""
    for start in range(0, count, BLOCK_SPLITS):
        i = start + tl.arange(0, BLOCK_SPLITS)
        at = (first + i).to(tl.int64)[:, None] * G + g[None, :]
        inside = (i < count)[:, None] & (g < G)[None, :]
        lse = tl.load(partial_lse + at, mask=inside, other=-float("inf"), cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(lse, 0))
        finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2(top - finite_top) + tl.sum(tl.exp2(lse - finite_top[None, :]), 0)
        top = new_top
    return top, total


@triton.jit
def _add_splits(partial, partial_lse, first, count, g, d, top, acc, G: tl.constexpr, D: tl.constexpr):
    """Sum of an entry's splits, weighted by their shares of 2 ** top."""
    inside = (g < G)[:, None] & (d < D)[None, :]
    for i in tl.range(0, count, loop_unroll_factor=4):  # so that the rows of four splits are under way
        at = (first + i).to(tl.int64) * G
        lse = tl.load(partial_lse + at + g, mask=g < G, other=-float("inf"), cache_modifier=".cg")
        rows = tl.load(partial + at * D + g[:, None] * D + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        acc += rows * tl.exp2(lse - top)[:, None]
    return acc


@triton.jit
def _finish(
    out,
    partial,
    partial_lse,
    entries,
    kind_stride,
    at,
    entry,
    num_parts,
    top,
    total,
    acc,
    g,
    d,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Write the part of one split, and the output of its entry after the last part; 0 where no row counts.

    `at` is the part's place; those of means lie kind_stride after those of rows.
    """
    is_empty = total == 0.0
    divisor = tl.where(is_empty, 1.0, total)
    inside = (g < G)[:, None] & (d < D)[None, :]
    to = out + entry.to(tl.int64) * (G * D) + g[:, None] * D + d[None, :]
    acc = acc / divisor[:, None]
    if num_parts == 1:
        tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
    else:
        base = at.to(tl.int64) * G
        tl.store(partial + base * D + g[:, None] * D + d[None, :], acc, mask=inside)
        tl.store(partial_lse + base + g, tl.where(is_empty, -float("inf"), top + tl.log2(divisor)), mask=g < G)
        tl.debug_barrier()  # all threads of the program have written
        mine = entries + entry * _FIELDS
        if tl.atomic_add(mine, 1, sem="acq_rel") == num_parts - 1:
            first, count = tl.load(mine + 1), tl.load(mine + 2)
            top = tl.full([g.shape[0]], -float("inf"), tl.float32)
            top, total = _add_sums(partial_lse, first, count, g, top, tl.zeros_like(top), G, BLOCK_SPLITS)
            if V > 0:
                first_means, num_means = kind_stride + tl.load(mine + 3), tl.load(mine + 4)
                top, total = _add_sums(partial_lse, first_means, num_means, g, top, total, G, BLOCK_SPLITS)
            finite_top = tl.where(top == -float("inf"), 0.0, top)
            merged = tl.zeros([g.shape[0], d.shape[0]], tl.float32)
            merged = _add_splits(partial, partial_lse, first, count, g, d, finite_top, merged, G, D)
            if V > 0:
                merged = _add_splits(partial, partial_lse, first_means, num_means, g, d, finite_top, merged, G, D)
            merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(to, merged.to(out.dtype.element_ty), mask=inside)
            tl.store(mine, 0)


@triton.jit(do_not_specialize=_VARYING)
def _attend(
    out,
    partial,
    partial_lse,
    q,
    k_flat,
    v_flat,
    splits,
    entries,
    pages,
    req_to_token,
    scale,
    layer_idx,
    max_pages,
    max_context,
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
    BLOCK_SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One split of the kept rows and the tail of one entry."""
    line = splits + tl.program_id(0) * _FIELDS
    # All at once, before the program looks at one of them: it waits once. Only the number of parts comes last, as it
    # would take a register from the loops.
    entry, row, begin, end = tl.load(line), tl.load(line + 1).to(tl.int64), tl.load(line + 2), tl.load(line + 3)
    kept, first_page, tail = tl.load(line + 4), tl.load(line + 5), tl.load(line + 6)
    if entry < 0:
        return
    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    is_query = (g < G)[:, None] & (d < D)[None, :]
    queries = tl.load(q + entry.to(tl.int64) * (G * D) + g[:, None] * D + d[None, :], mask=is_query, other=0.0)
    top = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)

    request_pages = pages + row * max_pages
    kept_end = tl.minimum(end, kept)
    for start in range(begin, kept_end, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        is_row = i < kept_end
        ids = head_page_ids(request_pages, first_page + i // P, is_row, pages_per_layer, L, H)
        places = (ids * P + i % P)[:, None] * D + d[None, :]
        inside = is_row[:, None] & (d < D)[None, :]
        k = tl.load(k_flat + places, mask=inside, other=0.0)
        v = tl.load(v_flat + places, mask=inside, other=0.0)
        top, total, acc = _add_rows(queries, k, v, is_row, scale, 0.0, top, total, acc, INTERPRETED)

    slots = req_to_token + row * max_context + tail
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
    most, num_parts = tl.num_programs(0), tl.load(line + 7)
    at = tl.program_id(0)
    _finish(
        out, partial, partial_lse, entries, most, at, entry, num_parts, top, total, acc, g, d, G, D, V, BLOCK_SPLITS
    )


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
    out,
    partial,
    partial_lse,
    q,
    k_flat,
    v_flat,
    is_resident,
    splits,
    entries,
    pages,
    scale,
    bonus,
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
    BLOCK_SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One split of the V means of each chunk of one entry's dynamic head, those of resident chunks left out."""
    line = splits + tl.program_id(0) * _FIELDS
    entry, row, begin, end = tl.load(line), tl.load(line + 1).to(tl.int64), tl.load(line + 2), tl.load(line + 3)
    first_page = tl.load(line + 5)
    if entry < 0:
        return
    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    is_query = (g < G)[:, None] & (d < D)[None, :]
    queries = tl.load(q + entry.to(tl.int64) * (G * D) + g[:, None] * D + d[None, :], mask=is_query, other=0.0)
    top = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)

    request_pages = pages + row * max_pages
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
    most, num_parts = tl.num_programs(0), tl.load(line + 7)
    at = most + tl.program_id(0)
    _finish(
        out, partial, partial_lse, entries, most, at, entry, num_parts, top, total, acc, g, d, G, D, V, BLOCK_SPLITS
    )


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
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    """As the public function; `num_means` mean keys of a chunk, and as many values, estimate it where it is absent.

    Requests of length 0, as CUDA graphs pad with, read nothing; their output is 0. Capturable: no sync, and sizes
    follow from the shapes of the arguments. One launch, four where chunks are estimated, and one more without a plan.
    """
    q = q.contiguous()
    out = torch.empty_like(q)
    layout, (batch, num_q_heads, head_dim) = table.layout, q.shape
    num_entries, group = batch * layout.num_kv_heads, num_q_heads // layout.num_kv_heads
    if plan is None:
        plan = plan_decode(table, req_rows, seq_lens, num_means, layer_idx)
    splits, entries = plan.of_layer(layer_idx, num_entries, num_means)
    most = splits.shape[1]  # splits at most
    max_chunks = req_to_token.shape[1] // layout.page_size  # chunks are pages where they are estimated
    block_d = triton.next_power_of_2(head_dim)
    # Five stages load two blocks ahead: page ids come two stages before their rows. Without tensor cores, fp32 takes
    # so many registers and so much time that it gains nothing by loading ahead.
    # Rows of more than 128 elements take the registers of eight warps.
    num_warps, num_stages = (8, 2) if q.dtype == torch.float32 else (4, 5) if block_d <= 128 else (8, 3)
    constants = {"L": layout.num_layers, "H": layout.num_kv_heads, "G": group, "D": head_dim, "P": layout.page_size}
    constants |= {"V": num_means, "BLOCK_G": 16, "BLOCK_D": block_d, "BLOCK_ROWS": BLOCK_ROWS}
    constants |= {"BLOCK_SPLITS": BLOCK_SPLITS, "INTERPRETED": gpu.is_interpreted(), "num_warps": num_warps}
    partial = torch.empty(len(splits) * most, group, head_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(len(splits) * most, group, dtype=torch.float32, device=q.device)
    _attend[(most,)](
        out,
        partial,
        partial_lse,
        q,
        views.k_flat,
        views.v_flat,
        splits[0],
        entries,
        table.pages,
        req_to_token,
        scaling * math.log2(math.e),
        layer_idx,
        table.pages.shape[1],
        req_to_token.shape[1],
        layout.pages_per_layer,
        **constants,
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
            table.is_dynamic.view(torch.uint8),
            req_rows,
            layer_idx,
            table.pages.shape[1],
            max_chunks,
            layout.pages_per_layer,
            L=layout.num_layers,
            H=layout.num_kv_heads,
            BLOCK=128,
        )
        _attend_means[(most,)](
            out,
            partial,
            partial_lse,
            q,
            views.k_flat,
            views.v_flat,
            is_resident,
            splits[1],
            entries,
            table.pages,
            scaling * math.log2(math.e),
            math.log2(layout.page_size / num_means),
            table.pages.shape[1],
            max_chunks,
            layout.pages_per_layer,
            **constants,
            num_stages=2,
        )
    return out
