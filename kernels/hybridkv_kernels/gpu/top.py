"""The exact choice of the largest numbers of a row without a sort, for Triton twins.

Each number has an unsigned image, and the images have the order of the numbers. The k-th largest is found two bits at
a time, in at most 16 passes over an entry's 32-bit images, however many there are.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def load_images(images, start, num_columns, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """A tile of images, which lie in memory as signed integers, and which of them there are."""
    column = start + tl.arange(0, BLOCK)
    image = tl.load(images + column, mask=column < num_columns, other=0)
    return image.to(tl.uint32 if BITS == 32 else tl.uint64, bitcast=True), column, column < num_columns


@triton.jit
def _count_from(images, num_columns, least, step, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """How many of images[:num_columns] are at least `least`, least + step and least + 2 step; `least` is not 0."""
    first = tl.zeros([BLOCK], tl.int32)
    second, third = first, first
    for start in range(0, num_columns, BLOCK):
        image, _, _ = load_images(images, start, num_columns, BLOCK, BITS)  # 0 beyond the end, which does not count
        first += (image >= least).to(tl.int32)
        second += (image >= least + step).to(tl.int32)
        third += (image >= least + 2 * step).to(tl.int32)
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)


@triton.jit
def top_threshold(
    images, num_columns, num_chosen, BLOCK: tl.constexpr, BITS: tl.constexpr, USED_BITS: tl.constexpr = 0
):
    """A threshold, and how many of the images equal to it are among the num_chosen largest of images[:num_columns].

    USED_BITS, an even number, is how many of the BITS of an image are not always 0; 0 stands for all.

    All images above the threshold are among them. Each pass finds two bits of it, until as many images as wanted are at
    least as large. Such a pass takes a fifth of the instructions of one that makes a histogram of 256 bins.
    """
    threshold = tl.full([], 0, tl.uint32 if BITS == 32 else tl.uint64)
    count, bit = num_columns, tl.full([], USED_BITS if USED_BITS > 0 else BITS, tl.int32)
    while (bit > 0) & (count != num_chosen):
        bit -= 2
        step = tl.full([], 1, threshold.dtype) << bit.to(threshold.dtype)
        first, second, third = _count_from(images, num_columns, threshold + step, step, BLOCK, BITS)
        if first >= num_chosen:
            threshold += step
            count = first
        if second >= num_chosen:
            threshold += step
            count = second
        if third >= num_chosen:
            threshold += step
            count = third
    wanted = num_chosen
    if count != num_chosen:
        largest = (threshold ^ threshold) - 1
        if threshold != largest:  # no image is larger than `largest`
            above, _, _ = _count_from(images, num_columns, threshold + 1, threshold ^ threshold, BLOCK, BITS)
            wanted -= above
    return threshold, wanted


@triton.jit(do_not_specialize=["num_columns"])
def _top_kernel(
    image_rows, all_num_chosen, out, num_columns, BLOCK: tl.constexpr, BITS: tl.constexpr, USED_BITS: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64)
    images = image_rows + entry * num_columns
    threshold, wanted = top_threshold(images, num_columns, tl.load(all_num_chosen + entry), BLOCK, BITS, USED_BITS)
    num_ties = tl.full([], 0, tl.int32)
    for start in range(0, num_columns, BLOCK):
        image, column, inside = load_images(images, start, num_columns, BLOCK, BITS)
        is_tie = inside & (image == threshold)
        rank = num_ties + tl.cumsum(is_tie.to(tl.int32), 0)
        chosen = inside & ((image > threshold) | (is_tie & (rank <= wanted)))
        num_ties += tl.sum(is_tie.to(tl.int32), 0)
        tl.store(out + entry * num_columns + column, chosen.to(tl.uint8), mask=inside)


def top_images(images: torch.Tensor, num_chosen: torch.Tensor, used_bits: int = 0) -> torch.Tensor:
    """[E, C], bool: the num_chosen[e] largest of images [E, C]; num_chosen is int32, ties go to the earlier column.

    Images are int32 or int64 whose bits are ordered as unsigned integers. Where only the lowest `used_bits`, an even
    number, are not always 0, fewer passes are needed; 0 stands for all bits. No sync.
    """
    num_entries, num_columns = images.shape
    out = torch.empty(images.shape, dtype=torch.bool, device=images.device)
    if out.numel() > 0:
        _top_kernel[(num_entries,)](
            images,
            num_chosen,
            out.view(torch.uint8),
            num_columns,
            BLOCK=top_block(num_columns) if images.itemsize == 4 else min(1024, top_block(num_columns)),
            BITS=8 * images.itemsize,
            USED_BITS=used_bits,
            num_warps=16,
        )
    return out


def top_block(num_columns: int) -> int:
    """Images that a program looks at together."""
    return min(4096, max(32, triton.next_power_of_2(num_columns)))
