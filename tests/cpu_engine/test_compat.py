import importlib.metadata

import pytest

if "+cpu" not in importlib.metadata.version("torch"):
    pytest.skip("the shims are for a CPU-only torch", allow_module_level=True)

import sgl_kernel


def test_sgl_kernel_has_no_feature_but_the_cpu_functions():
    assert not hasattr(sgl_kernel, "rmsnorm")
    with pytest.raises(NotImplementedError, match="sgl_kernel.rmsnorm_cpu is a stub"):
        sgl_kernel.rmsnorm_cpu()
