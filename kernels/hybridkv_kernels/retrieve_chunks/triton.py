"""Triton twin of `retrieve_chunks`: three launches a layer whose grids depend on shapes only.

1. Score, in `triton_score`: programs of an entry (request, KV head) share its chunks.
2. Choose: one program an entry raises the scores of resident chunks by the hysteresis, finds the threshold, marks the
   chosen chunks that the buffer holds, lists the slots that hold others, and lists the chosen chunks without a mark:
   both in order, which is the pairing of `naive`.
3. Fetch: programs of an entry share these lists, token by token, and read the records through their pinned address
   (zero copy). A program copies several records at once, each by one load of a warp, so that many are under way.

Buffer places, slots of the pool and slots of the host store are counted in chunks, of which a head page has C.
"""

import torch
import triton
import triton.language as tl

from hybridkv_kernels import gpu
from hybridkv_kernels.chunks import Retrieval
from hybridkv_kernels.gpu.head_pages import head_page_ids, host_page_ids
from hybridkv_kernels.gpu.records import tile_rows, widen_record
from hybridkv_kernels.gpu.top import load_images, top_block, top_threshold
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.host_pages import HostPages
from hybridkv_kernels.retrieve_chunks.naive import as_plain_score
from hybridkv_kernels.retrieve_chunks.triton_score import (
    VARYING,
    forced_counts,
    image_score,
    load_entry,
    score_image,
    score_launch,
)

_TARGET_PROGRAMS = 1024  # programs of 4 warps in a launch: they fill a large GPU, and idle ones cost little
# A host link of 50 GB/s that answers after 2 microseconds is full with 100 kB under way. With rows of 128 elements of
# 16 bits a program asks for 16 records at once, 8 kB or 4 kB rounded, and waits about as long again for the lists and
# the table: 25 programs that find work fill the link, or 50. The 400 records that an entry of 32k tokens fetches in a
# step are 25 such tiles. So 32 programs for each entry of 16 requests with 4 KV heads take one round, and one request
# alone has all its tiles under way at once, 200 kB or 100 kB. A program without work ends after one load.
_FETCH_PROGRAMS = 2048


@triton.jit
def _chunk_slots(pages, first, place, mask, pages_per_layer, L: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """Slots of the pool, int64, at buffer places `place` of an entry whose head pages begin at `first`."""
    return head_page_ids(pages, first + place // C, mask, pages_per_layer, L, H) * C + place % C


@triton.jit
def _last_tie(images, num_chunks, threshold, wanted, BLOCK: tl.constexpr):
    """The last chunk that is chosen although its image only equals the threshold; -1 where there is none."""
    num_ties, last = tl.full([], 0, tl.int32), tl.full([], -1, tl.int32)
    for start in range(0, num_chunks, BLOCK):
        image, chunk, inside = load_images(images, start, num_chunks, BLOCK, 32)
        is_tie = inside & (image == threshold)
        rank = num_ties + tl.cumsum(is_tie.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(is_tie & (rank <= wanted), chunk, -1), 0))
        num_ties += tl.sum(is_tie.to(tl.int32), 0)
    return last


@triton.jit
def _held_chunks(
    held_chunks,
    pages,
    first,
    start,
    num_selected,
    pages_per_layer,
    L: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Slots and chunks of BLOCK buffer places of an entry, and which of the places there are."""
    place = start + tl.arange(0, BLOCK)
    inside = place < num_selected
    slot = _chunk_slots(pages, first, place, inside, pages_per_layer, L, H, C)
    return slot, tl.load(held_chunks + slot, mask=inside, other=0), inside


@triton.jit(do_not_specialize=VARYING)
def _choose_kernel(
    held_chunks,
    all_pages,
    all_num_prompt_pages,
    first_head_page,
    num_head_pages,
    is_dynamic,
    req_rows,
    image_rows,
    mark_rows,
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
    hysteresis,
    L: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_HYSTERESIS: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    row, head, is_mine = load_entry(req_rows, is_dynamic, layer_idx, L, H)
    if not is_mine:
        tl.store(all_num_moved + entry, 0)
        return
    num_chunks, num_selected = tl.load(all_num_prompt_pages + row) * C, tl.load(num_head_pages + head) * C
    first, pages = tl.load(first_head_page + head), all_pages + row * max_pages
    lists = entry * max_chunks
    images, marks = image_rows + lists, mark_rows + lists
    if HAS_HYSTERESIS:
        for start in range(0, num_selected, BLOCK):
            _, held, inside = _held_chunks(
                held_chunks, pages, first, start, num_selected, pages_per_layer, L, H, C, BLOCK
            )
            image = tl.load(images + held, mask=inside, other=0).to(tl.uint32, bitcast=True)
            raised = score_image(image_score(image) + hysteresis).to(tl.int32, bitcast=True)
            tl.store(images + held, raised, mask=inside & (image != 0xFFFFFFFF))  # forced chunks are the largest
        tl.debug_barrier()  # other threads read the images
    threshold, wanted = top_threshold(images, num_chunks, num_selected, BLOCK, 32)
    last_tie = _last_tie(images, num_chunks, threshold, wanted, BLOCK)
    num_missing, num_reused = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, num_selected, BLOCK):
        slot, held, inside = _held_chunks(
            held_chunks, pages, first, start, num_selected, pages_per_layer, L, H, C, BLOCK
        )
        image = tl.load(images + held, mask=inside, other=0).to(tl.uint32, bitcast=True)
        is_chosen = (image > threshold) | ((image == threshold) & (held <= last_tie))
        tl.store(marks + held, 1, mask=inside & is_chosen)
        is_reused = inside & (is_chosen == 0)
        rank = num_reused + tl.cumsum(is_reused.to(tl.int32), 0) - 1
        tl.store(reused + lists + rank, slot.to(tl.int32), mask=is_reused)
        num_reused += tl.sum(is_reused.to(tl.int32), 0)
    tl.debug_barrier()  # other threads read the marks
    for start in range(0, num_chunks, BLOCK):
        image, chunk, inside = load_images(images, start, num_chunks, BLOCK, 32)
        is_chosen = inside & ((image > threshold) | ((image == threshold) & (chunk <= last_tie)))
        is_missing = is_chosen & (tl.load(marks + chunk, mask=is_chosen, other=1) == 0)
        rank = num_missing + tl.cumsum(is_missing.to(tl.int32), 0) - 1
        tl.store(missing + lists + rank, chunk, mask=is_missing)
        num_missing += tl.sum(is_missing.to(tl.int32), 0)
    tl.store(all_num_moved + entry, tl.minimum(num_missing, num_reused))
    sinks, recent = forced_counts(num_selected, num_sinks, num_recent)
    by_score = num_selected - sinks - recent
    tl.atomic_add(counters, by_score.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 1, (by_score - num_missing).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["layer_idx", "max_host_pages"])
def _fetch_kernel(
    k_out,
    v_out,
    host_words,
    held_chunks,
    all_host_pages,
    host_rank,
    all_num_prompt_pages,
    req_rows,
    missing,
    reused,
    all_num_moved,
    layer_idx,
    max_host_pages,
    max_chunks,
    L: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Fetch missing chunks of CHUNK tokens, ROWS tokens at a time, from records of WORDS words of 4 bytes.

    A row of `k_out` and `v_out` has SIZE elements of the pool's type where records are rounded, and else SIZE words.
    """
    entry = tl.program_id(0).to(tl.int64)
    num_rows = tl.load(all_num_moved + entry) * CHUNK
    if num_rows == 0:
        return
    row = tl.load(req_rows + entry // H).to(tl.int64)
    first = tl.load(host_rank + (row * L + layer_idx) * H + entry % H) * tl.load(all_num_prompt_pages + row)
    host_pages, lists = all_host_pages + row * max_host_pages, entry * max_chunks
    w = tl.arange(0, BW)
    for tile in range(tl.program_id(1), tl.cdiv(num_rows, ROWS), tl.num_programs(1)):
        i = tile * ROWS + tl.arange(0, ROWS)
        is_row, token = i < num_rows, i % CHUNK
        chunk = tl.load(missing + lists + i // CHUNK, mask=is_row, other=0)
        slot = tl.load(reused + lists + i // CHUNK, mask=is_row, other=0).to(tl.int64)
        src = (host_page_ids(host_pages, first + chunk // C, is_row, L, H) * C + chunk % C) * CHUNK + token
        inside = is_row[:, None] & (w < WORDS)[None, :]
        words = tl.load(host_words + src[:, None] * WORDS + w[None, :], mask=inside, other=0)
        if IS_ROUNDED:
            both = widen_record(words, SIZE, BW, ROWS, k_out.dtype.element_ty, INTERPRETED)
            column = tl.arange(0, 4 * BW)
        else:
            both, column = words, w
        at = (slot * CHUNK + token)[:, None] * SIZE + column[None, :]
        tl.store(k_out + at, both, mask=is_row[:, None] & (column < SIZE)[None, :])
        is_value = (column >= SIZE) & (column < 2 * SIZE)
        tl.store(v_out + at - SIZE, both, mask=is_row[:, None] & is_value[None, :])
        tl.store(held_chunks + slot, chunk, mask=is_row & (token == 0))


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
    """Arguments as the public function's; on a CUDA device the host store is pinned.

    CUDA graph: capturable, no sync. Scratch: 16 bytes for each of B * H * max_chunks, where max_chunks is the number of
    chunks in the host pages that a row of the table can name; a prompt has no more chunks than that.
    """
    layout, batch, max_host_pages = table.layout, q.shape[0], table.host_pages.shape[1]
    if max_host_pages == 0:
        return
    q, _ = as_plain_score(q, retrieval.chunk_score)
    num_entries = batch * layout.num_kv_heads
    chunks_per_page = layout.page_size // retrieval.chunk_size
    max_chunks = triton.cdiv(max_host_pages * chunks_per_page, 16) * 16  # so that rows begin where a wide load may
    shape = {"L": layout.num_layers, "H": layout.num_kv_heads, "C": chunks_per_page}
    scratch = torch.empty(4, num_entries, max_chunks, dtype=torch.int32, device=q.device)
    images, marks, missing, reused = scratch.unbind()
    num_moved = torch.empty(num_entries, dtype=torch.int32, device=q.device)
    is_dynamic = table.is_dynamic.view(torch.uint8)
    shared = max(1, _TARGET_PROGRAMS // num_entries)
    group = q.shape[1] // layout.num_kv_heads
    score, constants = score_launch(q, group, retrieval)
    programs = min(shared * 4 // constants["num_warps"], triton.cdiv(max_chunks, constants["BC"]))
    score[(num_entries, programs)](
        q.contiguous(),
        views.k_flat,
        views.v_flat,
        table.pages,
        table.num_prompt_pages,
        table.num_head_pages,
        table.first_summary_page,
        is_dynamic,
        req_rows,
        images,
        marks,
        layer_idx,
        layout.pages_per_layer,
        table.pages.shape[1],
        max_chunks,
        retrieval.num_sink_chunks,
        retrieval.num_recent_chunks,
        **shape,
        P=layout.page_size,
        **constants,
    )
    _choose_kernel[(num_entries,)](
        views.held_chunks,
        table.pages,
        table.num_prompt_pages,
        table.first_head_page,
        table.num_head_pages,
        is_dynamic,
        req_rows,
        images,
        marks,
        missing,
        reused,
        num_moved,
        counters,
        layer_idx,
        layout.pages_per_layer,
        table.pages.shape[1],
        max_chunks,
        retrieval.num_sink_chunks,
        retrieval.num_recent_chunks,
        retrieval.hysteresis,
        **shape,
        BLOCK=top_block(max_chunks),
        HAS_HYSTERESIS=retrieval.hysteresis != 0,
        num_warps=16,
    )
    is_rounded = host_pages.host_dtype != "same"
    out = (views.k_flat, views.v_flat)
    if not is_rounded:
        out = (views.k_flat.view(torch.int32), views.v_flat.view(torch.int32))
    words = host_pages.words.shape[2]
    rows = tile_rows(triton.next_power_of_2(words))
    tiles = triton.cdiv(max_chunks * retrieval.chunk_size, rows)
    _fetch_kernel[(num_entries, min(max(1, _FETCH_PROGRAMS // num_entries), tiles))](
        *out,
        host_pages.words,
        views.held_chunks,
        table.host_pages,
        table.host_rank,
        table.num_prompt_pages,
        req_rows,
        missing,
        reused,
        num_moved,
        layer_idx,
        max_host_pages,
        max_chunks,
        **shape,
        CHUNK=retrieval.chunk_size,
        SIZE=out[0].shape[1],
        WORDS=words,
        BW=triton.next_power_of_2(words),
        ROWS=rows,
        IS_ROUNDED=is_rounded,
        INTERPRETED=gpu.is_interpreted(),
    )
