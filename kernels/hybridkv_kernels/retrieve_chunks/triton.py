"""Triton twin of `retrieve_chunks`: three launches a layer whose grids depend on shapes only.

1. Score: programs of an entry (request, KV head) share its chunks, and write the ordered image of each score. The first
   one also notes at each resident chunk which buffer place holds it. Those notes are never cleared: a note counts only
   where the place named there says that it holds the chunk, so what an earlier owner of the memory left does no harm.
2. Choose: one program an entry finds the threshold, and lists the missing chunks in order and the pages to reuse in
   theirs, which is the pairing of `naive`.
3. Fetch: programs of an entry share these lists and read the host rows through their pinned address (zero copy).
"""

import torch
import triton
import triton.language as tl

from hybridkv_kernels.gpu.head_pages import head_page_ids, host_page_ids, summary_rows
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.select_chunks import summary_vectors
from hybridkv_kernels.select_chunks.naive import as_plain_score
from hybridkv_kernels.select_chunks.triton import (
    chosen_of_tile,
    chunk_images,
    forced_counts,
    group_score,
    load_group,
    load_images,
    per_query_scores,
    score_constants,
    select_block,
    top_threshold,
)

_COPY_BLOCK = 2048
_VARYING = ("layer_idx", "pages_per_layer", "max_pages", "max_chunks", "num_sinks", "num_recent")
_TARGET_PROGRAMS = 1024  # of a launch: they fill a large GPU, and those with nothing to do cost little


@triton.jit
def _entry(req_rows, is_dynamic, layer_idx, L: tl.constexpr, H: tl.constexpr):
    """Row of the program's request, index of its head in [R, L, H] tables, and whether it is a dynamic head."""
    entry = tl.program_id(0)
    row = tl.load(req_rows + entry // H).to(tl.int64)
    head = (row * L + layer_idx) * H + entry % H
    return row, head, tl.load(is_dynamic + head) != 0


@triton.jit
def _load_summaries(
    k_flat,
    v_flat,
    pages,
    first,
    vector,
    mask,
    pages_per_layer,
    D: tl.constexpr,
    BD: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
):
    """[BC, BD]: summary vectors `vector` [BC] of an entry, zero where not `mask`."""
    row, in_values = summary_rows(pages, first, vector, mask, pages_per_layer, L, H, P)
    start, d = tl.where(in_values, v_flat + row * D, k_flat + row * D), tl.arange(0, BD)
    return tl.load(start[:, None] + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=_VARYING)
def _score_kernel(
    queries,
    k_flat,
    v_flat,
    chunk_of_head_page,
    all_pages,
    all_num_chunks,
    first_head_page,
    num_head_pages,
    first_summary_page,
    is_dynamic,
    req_rows,
    image_rows,
    notes,
    layer_idx,
    pages_per_layer,
    max_pages,
    max_chunks,
    num_sinks,
    num_recent,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    VECTORS: tl.constexpr,
    STORED: tl.constexpr,
    SCORE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row, head, is_mine = _entry(req_rows, is_dynamic, layer_idx, L, H)
    if not is_mine:
        return
    num_chunks, num_selected = tl.load(all_num_chunks + row), tl.load(num_head_pages + head)
    pages = all_pages + row * max_pages
    if tl.program_id(1) == 0:
        first = tl.load(first_head_page + head).to(tl.int64)
        for start in range(0, num_selected, BC):
            place = start + tl.arange(0, BC)
            page = head_page_ids(pages, first + place, place < num_selected, pages_per_layer, L, H)
            held = tl.load(chunk_of_head_page + page, mask=place < num_selected, other=0)
            tl.store(notes + entry * max_chunks + held, place, mask=place < num_selected)
    q = load_group(queries, entry * G, D, G, BG, BD)
    first = tl.load(first_summary_page + head).to(tl.int64)
    step: tl.constexpr = 2 if SCORE == "quest" or SCORE == "arkvale" else 1
    for tile in range(tl.program_id(1), tl.cdiv(num_chunks, BC), tl.num_programs(1)):
        chunk = tile * BC + tl.arange(0, BC)
        inside = chunk < num_chunks
        best = tl.full([BG, BC], -float("inf"), tl.float32)
        for i in tl.static_range(0, VECTORS, step):
            vector = chunk * STORED + i
            low = _load_summaries(k_flat, v_flat, pages, first, vector, inside, pages_per_layer, D, BD, P, L, H)
            high = low
            if step == 2:
                high = _load_summaries(
                    k_flat, v_flat, pages, first, vector + 1, inside, pages_per_layer, D, BD, P, L, H
                )
            best = tl.maximum(best, per_query_scores(q, low, high, SCORE, INTERPRETED))
        score = group_score(best, G, BG, SCORE)
        image = chunk_images(score, chunk, num_chunks, num_selected, num_sinks, num_recent)
        tl.store(image_rows + entry * max_chunks + chunk, image.to(tl.int32, bitcast=True), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def _choose_kernel(
    chunk_of_head_page,
    all_pages,
    all_num_chunks,
    first_head_page,
    num_head_pages,
    is_dynamic,
    req_rows,
    image_rows,
    notes,
    missing,
    reused,
    all_num_moved,
    counters,
    layer_idx,
    pages_per_layer,
    max_pages,
    max_chunks,
    num_sinks,
    num_recent,
    L: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row, head, is_mine = _entry(req_rows, is_dynamic, layer_idx, L, H)
    if not is_mine:
        tl.store(all_num_moved + entry, 0)
        return
    num_chunks, num_selected = tl.load(all_num_chunks + row), tl.load(num_head_pages + head)
    first, pages = tl.load(first_head_page + head).to(tl.int64), all_pages + row * max_pages
    images, lists = image_rows + entry * max_chunks, entry * max_chunks
    threshold, wanted = top_threshold(images, num_chunks, num_selected, BLOCK, 32)
    num_ties, last_tie = tl.full([], 0, tl.int32), tl.full([], -1, tl.int32)
    num_missing, num_reused = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, num_chunks, BLOCK):
        image, chunk, inside = load_images(images, start, num_chunks, BLOCK, 32)
        chosen, is_tie = chosen_of_tile(image, inside, threshold, wanted, num_ties)
        num_ties += tl.sum(is_tie.to(tl.int32), 0)
        last_tie = tl.maximum(last_tie, tl.max(tl.where(chosen & is_tie, chunk, -1), 0))
        place = tl.load(notes + lists + chunk, mask=chosen, other=-1)
        is_note = chosen & (place >= 0) & (place < num_selected)
        page = head_page_ids(pages, first + place, is_note, pages_per_layer, L, H)
        is_missing = chosen & (tl.load(chunk_of_head_page + page, mask=is_note, other=-1) != chunk)
        rank = num_missing + tl.cumsum(is_missing.to(tl.int32), 0) - 1
        tl.store(missing + lists + rank, chunk, mask=is_missing)
        num_missing += tl.sum(is_missing.to(tl.int32), 0)
    for start in range(0, num_selected, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < num_selected
        page = head_page_ids(pages, first + place, inside, pages_per_layer, L, H)
        held = tl.load(chunk_of_head_page + page, mask=inside, other=0)
        image = tl.load(images + held, mask=inside, other=0).to(tl.uint32, bitcast=True)
        is_reused = inside & ((image < threshold) | ((image == threshold) & (held > last_tie)))
        rank = num_reused + tl.cumsum(is_reused.to(tl.int32), 0) - 1
        tl.store(reused + lists + rank, page.to(tl.int32), mask=is_reused)
        num_reused += tl.sum(is_reused.to(tl.int32), 0)
    tl.store(all_num_moved + entry, tl.minimum(num_missing, num_reused))
    sinks, recent = forced_counts(num_selected, num_sinks, num_recent)
    by_score = num_selected - sinks - recent
    tl.atomic_add(counters, by_score.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 1, (by_score - num_missing).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["layer_idx", "max_chunks"])
def _fetch_kernel(
    k_flat,
    v_flat,
    k_host,
    v_host,
    chunk_of_head_page,
    all_host_pages,
    host_rank,
    all_num_chunks,
    req_rows,
    missing,
    reused,
    all_num_moved,
    layer_idx,
    max_chunks,
    L: tl.constexpr,
    H: tl.constexpr,
    PAGE_ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    num_moved = tl.load(all_num_moved + entry)
    if num_moved == 0:
        return
    row = tl.load(req_rows + entry // H).to(tl.int64)
    first = tl.load(host_rank + (row * L + layer_idx) * H + entry % H).to(tl.int64) * tl.load(all_num_chunks + row)
    for i in range(tl.program_id(1), num_moved, tl.num_programs(1)):
        chunk, page = tl.load(missing + entry * max_chunks + i), tl.load(reused + entry * max_chunks + i).to(tl.int64)
        src = host_page_ids(all_host_pages + row * max_chunks, first + chunk, True, L, H) * PAGE_ELEMENTS
        dst = page * PAGE_ELEMENTS
        for start in tl.static_range(0, PAGE_ELEMENTS, BLOCK):
            element = start + tl.arange(0, BLOCK)
            inside = element < PAGE_ELEMENTS
            k = tl.load(k_host + src + element, mask=inside)
            v = tl.load(v_host + src + element, mask=inside)
            tl.store(k_flat + dst + element, k, mask=inside)
            tl.store(v_flat + dst + element, v, mask=inside)
        tl.store(chunk_of_head_page + page, chunk)


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
    estimate: bool = False,
) -> None:
    """Arguments as the public function's; on a CUDA device the host store is pinned.

    CUDA graph: capturable, no sync. Scratch: 16 bytes for each of B * H * max_chunks, where max_chunks is the number of
    host pages that a row of the table can name; a prompt has no more chunks than that.
    """
    layout, batch, max_chunks = table.layout, q.shape[0], table.host_pages.shape[1]
    if max_chunks == 0:
        return
    q, chunk_score = as_plain_score(q, chunk_score)
    num_entries, head_dim = batch * layout.num_kv_heads, q.shape[2]
    shape = {"L": layout.num_layers, "H": layout.num_kv_heads}
    constants = score_constants(q.dtype, head_dim, q.shape[1] // layout.num_kv_heads)
    scratch = torch.empty(4, num_entries, max_chunks, dtype=torch.int32, device=q.device)
    images, notes, missing, reused = scratch.unbind()
    num_moved = torch.empty(num_entries, dtype=torch.int32, device=q.device)
    is_dynamic = table.is_dynamic.view(torch.uint8)
    shared = max(1, _TARGET_PROGRAMS // num_entries)
    _score_kernel[(num_entries, min(shared, triton.cdiv(max_chunks, constants["BC"])))](
        q.contiguous(),
        views.k_flat,
        views.v_flat,
        views.chunk_of_head_page,
        table.pages,
        table.num_chunks,
        table.first_head_page,
        table.num_head_pages,
        table.first_summary_page,
        is_dynamic,
        req_rows,
        images,
        notes,
        layer_idx,
        layout.pages_per_layer,
        table.pages.shape[1],
        max_chunks,
        num_sink_chunks,
        num_recent_chunks,
        **shape,
        P=layout.page_size,
        **constants,
        VECTORS=summary_vectors(chunk_score),
        STORED=summary_vectors(chunk_score, estimate=estimate),
        SCORE=chunk_score,
        num_stages=2,
    )
    _choose_kernel[(num_entries,)](
        views.chunk_of_head_page,
        table.pages,
        table.num_chunks,
        table.first_head_page,
        table.num_head_pages,
        is_dynamic,
        req_rows,
        images,
        notes,
        missing,
        reused,
        num_moved,
        counters,
        layer_idx,
        layout.pages_per_layer,
        table.pages.shape[1],
        max_chunks,
        num_sink_chunks,
        num_recent_chunks,
        **shape,
        BLOCK=select_block(max_chunks),
        num_warps=8,
    )
    page_elements = layout.page_size * head_dim
    _fetch_kernel[(num_entries, min(shared, max_chunks))](
        views.k_flat,
        views.v_flat,
        k_host_pages,
        v_host_pages,
        views.chunk_of_head_page,
        table.host_pages,
        table.host_rank,
        table.num_chunks,
        req_rows,
        missing,
        reused,
        num_moved,
        layer_idx,
        max_chunks,
        **shape,
        PAGE_ELEMENTS=page_elements,
        BLOCK=min(_COPY_BLOCK, triton.next_power_of_2(page_elements)),
    )
