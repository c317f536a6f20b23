"""Which tokens of a prompt each head keeps: the first of an order, without sorting it."""

import torch

from hybridkv_kernels import checks, dispatch, gpu
from hybridkv_kernels.select_tokens import cpu, naive

_IMPLEMENTATIONS = {"naive": naive.select_tokens, "cpu": cpu.select_tokens, "triton": gpu.twin("select_tokens")}


def select_tokens(
    score: torch.Tensor,
    num_selected: torch.Tensor,
    tier: torch.Tensor | None = None,
    *,
    num_first: int = 0,
    num_last: int = 0,
) -> torch.Tensor:
    """The first num_selected[e] tokens of entry e: forced ones, then tier by tier those with the largest score.

    Parameters
    ----------
    score : [E, N], fp32. NaN counts as the largest number.
    num_selected : [E], int64, same device. All tokens are selected where it is N or more, none where it is 0 or less.
    tier : [N] or [E, N], bool or uint8, same device; a higher tier comes first. None is one tier.
    num_first, num_last : tokens at either end that come before everything else.

    Returns
    -------
    [E, N], bool. Exactly as many as wanted: ties go to the earlier token.

    Raises
    ------
    ValueError
        Shape, dtype, device or number is not as above.

    Notes
    -----
    No host sync. Cost: the C++ kernel reads an entry about three times, in cache; the Triton kernels write an image of
    8 bytes for each number, or of 4 where nothing is forced and there is one tier, and read it at most 23 times, or 19
    with tiers of bool.
    """
    checks.check_shape("score", score, (None, None))
    checks.check_dtype("score", score, (torch.float32,))
    checks.check_shape("num_selected", num_selected, (score.shape[0],))
    checks.check_dtype("num_selected", num_selected, (torch.int64,))
    others = [("num_selected", num_selected)]
    if tier is not None:
        checks.check_shape("tier", tier, (score.shape[1],) if tier.ndim == 1 else tuple(score.shape))
        checks.check_dtype("tier", tier, (torch.bool, torch.uint8))
        others.append(("tier", tier))
    for name, tensor in others:
        if tensor.device != score.device:
            raise ValueError(f"{name}: expected device {score.device} like score, got {tensor.device}")
    for name, number in (("num_first", num_first), ("num_last", num_last)):
        if number < 0:
            raise ValueError(f"{name}: expected a number of tokens, got {number}")
    chosen = dispatch.choose_copy(score.device)
    return _IMPLEMENTATIONS[chosen](score, num_selected, tier, num_first, num_last)
