"""Shapes of models: few where a case takes long or is repeated for each instruction set, else all that matter."""

import itertools

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGE_SIZES, GROUP_SIZES, HEAD_DIMS = (8, 16, 32, 64), (1, 2, 3, 4, 5, 6, 7, 8, 16), (64, 80, 96, 128, 256)

# dtype, page size, group size, head size: each value of each of them.
FEW_SHAPES = [
    (torch.float32, 8, 1, 32),
    (torch.bfloat16, 16, 2, 64),
    (torch.float32, 32, 3, 80),
    (torch.float16, 64, 4, 96),
    (torch.bfloat16, 8, 5, 128),
    (torch.float16, 16, 6, 80),
    (torch.bfloat16, 32, 7, 96),
    (torch.float32, 64, 8, 128),
    (torch.bfloat16, 8, 16, 64),
    (torch.bfloat16, 16, 4, 256),
]


def covering_shapes():
    """Shapes in which every pair of values of two of the four properties occurs, compiled in minutes, not hours."""
    for (i, group_size), (j, head_dim) in itertools.product(enumerate(GROUP_SIZES), enumerate(HEAD_DIMS)):
        # i + j takes 12 values in a row, as many as there are pairs of dtype and page size.
        yield DTYPES[(i + j) % len(DTYPES)], PAGE_SIZES[(i + j) % len(PAGE_SIZES)], group_size, head_dim


def _cases():
    for twin in ("cpu scalar", "cpu avx2", "cpu avx512", "triton"):
        yield from (pytest.param(twin, shape) for shape in FEW_SHAPES)
    for twin, marks in (("cpu", ()), ("cuda", pytest.mark.gpu)):
        yield from (pytest.param(twin, shape, marks=marks) for shape in covering_shapes())


each_model_shape = pytest.mark.parametrize(("twin", "shape"), list(_cases()), indirect=["twin"])
