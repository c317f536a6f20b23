"""Copy the kept rows of a prompt to their head pages."""

import torch

from hybridkv_kernels import checks, dispatch, gpu
from hybridkv_kernels.compact_kv import cpu, naive

_IMPLEMENTATIONS = {"naive": naive.compact_kv, "cpu": cpu.compact_kv, "triton": gpu.twin("compact_kv")}


def compact_kv(k: torch.Tensor, v: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy rows src[i] to rows dst[i] of the pool, in place, for keys and values; none where src[i] is negative.

    So a prompt has as many pairs as its budget has rows, whatever was decided for it.

    Parameters
    ----------
    k, v : [rows, D], bf16 | fp16 | fp32, contiguous. One row per (layer, token slot, KV head): row
        (layer * slots + slot) * H + head of the pool, which is row `head_page * P + i` of its head-page view.
    src, dst : [M], int64, same device. Absolute rows; disjoint; dst without repeats. Where src is negative, dst is not
        looked at.

    Raises
    ------
    ValueError
        Shape, dtype, device or stride differs.

    Notes
    -----
    Ownership: src rows stay intact; the caller frees them. No sync. Cost: 4 * M * D * itemsize bytes of traffic.
    """
    checks.check_shape("k", k, (None, None))
    checks.check_dtype("k", k, checks.FLOATS)
    checks.check_shape("v", v, tuple(k.shape))
    checks.check_same("v", v, "k", k)
    checks.check_contiguous("k", k)
    checks.check_contiguous("v", v)
    for name, rows in (("src", src), ("dst", dst)):
        checks.check_shape(name, rows, (src.shape[0],))
        checks.check_dtype(name, rows, (torch.int64,))
        if rows.device != k.device:
            raise ValueError(f"{name}: expected device {k.device} like k, got {rows.device}")
    _IMPLEMENTATIONS[dispatch.choose_copy(k.device)](k, v, src, dst)
