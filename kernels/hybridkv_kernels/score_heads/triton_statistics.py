"""The passes of `score_heads` over probabilities: what a row hits, what it keeps, and the statistics.

A program has one row of a prompt, or one head of it. Nothing is sorted: the order statistics of a row are found two
bits of their fp32 image at a time (`gpu/top.py`), which is its bits, as no number here is negative.
"""

import triton
import triton.language as tl

from hybridkv_kernels.gpu.top import load_images, top_threshold
from hybridkv_kernels.score_heads import naive
from hybridkv_kernels.score_heads.triton_attention import sizes

_HIT_LEVEL = tl.constexpr(naive.HIT_LEVEL)


@triton.jit
def _smallest(images, num_columns, rank, BLOCK: tl.constexpr):
    """fp32: the number that has `rank` numbers before it in ascending order, of images[:num_columns]."""
    threshold = top_threshold(images, num_columns, num_columns - rank, BLOCK, 32)[0]
    # The threshold only parts the larger numbers from the others: the smallest one above it is meant.
    least = tl.full([BLOCK], 0x7FFFFFFF, tl.uint32)
    for start in range(0, num_columns, BLOCK):
        image, _, inside = load_images(images, start, num_columns, BLOCK, 32)
        least = tl.minimum(least, tl.where(inside & (image >= threshold), image, 0x7FFFFFFF))
    return tl.min(least, 0).to(tl.float32, bitcast=True)


@triton.jit
def hit_kernel(
    prompts,
    all_probs,
    all_counts,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds 1 to the counts [H, chunks] of each chunk that the program's row hits; see `naive.hit_cv`.

    `all_probs` has the bits of the probabilities.
    """
    own, num_rows, num_tokens = sizes(prompts)
    row, kv_head = tl.program_id(0), tl.program_id(1)
    if row < num_rows:
        images = all_probs + tl.load(own + 5) * H + (kv_head.to(tl.int64) * num_rows + row) * num_tokens
        low = _smallest(images, num_tokens, tl.load(own + 7).to(tl.int32), BLOCK)
        high = _smallest(images, num_tokens, tl.load(own + 8).to(tl.int32), BLOCK)
        level = low + _HIT_LEVEL * (high - low)
        num_chunks = tl.cdiv(num_tokens, CHUNK)
        counts = all_counts + tl.load(own + 6) * H + kv_head * num_chunks
        t = tl.arange(0, BT)
        for start in range(0, num_chunks, BC):
            chunk = start + tl.arange(0, BC)
            token = (chunk * CHUNK)[:, None] + t[None, :]  # [BC, BT]
            inside = (t < CHUNK)[None, :] & (token < num_tokens)
            p = tl.load(images + token, mask=inside, other=0).to(tl.float32, bitcast=True)
            # No key that the row does not see is above 0.
            is_hit = tl.max(((p >= level) & (p > 0.0)).to(tl.int32), 1) != 0
            tl.atomic_add(counts + chunk, 1, mask=is_hit, sem="relaxed")


@triton.jit
def _others(probs, totals, start, num_tokens, own_token, num_sinks, num_recent, BLOCK: tl.constexpr):
    """[BLOCK], double: how much the other rows want a key; inf for what is always kept. See `naive.wanted_keys`."""
    token = start + tl.arange(0, BLOCK)
    inside = token < num_tokens
    p = tl.load(probs + token, mask=inside, other=0).to(tl.float32, bitcast=True)
    wanted = tl.load(totals + token, mask=inside, other=0.0) - p.to(tl.float64)
    is_forced = (token < num_sinks) | ((token <= own_token) & (token > own_token - num_recent))
    return tl.where(is_forced, float("inf"), wanted)


@triton.jit
def _count_ties(
    images,
    probs,
    totals,
    threshold,
    least,
    step,
    num_tokens,
    own_token,
    num_sinks,
    num_recent,
    BLOCK: tl.constexpr,
):
    """How many keys with the image `threshold` are wanted at least so much, with 1, 2 and 3 steps more than `least`."""
    first = tl.zeros([BLOCK], tl.int32)
    second, third = first, first
    for start in range(0, num_tokens, BLOCK):
        image, _, inside = load_images(images, start, num_tokens, BLOCK, 32)
        wanted = _others(probs, totals, start, num_tokens, own_token, num_sinks, num_recent, BLOCK)
        wanted = wanted.to(tl.uint64, bitcast=True)
        is_tie = inside & (image == threshold)
        first += (is_tie & (wanted >= least + step)).to(tl.int32)
        second += (is_tie & (wanted >= least + 2 * step)).to(tl.int32)
        third += (is_tie & (wanted >= least + 3 * step)).to(tl.int32)
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)


@triton.jit(do_not_specialize=["num_sinks", "num_recent"])
def keep_kernel(prompts, all_probs, all_totals, all_kept, num_sinks, num_recent, H: tl.constexpr, BLOCK: tl.constexpr):
    """Kept [H, W, N], int32: 1 for the keys that `naive.capture` keeps of each row; ties go to the earlier key.

    What the other rows want is ranked in double, where a row that is subtracted leaves no trace. Its fp32 image, for
    which `all_kept` is scratch, has the same order but for ties, which few rows have at their threshold.
    """
    own, num_rows, num_tokens = sizes(prompts)
    row, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if row < num_rows:
        place = tl.load(own + 5) * H + (kv_head * num_rows + row) * num_tokens
        probs, images = all_probs + place, all_kept + place
        totals = all_totals + tl.load(own + 4) * H + kv_head * num_tokens
        num_kept, own_token = tl.load(own + 9).to(tl.int32), num_tokens - num_rows + row
        for start in range(0, num_tokens, BLOCK):
            wanted = _others(probs, totals, start, num_tokens, own_token, num_sinks, num_recent, BLOCK)
            token = start + tl.arange(0, BLOCK)
            tl.store(images + token, wanted.to(tl.float32).to(tl.int32, bitcast=True), mask=token < num_tokens)
        tl.debug_barrier()  # other threads read the images
        threshold, num_wanted = top_threshold(images, num_tokens, num_kept, BLOCK, 32)
        # The same once more among ties, with those bits of the double in which they differ.
        low, high = tl.full([BLOCK], float("inf"), tl.float64), tl.zeros([BLOCK], tl.float64)
        ties = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_tokens, BLOCK):
            image, _, inside = load_images(images, start, num_tokens, BLOCK, 32)
            wanted = _others(probs, totals, start, num_tokens, own_token, num_sinks, num_recent, BLOCK)
            is_tie = inside & (image == threshold)
            low, high = tl.minimum(low, tl.where(is_tie, wanted, low)), tl.maximum(high, tl.where(is_tie, wanted, high))
            ties += is_tie.to(tl.int32)
        least, most = tl.min(low, 0).to(tl.uint64, bitcast=True), tl.max(high, 0).to(tl.uint64, bitcast=True)
        count, bit = tl.sum(ties, 0), tl.full([], 0, tl.int32)
        num_wanted = tl.minimum(num_wanted, count)
        while (bit < 64) & ((least ^ most) >> bit.to(tl.uint64) != 0):
            bit += 2
        if bit < 64:
            least = (least >> bit.to(tl.uint64)) << bit.to(tl.uint64)
        while (bit > 0) & (count != num_wanted):
            bit -= 2
            step = tl.full([], 1, tl.uint64) << bit.to(tl.uint64)
            first, second, third = _count_ties(
                images, probs, totals, threshold, least, step, num_tokens, own_token, num_sinks, num_recent, BLOCK
            )
            if first >= num_wanted:
                least += step
                count = first
            if second >= num_wanted:
                least += step
                count = second
            if third >= num_wanted:
                least += step
                count = third
        if count != num_wanted:  # equal to the last bit
            above, second, third = _count_ties(
                images,
                probs,
                totals,
                threshold,
                least + 1,
                least ^ least,
                num_tokens,
                own_token,
                num_sinks,
                num_recent,
                BLOCK,
            )
            num_wanted -= above
        num_ties = tl.full([], 0, tl.int32)
        for start in range(0, num_tokens, BLOCK):
            image, token, inside = load_images(images, start, num_tokens, BLOCK, 32)
            wanted = _others(probs, totals, start, num_tokens, own_token, num_sinks, num_recent, BLOCK)
            wanted = wanted.to(tl.uint64, bitcast=True)
            is_tie = inside & (image == threshold)
            is_equal = is_tie & (wanted == least)
            place_of_tie = num_ties + tl.cumsum(is_equal.to(tl.int32), 0)
            is_kept = (image > threshold) | (is_tie & (wanted > least)) | (is_equal & (place_of_tie <= num_wanted))
            num_ties += tl.sum(is_equal.to(tl.int32), 0)
            tl.debug_barrier()  # all threads have read the block
            tl.store(images + token, is_kept.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["num_all_rows", "num_statistics"])
def statistic_kernel(
    prompts,
    partial,
    all_counts,
    out,
    num_all_rows,
    num_statistics,
    H: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    CHUNK: tl.constexpr,
    HIT_CV: tl.constexpr,
    CAPTURE: tl.constexpr,
    WORST: tl.constexpr,
    BQ: tl.constexpr,
    BS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics [prompts, H, S], fp32, from counts and from what each query keeps, `partial`.

    HIT_CV, CAPTURE and WORST are the columns of "hit_cv", "capture" and "worst_capture"; -1 for none.
    """
    own, num_rows, num_tokens = sizes(prompts)
    kv_head = tl.program_id(1)
    out += (tl.program_id(2) * H + kv_head) * num_statistics
    if HIT_CV >= 0:
        num_chunks = tl.cdiv(num_tokens, CHUNK)
        counts = all_counts + tl.load(own + 6) * H + kv_head * num_chunks
        hits, squares = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
        for start in range(0, num_chunks, BLOCK):
            chunk = start + tl.arange(0, BLOCK)
            count = tl.load(counts + chunk, mask=chunk < num_chunks, other=0).to(tl.int64)
            hits += count
            squares += count * count
        total = tl.sum(hits, 0)
        spread = tl.sqrt((tl.sum(squares, 0) * num_chunks - total * total).to(tl.float64))  # chunks^2 times variance
        cv = spread / tl.maximum(total.to(tl.float64), 1e-9 * num_chunks)
        tl.store(out + HIT_CV, (cv / (1.0 + cv)).to(tl.float32))
    if CAPTURE >= 0 or WORST >= 0:
        s, num_splits = tl.arange(0, BS), tl.load(own + 2).to(tl.int32)
        mass, worst = tl.zeros([BQ], tl.float32), tl.full([BQ], 1.0, tl.float32)
        for first in range(0, num_rows * GP, BQ):
            i = first + tl.arange(0, BQ)
            place = ((tl.load(own + 3) + i // GP) * H + kv_head) * GP + i % GP
            inside = (i < num_rows * GP) & (i % GP < G)
            captured = tl.zeros([BQ], tl.float32)
            for start in range(0, num_splits, BS):
                split = (start + s).to(tl.int64)
                at = split[:, None] * (num_all_rows * H * GP) + place[None, :]
                mask = (split < num_splits)[:, None] & inside[None, :]
                captured += tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)
            captured = tl.minimum(captured, 1.0)
            mass += captured
            worst = tl.where(inside, tl.minimum(worst, captured), worst)
        # One row does not show whether the head stays where it is.
        is_known = num_rows > 1
        if CAPTURE >= 0:
            mean = tl.sum(mass, 0) / (num_rows * G)
            tl.store(out + CAPTURE, tl.where(is_known, mean, 0.0))
        if WORST >= 0:
            tl.store(out + WORST, tl.where(is_known, tl.min(worst, 0), 0.0))
