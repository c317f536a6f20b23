"""Triton parts of the exact choice of top chunks: the score of a tile of chunks, its ordered image, the threshold.

Scores by key codes are a product of matrices, too: the two bits of a code become the first ones of the mantissa of 1.0,
which is 1 + code / 4 exactly in every type, and cheaper than a conversion of integers.

Scores are kept as uint32 images that order as the scores do, so that the k-th largest is found two bits at a time,
without a sort: at most 16 passes over an entry's images, whatever its length.
"""

import torch
import triton
import triton.language as tl

from hybridkv_kernels import gpu
from hybridkv_kernels.gpu.head_pages import dot
from hybridkv_kernels.select_chunks.naive import CODED_TOKENS, as_plain_score

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_CODED_TOKENS = tl.constexpr(CODED_TOKENS)


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
def coded_query(q, centre, step, INTERPRETED: tl.constexpr):
    """What `coded_scores` needs of a query group [BG, BD]: its product with the step [BD], fp32, and a constant [BG].

    A code stands for code - 1.5 steps and is read as 1 + code / 4, so 5.5 times the scaled query is too much.
    """
    wide = q.to(tl.float32)
    scaled = wide * step[None, :]
    if q.dtype == tl.float16:  # infinity times a code of 0 would be no number
        scaled = tl.where(scaled > 65504.0, 65504.0, tl.where(scaled < -65504.0, -65504.0, scaled))
    if INTERPRETED and q.dtype == tl.bfloat16:  # the interpreter cuts off what a GPU rounds
        bits = scaled.to(tl.uint32, bitcast=True)
        scaled = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    scaled = scaled.to(q.dtype)
    return scaled, tl.sum(wide * centre[None, :], 1) - 5.5 * tl.sum(scaled.to(tl.float32), 1)


@triton.jit
def _token_score(
    words, token: tl.constexpr, scaled, constant, G: tl.constexpr, MANTISSA: tl.constexpr, INTERPRETED: tl.constexpr
):
    """[BW], fp32: score of one of the 8 tokens of each word for the query that likes it best."""
    shift: tl.constexpr = MANTISSA - 2 - 2 * token
    one: tl.constexpr = (15 if MANTISSA == 10 else 127) << MANTISSA
    if shift >= 0:
        moved = words << shift
    else:
        moved = words >> -shift
    values = ((moved & (3 << (MANTISSA - 2))) | one).to(scaled.dtype, bitcast=True)
    by_query = 4.0 * dot(values, tl.trans(scaled), INTERPRETED) + constant[None, :]
    is_member = (tl.arange(0, scaled.shape[0]) < G)[None, :]
    return tl.max(tl.where(is_member, by_query, -float("inf")), 1)


@triton.jit
def coded_scores(
    words, scaled, constant, CHUNK: tl.constexpr, G: tl.constexpr, MANTISSA: tl.constexpr, INTERPRETED: tl.constexpr
):
    """[BW * 8 / CHUNK], fp32: score of the best token of each chunk, from words [BW, BD] of 8 tokens, as integers."""
    s0 = _token_score(words, 0, scaled, constant, G, MANTISSA, INTERPRETED)
    s1 = _token_score(words, 1, scaled, constant, G, MANTISSA, INTERPRETED)
    s2 = _token_score(words, 2, scaled, constant, G, MANTISSA, INTERPRETED)
    s3 = _token_score(words, 3, scaled, constant, G, MANTISSA, INTERPRETED)
    s4 = _token_score(words, 4, scaled, constant, G, MANTISSA, INTERPRETED)
    s5 = _token_score(words, 5, scaled, constant, G, MANTISSA, INTERPRETED)
    s6 = _token_score(words, 6, scaled, constant, G, MANTISSA, INTERPRETED)
    s7 = _token_score(words, 7, scaled, constant, G, MANTISSA, INTERPRETED)
    # The last join is the lowest bit of a token's number.
    even = tl.join(tl.join(s0, s4), tl.join(s2, s6))
    odd = tl.join(tl.join(s1, s5), tl.join(s3, s7))
    NUM_TOKENS: tl.constexpr = words.shape[0] * _CODED_TOKENS
    scores = tl.reshape(tl.join(even, odd), [NUM_TOKENS])
    if CHUNK > 1:
        scores = tl.max(tl.reshape(scores, [NUM_TOKENS // CHUNK, CHUNK]), 1)
    return scores


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
def _count_from(images, num_chunks, least, step, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """How many of images[:num_chunks] are at least `least`, least + step and least + 2 step; `least` is not 0."""
    first = tl.zeros([BLOCK], tl.int32)
    second, third = first, first
    for start in range(0, num_chunks, BLOCK):
        image, _, _ = load_images(images, start, num_chunks, BLOCK, BITS)  # 0 beyond the end, which does not count
        first += (image >= least).to(tl.int32)
        second += (image >= least + step).to(tl.int32)
        third += (image >= least + 2 * step).to(tl.int32)
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)


@triton.jit
def top_threshold(images, num_chunks, num_selected, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """A threshold, and how many of the images equal to it are among the num_selected largest of images[:num_chunks].

    All larger ones are. Two bits a pass, until the images from the threshold on are as many as wanted: such a
    pass takes a fifth of the instructions of one that makes a histogram of 256 bins.
    """
    threshold = tl.full([], 0, tl.uint32 if BITS == 32 else tl.uint64)
    count, bit = num_chunks, tl.full([], BITS, tl.int32)
    while (bit > 0) & (count != num_selected):
        bit -= 2
        step = tl.full([], 1, threshold.dtype) << bit.to(threshold.dtype)
        first, second, third = _count_from(images, num_chunks, threshold + step, step, BLOCK, BITS)
        if first >= num_selected:
            threshold += step
            count = first
        if second >= num_selected:
            threshold += step
            count = second
        if third >= num_selected:
            threshold += step
            count = third
    wanted = num_selected
    if count != num_selected:
        largest = (threshold ^ threshold) - 1
        if threshold != largest:  # nothing is larger than that
            above, _, _ = _count_from(images, num_chunks, threshold + 1, threshold ^ threshold, BLOCK, BITS)
            wanted -= above
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
            num_warps=16,
        )
    return out


def select_block(num_chunks: int) -> int:
    """Images that a program looks at together."""
    return min(4096, max(32, triton.next_power_of_2(num_chunks)))


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
