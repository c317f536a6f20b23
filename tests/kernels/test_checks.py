import itertools

import pytest
import torch

from hybridkv_kernels import checks
from tests.kernels import shapes


@pytest.mark.parametrize(
    ("expected", "shown"), [((2, 4), r"\[2, 4\]"), ((None, 4), r"\[\*, 4\]"), ((2, 3, None), r"\[2, 3, \*\]")]
)
def test_shape(expected, shown):
    with pytest.raises(ValueError, match=rf"^x: expected shape {shown}, got \[2, 3\]$"):
        checks.check_shape("x", torch.empty(2, 3), expected)


@pytest.mark.parametrize("expected", [(2, 3), (None, 3), (None, None)])
def test_shape_that_fits(expected):
    checks.check_shape("x", torch.empty(2, 3), expected)


def test_dtype():
    checks.check_dtype("x", torch.empty(1, dtype=torch.bfloat16), checks.FLOATS)
    with pytest.raises(ValueError, match=r"^x: expected dtype float32 \| bfloat16 \| float16, got int64$"):
        checks.check_dtype("x", torch.empty(1, dtype=torch.int64), checks.FLOATS)


def test_contiguous():
    checks.check_contiguous("x", torch.empty(2, 3))
    with pytest.raises(ValueError, match=r"^x: expected a contiguous tensor, got strides \(1, 3\)$"):
        checks.check_contiguous("x", torch.empty(2, 3).t())


@pytest.mark.parametrize("other", [torch.empty(1, dtype=torch.float16), torch.empty(1, device="meta")])
def test_same(other):
    checks.check_same("x", torch.empty(3), "y", torch.empty(1))
    with pytest.raises(ValueError, match=r"^x: expected .* like y, got torch.float32 on cpu$"):
        checks.check_same("x", torch.empty(3), "y", other)


def test_the_covering_shapes_have_every_pair_of_values():
    values = (shapes.DTYPES, shapes.PAGE_SIZES, shapes.GROUP_SIZES, shapes.HEAD_DIMS)
    for one, other in itertools.combinations(range(4), 2):
        seen = {(shape[one], shape[other]) for shape in shapes.covering_shapes()}
        assert seen == set(itertools.product(values[one], values[other]))
