"""Stand-in for the CPU build of sglang-kernel, which the registry does not have (its wheel needs CUDA).

With SGLANG_USE_CPU_ENGINE=1 SGLang imports some `*_cpu` functions by name and binds some `torch.ops.sgl_kernel.*_cpu`
ops at import. Without AMX, speculative decoding and the Qwen3.5 models none of them is called. Names that do not end
in `_cpu` stay missing on purpose: SGLang tests for features with `hasattr`.
"""

import torch as _torch

__version__ = "0.0.0+cpu.stub"

# Bound, never called, at import of sglang/srt/models/qwen3_5.py.
_BOUND_OPS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)

_library = _torch.library.Library("sgl_kernel", "FRAGMENT")
for _op in _BOUND_OPS:
    _library.define(f"{_op}(Tensor x) -> Tensor")


def __getattr__(name):
    if not name.endswith("_cpu"):
        raise AttributeError(f"sgl_kernel (CPU stub) has no {name}")

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is a stub: the CPU engine should never call it")

    missing.__name__ = name
    return missing
