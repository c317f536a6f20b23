"""Triton part of `retrieve_chunks` that chooses chunks: one program an entry, whose images stay in its registers.

Chunks come in words of 32, and a bit of a word says whether a chunk is resident, or chosen. A program reads memory in
three passes, none of which waits for more than two loads, where a search through memory took up to 21 passes:

1. the buffer's places, which set the bits of resident chunks;
2. all images, of which those of resident chunks are raised by the hysteresis as they are read; what follows counts in
   registers, and only images beyond MOST_KEPT are read again for each count;
3. the buffer's places again, which list the slots of chunks that were not chosen.

The missing chunks are chosen words without resident bits, so that listing them reads no image. Both lists are in order,
which is the pairing of `naive`.
"""

import triton
import triton.language as tl

from hybridkv_kernels.gpu.head_pages import head_page_ids
from hybridkv_kernels.retrieve_chunks.triton_score import VARYING, forced_counts, image_score, load_entry, score_image

MOST_KEPT = 32768  # images in the registers of a program: 32 of the 64 that each of 1024 threads has
PLACES_PER_WARP = 128  # buffer places that a program looks at together
_REST_ROWS = 128  # words of images that a count reads together beyond those in registers
_FORCED = tl.constexpr(0xFFFFFFFF)  # image of forced chunks


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
    """Slots of the pool and chunks of BLOCK buffer places of an entry, int32, and which of the places there are."""
    place = start + tl.arange(0, BLOCK)
    inside = place < num_selected
    slot = head_page_ids(pages, first + place // C, inside, pages_per_layer, L, H) * C + place % C
    return slot.to(tl.int32), tl.load(held_chunks + slot, mask=inside, other=0), inside


@triton.jit
def _load_words(words, start, num_chunks, ROWS: tl.constexpr):
    """[ROWS], uint32: the words from chunk `start` on; zero beyond the last chunk."""
    first = start + tl.arange(0, ROWS) * 32
    return tl.load(words + first // 32, mask=first < num_chunks, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _load_images(images, resident, start, num_chunks, hysteresis, ROWS: tl.constexpr, HAS_HYSTERESIS: tl.constexpr):
    """[ROWS, 32], uint32: images from chunk `start` on, raised where a chunk is resident; 0 beyond the last chunk."""
    bit = tl.arange(0, 32)[None, :]
    chunk = start + tl.arange(0, ROWS)[:, None] * 32 + bit
    image = tl.load(images + chunk, mask=chunk < num_chunks, other=0).to(tl.uint32, bitcast=True)
    if HAS_HYSTERESIS:
        is_resident = ((_load_words(resident, start, num_chunks, ROWS)[:, None] >> bit.to(tl.uint32)) & 1) != 0
        raised = score_image(image_score(image) + hysteresis)
        image = tl.where(is_resident & (image != _FORCED), raised, image)  # forced chunks are the largest
    return image


@triton.jit
def _is_counted(image, start, least, last, ROWS: tl.constexpr, TIES: tl.constexpr):
    """[ROWS, 32], int32: 1 for images that are at least `least`; with TIES for equal ones of chunks up to `last`."""
    if TIES:
        chunk = start + tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
        return ((image == least) & (chunk <= last)).to(tl.int32)
    else:
        return (image >= least).to(tl.int32)


@triton.jit
def _count(
    kept,
    images,
    resident,
    num_chunks,
    hysteresis,
    least,
    last,
    KEPT: tl.constexpr,
    REST: tl.constexpr,
    HAS_HYSTERESIS: tl.constexpr,
    TIES: tl.constexpr,
):
    """How many images of an entry `_is_counted`; `least` is not 0."""
    count = tl.sum(_is_counted(kept, 0, least, last, KEPT, TIES))
    if num_chunks > KEPT * 32:
        more = tl.zeros([REST, 32], tl.int32)
        for start in range(KEPT * 32, num_chunks, REST * 32):
            image = _load_images(images, resident, start, num_chunks, hysteresis, REST, HAS_HYSTERESIS)
            more += _is_counted(image, start, least, last, REST, TIES)
        count += tl.sum(more)
    return count


@triton.jit
def _bounds(image):
    """The least image less 1, and the largest plus 1: so the images beyond the last chunk and forced ones do not count.

    Those are 0 and 0xFFFFFFFF, and wrap around.
    """
    return tl.min(image - 1), tl.max(image + 1)


@triton.jit
def _find_threshold(
    kept,
    images,
    resident,
    num_chunks,
    num_selected,
    num_forced,
    hysteresis,
    KEPT: tl.constexpr,
    REST: tl.constexpr,
    HAS_HYSTERESIS: tl.constexpr,
):
    """Threshold, and the last chunk that is chosen although its image only equals it.

    The threshold lies from `low` on, which at least num_selected images reach, to below `high`, which fewer reach. Each
    second probe lies where the counts of the two would have it if images between them were spread evenly, the others
    halve the interval. So there are at most 64 probes; 32,768 normally distributed scores take 15.
    """
    below, high = _bounds(kept)
    for start in range(KEPT * 32, num_chunks, REST * 32):
        image = _load_images(images, resident, start, num_chunks, hysteresis, REST, HAS_HYSTERESIS)
        rest_below, rest_high = _bounds(image)
        below, high = tl.minimum(below, rest_below), tl.maximum(high, rest_high)
    low, count, above = below + 1, num_chunks, num_forced
    if above >= num_selected:  # a single place, and a forced chunk for it
        low, count = tl.full([], 0xFFFFFFFF, tl.uint32), num_selected
    is_even = num_chunks < 0
    while (high - low > 1) & (count != num_selected):
        width = high - low
        share = (count - num_selected).to(tl.float32) / (count - above).to(tl.float32)
        step = tl.where(is_even, width // 2, (width.to(tl.float32) * share).to(tl.uint32))
        probe = low + tl.minimum(tl.maximum(step, 1), width - 1)
        found = _count(kept, images, resident, num_chunks, hysteresis, probe, 0, KEPT, REST, HAS_HYSTERESIS, False)
        if found >= num_selected:
            low, count = probe, found
        else:
            high, above = probe, found
        is_even = is_even == 0
    threshold, last = low, num_chunks - 1
    if count != num_selected:
        # The interval is a single image, and more chunks have it than are wanted: the earlier ones are chosen.
        wanted, before = num_selected - above, tl.full([], -1, tl.int32)
        while last - before > 1:
            middle = (before + last) // 2
            found = _count(
                kept, images, resident, num_chunks, hysteresis, threshold, middle, KEPT, REST, HAS_HYSTERESIS, True
            )
            if found >= wanted:
                last = middle
            else:
                before = middle
    return threshold, last


@triton.jit
def _count_bits(word):
    """Bits that are set in each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word + (word >> 8) + (word >> 16) + (word >> 24)) & 0x3F).to(tl.int32)


@triton.jit
def _list_missing(
    image,
    start,
    threshold,
    last,
    num_chunks,
    resident,
    chosen,
    missing,
    num_missing,
    ROWS: tl.constexpr,
):
    """Write the chosen words of images [ROWS, 32], and list the chunks that are not resident; their new number."""
    bit = tl.arange(0, 32)[None, :]
    first = start + tl.arange(0, ROWS) * 32
    is_chosen = (image > threshold) | ((image == threshold) & (first[:, None] + bit <= last))
    word = tl.sum(is_chosen.to(tl.uint32) << bit.to(tl.uint32), 1)
    tl.store(chosen + first // 32, word.to(tl.int32, bitcast=True), mask=first < num_chunks)
    word &= _load_words(resident, start, num_chunks, ROWS) ^ 0xFFFFFFFF
    counts = _count_bits(word)
    rank = num_missing + tl.cumsum(counts, 0) - counts
    for _ in range(tl.max(counts, 0)):  # one chunk of each word at a time
        below = word - 1
        tl.store(missing + rank, first + _count_bits(below & (word ^ 0xFFFFFFFF)), mask=word != 0)
        rank += 1
        word = tl.where(word != 0, word & below, 0)
    return num_missing + tl.sum(counts, 0)


@triton.jit(do_not_specialize=VARYING)
def choose_kernel(
    held_chunks,
    all_pages,
    all_num_prompt_pages,
    first_head_page,
    num_head_pages,
    is_dynamic,
    req_rows,
    image_rows,
    resident_rows,
    same_resident_rows,
    chosen_rows,
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
    KEPT: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_HYSTERESIS: tl.constexpr,
):
    """Lists of missing chunks and reused slots of an entry, from its images and its empty resident words.

    The resident words are given twice. The compiler does not know that, and keeps no address of them while images fill
    the registers.
    """
    entry = tl.program_id(0).to(tl.int64)
    row, head, is_mine = load_entry(req_rows, is_dynamic, layer_idx, L, H)
    if not is_mine:
        tl.store(all_num_moved + entry, 0)
        return
    num_chunks, num_selected = tl.load(all_num_prompt_pages + row) * C, tl.load(num_head_pages + head) * C
    first, pages = tl.load(first_head_page + head), all_pages + row * max_pages
    lists, words = entry * max_chunks, entry * (max_chunks // 32)
    images, resident, chosen = image_rows + lists, resident_rows + words, chosen_rows + words
    for start in range(0, num_selected, BLOCK):
        _, held, inside = _held_chunks(held_chunks, pages, first, start, num_selected, pages_per_layer, L, H, C, BLOCK)
        bit = tl.full([BLOCK], 1, tl.int32) << held % 32
        tl.atomic_or(resident + held // 32, bit, mask=inside, sem="relaxed")
    tl.debug_barrier()  # other threads read the words
    kept = _load_images(images, resident, 0, num_chunks, hysteresis, KEPT, HAS_HYSTERESIS)
    sinks, recent = forced_counts(num_selected, num_sinks, num_recent)
    threshold, last = _find_threshold(
        kept, images, resident, num_chunks, num_selected, sinks + recent, hysteresis, KEPT, REST, HAS_HYSTERESIS
    )
    resident = same_resident_rows + words
    num_missing = _list_missing(
        kept, 0, threshold, last, num_chunks, resident, chosen, missing + lists, tl.full([], 0, tl.int32), KEPT
    )
    for start in range(KEPT * 32, num_chunks, REST * 32):
        image = _load_images(images, resident, start, num_chunks, hysteresis, REST, HAS_HYSTERESIS)
        num_missing = _list_missing(
            image, start, threshold, last, num_chunks, resident, chosen, missing + lists, num_missing, REST
        )
    tl.debug_barrier()  # other threads read the chosen words
    num_reused = tl.full([], 0, tl.int32)
    for start in range(0, num_selected, BLOCK):
        slot, held, inside = _held_chunks(
            held_chunks, pages, first, start, num_selected, pages_per_layer, L, H, C, BLOCK
        )
        is_chosen = (tl.load(chosen + held // 32, mask=inside, other=0) >> held % 32) & 1
        is_reused = inside & (is_chosen == 0)
        rank = num_reused + tl.cumsum(is_reused.to(tl.int32), 0) - 1
        tl.store(reused + lists + rank, slot, mask=is_reused)
        num_reused += tl.sum(is_reused.to(tl.int32), 0)
    tl.store(all_num_moved + entry, tl.minimum(num_missing, num_reused))
    by_score = num_selected - sinks - recent
    tl.atomic_add(counters, by_score.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 1, (by_score - num_missing).to(tl.int64), sem="relaxed")


def choose_tiles(max_chunks: int) -> dict[str, int]:
    """Constants and options of `choose_kernel` for entries of up to so many chunks."""
    kept = min(MOST_KEPT, max(32, triton.next_power_of_2(max_chunks)))
    num_warps = 32 if kept > 8192 else 16  # with few images a program of fewer warps has less to wait for
    tiles = {"KEPT": kept // 32, "REST": _REST_ROWS, "BLOCK": PLACES_PER_WARP * num_warps}
    # All registers that there are: left alone, the compiler would save some of them, and spill.
    return tiles | {"num_warps": num_warps, "maxnreg": 65536 // (32 * num_warps)}
