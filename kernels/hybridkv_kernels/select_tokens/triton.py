"""Triton twin of `select_tokens`: one launch writes images of the tokens, one selects among them (`gpu/top.py`)."""

import torch
import triton
import triton.language as tl

from hybridkv_kernels.gpu.top import top_images

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_tokens", "num_first", "num_last", "tier_stride"])
def _image_kernel(
    score,
    tier,
    images,
    num_tokens,
    num_first,
    num_last,
    tier_stride,
    BLOCK: tl.constexpr,
    HAS_TIER: tl.constexpr,
    TIER_BITS: tl.constexpr,
):
    """Images [E, N]: from the highest bit on, whether a token is forced, its tier, and its score as a number.

    Images of 32 bits are of the score alone.
    """
    entry, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_tokens
    x = tl.load(score + entry * num_tokens + i, mask=inside, other=0.0) + 0.0  # -0 becomes 0
    bits = x.to(tl.int32, bitcast=True)
    # Larger numbers get larger images: the sign bit is flipped, and of negative numbers all others, too.
    image = tl.where(x == x, bits ^ ((bits >> 31) | -2147483648), -1)
    if images.dtype.element_ty == tl.int64:
        high = ((i < num_first) | (i >= num_tokens - num_last)).to(tl.int64) << TIER_BITS
        if HAS_TIER:
            high += tl.load(tier + entry * tier_stride + i, mask=inside, other=0).to(tl.int64)
        image = (high << 32) | (image.to(tl.int64) & 0xFFFFFFFF)
    tl.store(images + entry * num_tokens + i, image, mask=inside)


def select_tokens(
    score: torch.Tensor, num_selected: torch.Tensor, tier: torch.Tensor | None, num_first: int, num_last: int
) -> torch.Tensor:
    """Arguments and result as the public function's."""
    num_entries, num_tokens = score.shape
    is_plain = tier is None and num_first == num_last == 0
    images = torch.empty(score.shape, dtype=torch.int32 if is_plain else torch.int64, device=score.device)
    tier_bits = 1 if tier is None or tier.dtype == torch.bool else 9  # with the bit before them an even number
    if images.numel() > 0:
        _image_kernel[(num_entries, triton.cdiv(num_tokens, _BLOCK))](
            score.contiguous(),
            score if tier is None else tier.contiguous().view(torch.uint8),
            images,
            num_tokens,
            num_first,
            num_last,
            0 if tier is None or tier.ndim == 1 else num_tokens,
            BLOCK=_BLOCK,
            HAS_TIER=tier is not None,
            TIER_BITS=tier_bits,
        )
    return top_images(images, num_selected.to(torch.int32), 0 if is_plain else 32 + tier_bits + 1)
