"""C++ twin of `compact_kv`: rows are copied as bytes, shared out over threads."""

from __future__ import annotations

import ctypes

import torch

from hybridkv_kernels import cpu


class CompactArgs(ctypes.Structure):
    """Mirror of CompactArgs in cpu/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "src", "dst")),
        *((name, ctypes.c_int64) for name in ("num_rows", "k_row_bytes", "v_row_bytes")),
        ("num_threads", ctypes.c_int32),
    ]


def compact_kv(k: torch.Tensor, v: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Arguments as the public function's."""
    src, dst = src.contiguous(), dst.contiguous()
    arguments = CompactArgs(
        k.data_ptr(),
        v.data_ptr(),
        src.data_ptr(),
        dst.data_ptr(),
        len(src),
        k.shape[1] * k.itemsize,
        v.shape[1] * v.itemsize,
        torch.get_num_threads(),
    )
    cpu.call("hk_compact", arguments)
