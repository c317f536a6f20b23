import pytest
import torch

pytest.importorskip("triton")

from hybridkv_kernels.compact_kv import compact_kv
from tests.builders import fresh_generator

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 90])
@pytest.mark.parametrize("head_dim", [1, 3, 64, 80, 96, 128])
def test_moves_the_rows_and_nothing_else(head_dim, count, dtype):
    generator = fresh_generator()
    k, v = (torch.randn(200, head_dim, generator=generator).to(dtype) for _ in range(2))
    order = torch.randperm(200, generator=generator)
    src, dst = order[:count], order[200 - count :]
    k[dst], v[dst] = float("nan"), float("nan")
    k[order[count : 200 - count]] = float("nan")  # foreign rows
    expected = k.clone(), v.clone()
    for rows in expected:
        rows[dst] = rows[src]
    compact_kv(k, v, src, dst)
    for got, wanted in zip((k, v), expected, strict=True):
        assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert torch.isfinite(got[dst]).all()


def test_row_numbers_may_be_strided_and_sources_repeated():
    k, v, rows = torch.arange(8.0).view(8, 1), -torch.arange(8.0).view(8, 1), torch.tensor([[0, 4], [0, 5]])
    compact_kv(k, v, rows[:, 0], rows[:, 1])
    assert k.flatten().tolist() == [0, 1, 2, 3, 0, 0, 6, 7]
    assert v.flatten().tolist() == [0, -1, -2, -3, 0, 0, -6, -7]
