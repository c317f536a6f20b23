"""Triton twin of `retrieve_chunks`: three launches a layer whose grids depend on shapes only.

1. Score, in `triton_score`: programs of an entry (request, KV head) share its chunks.
2. Choose, in `triton_choose`: one program an entry raises the scores of resident chunks by the hysteresis, finds the
   threshold, and lists the chosen chunks that are not resident and the slots that hold chunks not chosen: both in
   order, which is the pairing of `naive`.
3. Fetch: programs of an entry share these lists and read the host rows through their pinned address (zero copy). A
   program copies several small chunks at once, so that many loads are under way.

Buffer places, slots of the pool and slots of the host store are counted in chunks, of which a head page has C.
"""

import torch
import triton
import triton.language as tl

from hybridkv_kernels.chunks import Retrieval
from hybridkv_kernels.gpu.head_pages import host_page_ids
from hybridkv_kernels.head_pages import HeadPageTable, HeadPageViews
from hybridkv_kernels.retrieve_chunks.naive import as_plain_score
from hybridkv_kernels.retrieve_chunks.triton_choose import choose_kernel, choose_tiles
from hybridkv_kernels.retrieve_chunks.triton_score import score_launch

_COPY_BLOCK = 2048  # elements of keys, and as many of values, that a program copies at once
_TARGET_PROGRAMS = 1024  # programs of 4 warps in a launch: they fill a large GPU, and idle ones cost little
# Warps of a launch that scores. Only programs of dynamic heads, a quarter of all or so, have work, and two tiles each
# are enough to share what they do before the first one: the turned query of codes.
_TARGET_SCORE_WARPS = 8192


@triton.jit(do_not_specialize=["layer_idx", "max_host_pages"])
def _fetch_kernel(
    k_flat,
    v_flat,
    k_host,
    v_host,
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
    ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Fetch missing chunks: CHUNKS of them at a time, and BLOCK of their ELEMENTS at a time."""
    entry = tl.program_id(0).to(tl.int64)
    num_moved = tl.load(all_num_moved + entry)
    if num_moved == 0:
        return
    row = tl.load(req_rows + entry // H).to(tl.int64)
    first = tl.load(host_rank + (row * L + layer_idx) * H + entry % H) * tl.load(all_num_prompt_pages + row)
    host_pages = all_host_pages + row * max_host_pages
    for tile in range(tl.program_id(1), tl.cdiv(num_moved, CHUNKS), tl.num_programs(1)):
        i = tile * CHUNKS + tl.arange(0, CHUNKS)
        is_moved = i < num_moved
        chunk = tl.load(missing + entry * max_chunks + i, mask=is_moved, other=0)
        slot = tl.load(reused + entry * max_chunks + i, mask=is_moved, other=0).to(tl.int64)
        host_slot = host_page_ids(host_pages, first + chunk // C, is_moved, L, H) * C + chunk % C
        for start in tl.static_range(0, ELEMENTS, BLOCK):
            element = start + tl.arange(0, BLOCK)
            inside = is_moved[:, None] & (element < ELEMENTS)[None, :]
            src, dst = (host_slot * ELEMENTS)[:, None] + element[None, :], (slot * ELEMENTS)[:, None] + element[None, :]
            k = tl.load(k_host + src, mask=inside)
            v = tl.load(v_host + src, mask=inside)
            tl.store(k_flat + dst, k, mask=inside)
            tl.store(v_flat + dst, v, mask=inside)
        tl.store(held_chunks + slot, chunk, mask=is_moved)


def retrieve_chunks(
    q: torch.Tensor,
    views: HeadPageViews,
    table: HeadPageTable,
    k_host_pages: torch.Tensor,
    v_host_pages: torch.Tensor,
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
    num_entries, head_dim = batch * layout.num_kv_heads, q.shape[2]
    chunks_per_page = layout.page_size // retrieval.chunk_size
    max_chunks = triton.cdiv(max_host_pages * chunks_per_page, 512) * 512  # whole words, read by wide loads
    shape = {"L": layout.num_layers, "H": layout.num_kv_heads, "C": chunks_per_page}
    scratch = torch.empty(3, num_entries, max_chunks, dtype=torch.int32, device=q.device)
    images, missing, reused = scratch.unbind()
    resident, chosen = scratch.new_empty(2, num_entries, max_chunks // 32).unbind()
    num_moved = torch.empty(num_entries, dtype=torch.int32, device=q.device)
    is_dynamic = table.is_dynamic.view(torch.uint8)
    shared = max(1, _TARGET_PROGRAMS // num_entries)
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
    chunk_elements = retrieval.chunk_size * head_dim
    block = min(_COPY_BLOCK, triton.next_power_of_2(chunk_elements))
    copied = _COPY_BLOCK // block
    _fetch_kernel[(num_entries, min(shared, triton.cdiv(max_chunks, copied)))](
        views.k_flat,
        views.v_flat,
        k_host_pages,
        v_host_pages,
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
        ELEMENTS=chunk_elements,
        BLOCK=block,
        CHUNKS=copied,
    )
