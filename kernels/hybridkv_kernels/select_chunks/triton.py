"""Triton parts of the exact choice of top chunks: the score of a tile of chunks, its ordered image, the threshold.

Scores are kept as uint32 images that order as the scores do, so that the k-th largest is found digit by digit, without
a sort: four passes over an entry's images, whatever its length.
"""

import torch
import triton
import triton.language as tl

from hybridkv_kernels import gpu
from hybridkv_kernels.gpu.head_pages import dot
from hybridkv_kernels.select_chunks.naive import as_plain_score


@triton.jit
def load_group(queries, row, D: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr):
    """[BG, BD]: the query group at rows row .. row + G - 1 of queries [rows, D]; zero beyond G and D."""
    member, d = tl.arange(0, BG), tl.arange(0, BD)
    inside = (member < G)[:, None] & (d < D)[None, :]
    return tl.load(queries + (row + member)[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def per_query_scores(q, low, high, SCORE: tl.constexpr, INTERPRETED: tl.constexpr):
    """[BG, BC], fp32: score for each query of one summary vector, or of a box, of each chunk."""
    if SCORE == "quest":
        wide = q.to(tl.float32)
        upper = dot(tl.maximum(wide, 0.0).to(q.dtype), tl.trans(high), INTERPRETED)
        return upper + dot(tl.minimum(wide, 0.0).to(q.dtype), tl.trans(low), INTERPRETED)
    elif SCORE == "arkvale":
        twice_centre = dot(q, tl.trans(high), INTERPRETED) + dot(q, tl.trans(low), INTERPRETED)
        extent = high.to(tl.float32) - low.to(tl.float32)
        half_extent = tl.sqrt(tl.sum(extent * extent, 1)) / 2
        norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
        return twice_centre / 2 + norm[:, None] * half_extent[None, :] / 2
    else:
        return dot(q, tl.trans(low), INTERPRETED)


@triton.jit
def group_score(per_query, G: tl.constexpr, BG: tl.constexpr, SCORE: tl.constexpr):
    """[BC], fp32: maximum or mean over the G queries."""
    is_member = (tl.arange(0, BG) < G)[:, None]
    if SCORE == "mean_mean":
        return tl.sum(tl.where(is_member, per_query, 0.0), 0) / G
    else:
        return tl.max(tl.where(is_member, per_query, -float("inf")), 0)


@triton.jit
def forced_counts(num_selected, num_sinks, num_recent):
    """Sinks and recent chunks that are chosen whatever their score: at most num_selected - 1, but 1 of 1."""
    places = tl.maximum(num_selected - 1, 1)
    sinks = tl.minimum(places, num_sinks)
    return sinks, tl.minimum(places - sinks, num_recent)


@triton.jit
def chunk_images(score, chunk, num_chunks, num_selected, num_sinks, num_recent):
    """[BC], uint32: larger for a better chunk, largest for forced ones; NaN is the least of all."""
    score = tl.where(score == score, score, -float("inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 is no worse
    bits = score.to(tl.uint32, bitcast=True)
    bits = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    sinks, recent = forced_counts(num_selected, num_sinks, num_recent)
    is_forced = (chunk < sinks) | (chunk >= num_chunks - recent)
    return tl.where(is_forced, 0xFFFFFFFF, bits).to(tl.uint32)


@triton.jit
def load_images(images, start, num_chunks, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """A tile of images, which lie in memory as signed integers, and which of them there are."""
    chunk = start + tl.arange(0, BLOCK)
    image = tl.load(images + chunk, mask=chunk < num_chunks, other=0)
    return image.to(tl.uint32 if BITS == 32 else tl.uint64, bitcast=True), chunk, chunk < num_chunks


@triton.jit
def top_threshold(images, num_chunks, num_selected, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """The num_selected-th largest of images[:num_chunks], and how many of those equal to it are among the top."""
    digit = tl.arange(0, 256)
    threshold = tl.full([], 0, tl.uint32 if BITS == 32 else tl.uint64)
    wanted = num_selected
    for place in tl.static_range(BITS // 8):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, num_chunks, BLOCK):
            image, _, inside = load_images(images, start, num_chunks, BLOCK, BITS)
            if place > 0:
                inside = inside & ((image >> (BITS - 8 * place)) == (threshold >> (BITS - 8 * place)))
            counts += tl.histogram(((image >> (BITS - 8 - 8 * place)) & 0xFF).to(tl.int32), 256, mask=inside)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        best = tl.max(tl.where(at_least >= wanted, digit, 0), 0)
        wanted -= tl.sum(tl.where(digit > best, counts, 0), 0)
        threshold = threshold | (best.to(threshold.dtype) << (BITS - 8 - 8 * place))
    return threshold, wanted


@triton.jit
def chosen_of_tile(image, inside, threshold, wanted, num_ties):
    """Mask of the chosen chunks of one tile and of those that equal the threshold; `num_ties` came before the tile."""
    is_tie = inside & (image == threshold)
    rank = num_ties + tl.cumsum(is_tie.to(tl.int32), 0)
    return inside & ((image > threshold) | (is_tie & (rank <= wanted))), is_tie


@triton.jit(do_not_specialize=["num_chunks", "num_sinks", "num_recent"])
def _score_kernel(
    queries,
    summaries,
    all_num_selected,
    image_rows,
    num_chunks,
    num_sinks,
    num_recent,
    D: tl.constexpr,
    G: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    VECTORS: tl.constexpr,
    SCORE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    chunk, d = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BD)
    q = load_group(queries, entry * G, D, G, BG, BD)
    inside = (chunk < num_chunks)[:, None] & (d < D)[None, :]
    rows = summaries + ((entry * num_chunks + chunk) * (VECTORS * D))[:, None] + d[None, :]
    best = tl.full([BG, BC], -float("inf"), tl.float32)
    step: tl.constexpr = 2 if SCORE == "quest" or SCORE == "arkvale" else 1
    for vector in tl.static_range(0, VECTORS, step):
        low = tl.load(rows + vector * D, mask=inside, other=0.0)
        high = low
        if step == 2:
            high = tl.load(rows + (vector + 1) * D, mask=inside, other=0.0)
        best = tl.maximum(best, per_query_scores(q, low, high, SCORE, INTERPRETED))
    score = group_score(best, G, BG, SCORE)
    image = chunk_images(score, chunk, num_chunks, tl.load(all_num_selected + entry), num_sinks, num_recent)
    tl.store(image_rows + entry * num_chunks + chunk, image.to(tl.int32, bitcast=True), mask=chunk < num_chunks)


@triton.jit(do_not_specialize=["num_chunks"])
def _top_kernel(image_rows, all_num_selected, out, num_chunks, BLOCK: tl.constexpr, BITS: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    images = image_rows + entry * num_chunks
    threshold, wanted = top_threshold(images, num_chunks, tl.load(all_num_selected + entry), BLOCK, BITS)
    num_ties = tl.full([], 0, tl.int32)
    for start in range(0, num_chunks, BLOCK):
        image, chunk, inside = load_images(images, start, num_chunks, BLOCK, BITS)
        chosen, is_tie = chosen_of_tile(image, inside, threshold, wanted, num_ties)
        num_ties += tl.sum(is_tie.to(tl.int32), 0)
        tl.store(out + entry * num_chunks + chunk, chosen.to(tl.uint8), mask=inside)


def select_chunks(
    q: torch.Tensor,
    summaries: torch.Tensor,
    num_selected: torch.Tensor,
    num_sink_chunks: int,
    num_recent_chunks: int,
    chunk_score: str,
) -> torch.Tensor:
    """Mask [E, C] of the chosen chunks; arguments as the public function's. CUDA graph: capturable, no sync."""
    q, chunk_score = as_plain_score(q, chunk_score)
    num_entries, num_chunks, vectors, head_dim = summaries.shape
    images = torch.empty(num_entries, num_chunks, dtype=torch.int32, device=q.device)
    num_selected = num_selected.to(torch.int32)
    constants = score_constants(q.dtype, head_dim, q.shape[1])
    if images.numel() > 0:
        _score_kernel[(num_entries, triton.cdiv(num_chunks, constants["BC"]))](
            q.contiguous(),
            summaries.contiguous(),
            num_selected,
            images,
            num_chunks,
            num_sink_chunks,
            num_recent_chunks,
            **constants,
            VECTORS=vectors,
            SCORE=chunk_score,
            num_stages=2,
        )
    return top_images(images, num_selected)


def top_images(images: torch.Tensor, num_selected: torch.Tensor) -> torch.Tensor:
    """[E, C], bool: the num_selected[e], int32, largest of images [E, C]; ties go to the earlier column.

    Images are int32 or int64 whose bits are ordered as unsigned integers. No sync.
    """
    num_entries, num_chunks = images.shape
    out = torch.empty(images.shape, dtype=torch.bool, device=images.device)
    if out.numel() > 0:
        _top_kernel[(num_entries,)](
            images,
            num_selected,
            out.view(torch.uint8),
            num_chunks,
            BLOCK=select_block(num_chunks) if images.itemsize == 4 else min(1024, select_block(num_chunks)),
            BITS=8 * images.itemsize,
            num_warps=8,
        )
    return out


def select_block(num_chunks: int) -> int:
    """Images that a program looks at together."""
    return min(2048, max(32, triton.next_power_of_2(num_chunks)))


def score_constants(dtype: torch.dtype, head_dim: int, group: int) -> dict[str, int | bool]:
    """Constants of a kernel that scores tiles of chunks."""
    return {
        "D": head_dim,
        "G": group,
        "BG": max(16, triton.next_power_of_2(group)),
        "BD": triton.next_power_of_2(head_dim),
        "BC": 16 if dtype == torch.float32 else 32,  # more spill registers
        "INTERPRETED": gpu.is_interpreted(),
    }
