"""Triton twin of `retrieve_chunks`: three launches a layer whose grids depend on shapes only.

1. Score, in `triton_score`: programs of an entry (request, KV head) share its chunks.
2. Choose, in `triton_choose`: one program an entry raises the scores of resident chunks by the hysteresis, finds the
   threshold, and lists the chosen chunks that are not resident and the slots that hold chunks not chosen: both in
   order, which is the pairing of `naive`.
3. Fetch: programs of an entry share these lists, token by token, and read the records through their pinned address
   (zero copy). A program copies several records at once, each by one load of a warp, so that many are under way.

Buffer places, slots of the pool and slots of the host store are counted in chunks, of which a head page has C.
"""

import torch
import triton
import triton.language as tl

from hybridkv_kernels import gpu
from hybridkv_kernels.chunks import Retrieval
from hybridkv_kernels.gpu.head_pages import host_page_ids
from hybridkv_kernels.gpu.records import record_pointers, tile_rows, widen_record
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.host_pages import HostPages
from hybridkv_kernels.retrieve_chunks.naive import as_plain_score
from hybridkv_kernels.retrieve_chunks.triton_choose import choose_kernel, choose_tiles
from hybridkv_kernels.retrieve_chunks.triton_score import score_launch

# Warps of a launch that scores. Only programs of dynamic heads, a quarter of all or so, have work, and two tiles each
# are enough to share what they do before the first one: the turned query of codes.
_TARGET_SCORE_WARPS = 8192
# A host link of 50 GB/s that answers after 2 microseconds is full with 100 kB under way. With rows of 128 elements of
# 16 bits a program asks for 16 records at once, 8 kB or 4 kB rounded, and waits about as long again for the lists and
# the table: 25 programs that find work fill the link, or 50. The 400 records that an entry of 32k tokens fetches in a
# step are 25 such tiles. So 32 programs for each entry of 16 requests with 4 KV heads take one round, and one request
# alone has all its tiles under way at once, 200 kB or 100 kB. A program without work ends after one load.
_FETCH_PROGRAMS = 2048


@triton.jit(do_not_specialize=["layer_idx", "max_host_pages"])
def _fetch_kernel(
    k_out,
    v_out,
    addresses,
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
    PAGES: tl.constexpr,
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
    if tl.program_id(1) * ROWS >= num_rows:
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
        page = host_page_ids(host_pages, first + chunk // C, is_row, L, H)
        records = record_pointers(addresses, page, chunk % C * CHUNK + token, is_row, PAGES, C * CHUNK, WORDS)
        inside = is_row[:, None] & (w < WORDS)[None, :]
        words = tl.load(records[:, None] + w[None, :], mask=inside, other=0)
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

    CUDA graph: capturable, no sync. Scratch: 12.25 bytes for each of B * H * max_chunks, where max_chunks is the number
    of chunks in the host pages that a row of the table can name; a prompt has no more chunks than that.
    """
    layout, batch, max_host_pages = table.layout, q.shape[0], table.host_pages.shape[1]
    if max_host_pages == 0:
        return
    q, _ = as_plain_score(q, retrieval.chunk_score)
    num_entries = batch * layout.num_kv_heads
    chunks_per_page = layout.page_size // retrieval.chunk_size
    max_chunks = triton.cdiv(max_host_pages * chunks_per_page, 512) * 512  # whole words, read by wide loads
    shape = {"L": layout.num_layers, "H": layout.num_kv_heads, "C": chunks_per_page}
    scratch = torch.empty(3, num_entries, max_chunks, dtype=torch.int32, device=q.device)
    images, missing, reused = scratch.unbind()
    resident, chosen = scratch.new_empty(2, num_entries, max_chunks // 32).unbind()
    num_moved = torch.empty(num_entries, dtype=torch.int32, device=q.device)
    is_dynamic = table.is_dynamic.view(torch.uint8)
    group = q.shape[1] // layout.num_kv_heads
    score, constants = score_launch(q, group, retrieval)
    programs = max(1, _TARGET_SCORE_WARPS // (num_entries * constants["num_warps"]))
    programs = min(programs, triton.cdiv(max_chunks, constants["BC"]))
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
        resident,
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
    choose_kernel[(num_entries,)](
        views.held_chunks,
        table.pages,
        table.num_prompt_pages,
        table.first_head_page,
        table.num_head_pages,
        is_dynamic,
        req_rows,
        images,
        resident,
        resident,  # twice: choose_kernel says why
        chosen,
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
        HAS_HYSTERESIS=retrieval.hysteresis != 0,
        **choose_tiles(max_chunks),
    )
    is_rounded = host_pages.host_dtype != "same"
    out = (views.k_flat, views.v_flat)
    if not is_rounded:
        out = (views.k_flat.view(torch.int32), views.v_flat.view(torch.int32))
    words = host_pages.record_bytes // 4
    rows = tile_rows(triton.next_power_of_2(words))
    tiles = triton.cdiv(max_chunks * retrieval.chunk_size, rows)
    _fetch_kernel[(num_entries, min(max(1, _FETCH_PROGRAMS // num_entries), tiles))](
        *out,
        host_pages.addresses,
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
        PAGES=host_pages.segment_pages,
        SIZE=out[0].shape[1],
        WORDS=words,
        BW=triton.next_power_of_2(words),
        ROWS=rows,
        IS_ROUNDED=is_rounded,
        INTERPRETED=gpu.is_interpreted(),
    )
