"""Triton twin of `compact_kv`: each program copies a block of rows."""

import torch
import triton
import triton.language as tl

_BLOCK_ELEMENTS = 4096


@triton.jit(do_not_specialize=["num_rows"])
def _copy_kernel(k_rows, v_rows, src_rows, dst_rows, num_rows, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr):
    i, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BD)
    src, dst = tl.load(src_rows + i, mask=i < num_rows, other=-1), tl.load(dst_rows + i, mask=i < num_rows, other=0)
    inside = (src >= 0)[:, None] & (d < D)[None, :]
    src, dst = src[:, None] * D + d[None, :], dst[:, None] * D + d[None, :]
    k, v = tl.load(k_rows + src, mask=inside), tl.load(v_rows + src, mask=inside)
    tl.store(k_rows + dst, k, mask=inside)
    tl.store(v_rows + dst, v, mask=inside)


def compact_kv(k: torch.Tensor, v: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Arguments as the public function's."""
    if len(src) == 0:
        return
    head_dim = k.shape[1]
    width = triton.next_power_of_2(head_dim)
    block = max(1, _BLOCK_ELEMENTS // width)
    _copy_kernel[(triton.cdiv(len(src), block),)](
        k, v, src.contiguous(), dst.contiguous(), len(src), D=head_dim, BD=width, BLOCK=block
    )
