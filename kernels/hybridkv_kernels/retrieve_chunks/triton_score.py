"""Triton parts of `retrieve_chunks` that score chunks: programs of an entry (request, KV head) share its chunks.

Scores by codes are a product of matrices, too. The two bits of a code become the highest bits of the mantissa of
1.0: the result is exactly 1 + code / 4 in every type, and it costs less than a conversion of integers.

A score is written as a uint32 image, which has the order of the scores, and the words of `triton_choose` that say which
chunks are resident are cleared.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from hybridkv_kernels import gpu
from hybridkv_kernels.chunks import CODE_HEADER, CODED_TOKENS, Retrieval, rotation
from hybridkv_kernels.gpu.head_pages import dot, summary_rows

VARYING = ("layer_idx", "pages_per_layer", "max_pages", "num_sinks", "num_recent")
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_CODED_TOKENS, _CODE_HEADER = tl.constexpr(CODED_TOKENS), tl.constexpr(CODE_HEADER)


@triton.jit
def load_entry(req_rows, is_dynamic, layer_idx, L: tl.constexpr, H: tl.constexpr):
    """Row of the program's request, index of its head in [R, L, H] tables, and whether it is a dynamic head."""
    entry = tl.program_id(0)
    row = tl.load(req_rows + entry // H).to(tl.int64)
    head = (row * L + layer_idx) * H + entry % H
    return row, head, tl.load(is_dynamic + head) != 0


@triton.jit
def _load_group(queries, row, D: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr):
    """[BG, BD]: the query group at rows row .. row + G - 1 of queries [rows, D]; zero beyond G and D."""
    member, d = tl.arange(0, BG), tl.arange(0, BD)
    inside = (member < G)[:, None] & (d < D)[None, :]
    return tl.load(queries + (row + member)[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def _per_query_scores(q, low, high, SCORE: tl.constexpr, INTERPRETED: tl.constexpr):
    """[BG, BC], fp32: score that each query gives one summary vector, or the box, of each chunk."""
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
def _group_score(per_query, G: tl.constexpr, BG: tl.constexpr, SCORE: tl.constexpr):
    """[BC], fp32: maximum or mean over the G queries."""
    is_member = (tl.arange(0, BG) < G)[:, None]
    if SCORE == "mean_mean":
        return tl.sum(tl.where(is_member, per_query, 0.0), 0) / G
    else:
        return tl.max(tl.where(is_member, per_query, -float("inf")), 0)


@triton.jit
def _coded_query(turned, step, INTERPRETED: tl.constexpr, DTYPE: tl.constexpr):
    """What `_coded_scores` needs of a turned query group [BG, BC]: times the step [BC], and constant and factor [BG].

    A code stands for code - 1.5 steps and is read as 1 + code / 4. So a product times 4, less 5.5 times the sum of the
    scaled query, is the score. It is divided by the spread that independent channels would give it.
    """
    scaled = turned * step[None, :]
    if tl.float16 == DTYPE:  # infinity times a code of 0 would be no number
        scaled = tl.where(scaled > 65504.0, 65504.0, tl.where(scaled < -65504.0, -65504.0, scaled))
    if INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter cuts off what a GPU rounds
        bits = scaled.to(tl.uint32, bitcast=True)
        scaled = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    scaled = scaled.to(DTYPE)
    wide = scaled.to(tl.float32)
    spread = tl.sqrt(tl.sum(wide * wide, 1))
    spread = tl.where(spread > 0.0, spread, 1.0)
    return scaled, -5.5 * tl.sum(wide, 1) / spread, 4.0 / spread


@triton.jit
def _token_score(
    words,
    token: tl.constexpr,
    scaled,
    constant,
    factor,
    G: tl.constexpr,
    MANTISSA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """[BW], fp32: score of one of the 8 tokens of each word, the largest over the queries of the group."""
    shift: tl.constexpr = MANTISSA - 2 - 2 * token
    one: tl.constexpr = (15 if MANTISSA == 10 else 127) << MANTISSA
    if shift >= 0:
        moved = words << shift
    else:
        moved = words >> -shift
    values = ((moved & (3 << (MANTISSA - 2))) | one).to(scaled.dtype, bitcast=True)
    by_query = dot(values, tl.trans(scaled), INTERPRETED) * factor[None, :] + constant[None, :]
    is_member = (tl.arange(0, scaled.shape[0]) < G)[None, :]
    return tl.max(tl.where(is_member, by_query, -float("inf")), 1)


@triton.jit
def _coded_scores(
    words,
    scaled,
    constant,
    factor,
    CHUNK: tl.constexpr,
    G: tl.constexpr,
    MANTISSA: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """[BW * 8 / CHUNK], fp32: score of the best token of each chunk, from words [BW, BC] of 8 tokens, as integers."""
    s0 = _token_score(words, 0, scaled, constant, factor, G, MANTISSA, INTERPRETED)
    s1 = _token_score(words, 1, scaled, constant, factor, G, MANTISSA, INTERPRETED)
    s2 = _token_score(words, 2, scaled, constant, factor, G, MANTISSA, INTERPRETED)
    s3 = _token_score(words, 3, scaled, constant, factor, G, MANTISSA, INTERPRETED)
    s4 = _token_score(words, 4, scaled, constant, factor, G, MANTISSA, INTERPRETED)
    s5 = _token_score(words, 5, scaled, constant, factor, G, MANTISSA, INTERPRETED)
    s6 = _token_score(words, 6, scaled, constant, factor, G, MANTISSA, INTERPRETED)
    s7 = _token_score(words, 7, scaled, constant, factor, G, MANTISSA, INTERPRETED)
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
    """Numbers of sinks and recent chunks that are chosen whatever their score is, as in `Retrieval.forced_chunks`."""
    places = tl.maximum(num_selected - 1, 1)
    sinks = tl.minimum(places, num_sinks)
    return sinks, tl.minimum(places - sinks, num_recent)


@triton.jit
def score_image(score):
    """uint32 images that have the order of fp32 scores; NaN is the least of all."""
    score = tl.where(score == score, score, -float("inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 counts as 0.0
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def image_score(image):
    """The fp32 scores of such images."""
    bits = tl.where((image >> 31) != 0, image ^ 0x80000000, image ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _chunk_images(score, chunk, num_chunks, num_selected, num_sinks, num_recent):
    """[BC], uint32: larger for a better chunk, largest for forced ones; NaN is the least of all."""
    bits = score_image(score)
    sinks, recent = forced_counts(num_selected, num_sinks, num_recent)
    is_forced = (chunk < sinks) | (chunk >= num_chunks - recent)
    return tl.where(is_forced, 0xFFFFFFFF, bits).to(tl.uint32)


@triton.jit
def _clear_words(resident, chunk, inside):
    """Clear the words of 32 chunks that begin among these."""
    tl.store(resident + chunk // 32, 0, mask=inside & (chunk % 32 == 0))


@triton.jit
def _load_vectors(
    k_flat,
    v_flat,
    pages,
    first,
    vector,
    mask,
    start,
    pages_per_layer,
    D: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    P: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
):
    """[BV, BC]: numbers from `start` on of vectors `vector` [BV] of an entry; zero where not `mask`.

    They have C numbers each, so that a summary vector of D numbers holds D / C of them.
    """
    SHARE: tl.constexpr = D // C
    row, in_values = summary_rows(pages, first, vector // SHARE, mask, pages_per_layer, L, H, P)
    begin = tl.where(in_values, v_flat + row * D, k_flat + row * D) + vector % SHARE * C
    c = start + tl.arange(0, BC)
    return tl.load(begin[:, None] + c[None, :], mask=mask[:, None] & (c < C)[None, :], other=0.0)


@triton.jit(do_not_specialize=VARYING)
def _score_kernel(
    queries,
    k_flat,
    v_flat,
    all_pages,
    all_num_prompt_pages,
    num_head_pages,
    first_summary_page,
    is_dynamic,
    req_rows,
    image_rows,
    resident_rows,
    layer_idx,
    pages_per_layer,
    max_pages,
    max_chunks,
    num_sinks,
    num_recent,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
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
    row, head, is_mine = load_entry(req_rows, is_dynamic, layer_idx, L, H)
    if not is_mine:
        return
    num_chunks = tl.load(all_num_prompt_pages + row) * C
    if tl.program_id(1) * BC >= num_chunks:  # a prompt is shorter than the longest
        return
    num_selected = tl.load(num_head_pages + head) * C
    pages, first = all_pages + row * max_pages, tl.load(first_summary_page + head)
    q = _load_group(queries, entry * G, D, G, BG, BD)
    step: tl.constexpr = 2 if SCORE == "quest" or SCORE == "arkvale" else 1
    for tile in range(tl.program_id(1), tl.cdiv(num_chunks, BC), tl.num_programs(1)):
        chunk = tile * BC + tl.arange(0, BC)
        inside = chunk < num_chunks
        best = tl.full([BG, BC], -float("inf"), tl.float32)
        for i in tl.static_range(0, VECTORS, step):
            vector = chunk * STORED + i
            low = _load_vectors(k_flat, v_flat, pages, first, vector, inside, 0, pages_per_layer, D, D, BD, P, L, H)
            high = low
            if step == 2:
                high = _load_vectors(
                    k_flat, v_flat, pages, first, vector + 1, inside, 0, pages_per_layer, D, D, BD, P, L, H
                )
            best = tl.maximum(best, _per_query_scores(q, low, high, SCORE, INTERPRETED))
        score = _group_score(best, G, BG, SCORE)
        image = _chunk_images(score, chunk, num_chunks, num_selected, num_sinks, num_recent)
        tl.store(image_rows + entry * max_chunks + chunk, image.to(tl.int32, bitcast=True), mask=inside)
        _clear_words(resident_rows + entry * (max_chunks // 32), chunk, inside)


@triton.jit(do_not_specialize=VARYING)
def _score_codes_kernel(
    queries,
    k_flat,
    v_flat,
    all_pages,
    all_num_prompt_pages,
    num_head_pages,
    first_summary_page,
    is_dynamic,
    req_rows,
    image_rows,
    resident_rows,
    layer_idx,
    pages_per_layer,
    max_pages,
    max_chunks,
    num_sinks,
    num_recent,
    rotations,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    MANTISSA: tl.constexpr,
    CHANNELS: tl.constexpr,
    BK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Score chunks where codes of CHANNELS of the D elements of a key score single tokens, 8 in each coded vector.

    BC chunks are a whole number of vectors, BD >= CHANNELS, and `rotations` is `chunks.rotation` of the channels.
    """
    entry = tl.program_id(0).to(tl.int64)
    row, head, is_mine = load_entry(req_rows, is_dynamic, layer_idx, L, H)
    if not is_mine:
        return
    num_chunks = tl.load(all_num_prompt_pages + row) * C
    if tl.program_id(1) * BC >= num_chunks:  # a prompt is shorter than the longest
        return
    num_selected = tl.load(num_head_pages + head) * C
    pages, first = all_pages + row * max_pages, tl.load(first_summary_page + head)
    CHUNK: tl.constexpr = P // C
    WORDS: tl.constexpr = BC * CHUNK // _CODED_TOKENS
    header, one = tl.zeros([1], tl.int32), tl.full([1], 1, tl.int1)
    step = _load_vectors(k_flat, v_flat, pages, first, header, one, 0, pages_per_layer, D, CHANNELS, BD, P, L, H)
    member, c = tl.arange(0, BG), tl.arange(0, BD)
    # The query group, turned: [BD, BG], so that a product of matrices has many rows. The rotation is symmetric. As many
    # channels of the query at a time as leave room for the rotation: each time waits for three loads, one by one.
    turned = tl.zeros([BD, BG], tl.float32)
    for start in range(0, BD, BK):
        numbers = _load_vectors(
            k_flat, v_flat, pages, first, header + 1, one, start, pages_per_layer, D, CHANNELS, BK, P, L, H
        )
        channel = tl.max(numbers.to(tl.int32 if MANTISSA == 23 else tl.int16, bitcast=True).to(tl.int32), 0)
        own = start + tl.arange(0, BK)
        is_query = (own < CHANNELS)[:, None] & (member < G)[None, :]
        q = tl.load(queries + (entry * G + member)[None, :] * D + channel[:, None], mask=is_query, other=0.0)
        is_coded = (c < CHANNELS)[:, None] & (own < CHANNELS)[None, :]
        turn = tl.load(rotations + c[:, None] * CHANNELS + own[None, :], mask=is_coded, other=0.0)
        turned += dot(turn, q, INTERPRETED)
    step = tl.max(step.to(tl.float32), 0)
    scaled, constant, factor = _coded_query(tl.trans(turned), step, INTERPRETED, k_flat.dtype.element_ty)
    num_words = num_chunks * CHUNK // _CODED_TOKENS
    for tile in range(tl.program_id(1), tl.cdiv(num_chunks, BC), tl.num_programs(1)):
        chunk, word = tl.arange(0, BC) + tile * BC, tl.arange(0, WORDS) + tile * WORDS
        inside, vector = chunk < num_chunks, word + _CODE_HEADER
        is_word = word < num_words
        words = _load_vectors(
            k_flat, v_flat, pages, first, vector, is_word, 0, pages_per_layer, D, CHANNELS, BD, P, L, H
        )
        words = words.to(tl.int32 if MANTISSA == 23 else tl.int16, bitcast=True)
        score = _coded_scores(words, scaled, constant, factor, CHUNK, G, MANTISSA, INTERPRETED)
        image = _chunk_images(score, chunk, num_chunks, num_selected, num_sinks, num_recent)
        tl.store(image_rows + entry * max_chunks + chunk, image.to(tl.int32, bitcast=True), mask=inside)
        _clear_words(resident_rows + entry * (max_chunks // 32), chunk, inside)


def score_launch(q: torch.Tensor, group: int, retrieval: Retrieval) -> tuple[triton.JITFunction, dict[str, Any]]:
    """The kernel for this chunk score, with its constants and options; q comes from `as_plain_score`."""
    head_dim, size = q.shape[2], retrieval.chunk_size
    constants = {
        "D": head_dim,
        "G": group,
        "BG": max(16, triton.next_power_of_2(group)),
        "BD": triton.next_power_of_2(head_dim),
        "BC": 16 if q.dtype == torch.float32 else 32,  # larger blocks spill registers
        "INTERPRETED": gpu.is_interpreted(),
        "num_stages": 2,
    }
    if retrieval.is_coded:
        channels = retrieval.coded_channels(head_dim)
        block = max(16, triton.next_power_of_2(channels))
        # A vector is read once for its 8 tokens; the matrix product of a warp takes 16 of them. More of fp32, or of
        # vectors that are loaded with a mask, would need more registers than there are.
        vectors = 16 if q.dtype == torch.float32 or channels < block else 32
        constants |= {"BC": vectors * CODED_TOKENS // size, "BG": max(8, triton.next_power_of_2(group))}
        constants |= {"BD": block, "BK": min(block, 32 if vectors == 16 else 64), "CHANNELS": channels}
        constants |= {"MANTISSA": _MANTISSA_BITS[q.dtype]}
        return _score_codes_kernel, constants | {"rotations": rotation(channels, q.device, q.dtype), "num_warps": 2}
    vectors, stored = retrieval.score_vectors, retrieval.stored_vectors
    kind = "mean_max" if retrieval.chunk_score == "mean_spread" else retrieval.chunk_score
    return _score_kernel, constants | {"VECTORS": vectors, "STORED": stored, "SCORE": kind, "num_warps": 4}
