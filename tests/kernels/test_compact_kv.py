import pytest
import torch

from hybridkv_kernels.compact_kv import compact_kv
from tests.builders import NAN, fresh_generator


def check_moves(num_rows, head_dim, count, dtype):
    """Rows that are neither read nor written are NaN, as are the targets before."""
    generator = fresh_generator()
    k, v = (torch.randn(num_rows, head_dim, generator=generator).to(dtype) for _ in range(2))
    order = torch.randperm(num_rows, generator=generator)
    src, dst = order[:count], order[num_rows - count :]
    for rows in (k, v):
        rows[order[count:]] = NAN
    expected = k.clone(), v.clone()
    for rows in expected:
        rows[dst] = rows[src]
    compact_kv(k, v, src, dst)
    for got, wanted in zip((k, v), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.isfinite(got[dst]).all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 90])
@pytest.mark.parametrize("head_dim", [1, 3, 64, 80, 96, 128])
def test_moves_the_rows_and_nothing_else(head_dim, count, dtype):
    check_moves(200, head_dim, count, dtype)


@pytest.mark.usefixtures("kernels")
def test_row_numbers_may_be_strided_and_sources_repeated():
    k, v, rows = torch.arange(8.0).view(8, 1), -torch.arange(8.0).view(8, 1), torch.tensor([[0, 4], [0, 5]])
    compact_kv(k, v, rows[:, 0], rows[:, 1])
    assert k.flatten().tolist() == [0, 1, 2, 3, 0, 0, 6, 7]
    assert v.flatten().tolist() == [0, -1, -2, -3, 0, 0, -6, -7]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("count", [1, 40, 90])
def test_a_negative_source_leaves_its_target_alone(count):
    """Whatever its target is: the last row, too, which a negative number would mean to torch."""
    generator = fresh_generator()
    k, v = (torch.randn(200, 16, generator=generator) for _ in range(2))
    order = torch.randperm(200, generator=generator)
    src, dst = order[:count], order[200 - count :].clone()
    is_unused = torch.rand(count, generator=generator) < 0.5
    is_unused[0] = True
    dst[0] = -1
    expected = k.clone(), v.clone()
    for rows in expected:
        rows[dst[~is_unused]] = rows[src[~is_unused]]
    compact_kv(k, v, src.where(~is_unused, -1), dst)
    assert torch.equal(k, expected[0])
    assert torch.equal(v, expected[1])


@pytest.mark.usefixtures("fast_kernels")
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [1, 3, 80, 128])
def test_many_rows_shared_out_over_threads(head_dim, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_moves(4000, head_dim, 1900, torch.bfloat16)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("k", torch.empty(8)),
        ("k", torch.empty(4, 8, dtype=torch.int32)),
        ("k", torch.empty(8, 4).t()),
        ("v", torch.empty(5, 8)),
        ("v", torch.empty(4, 16)),
        ("v", torch.empty(4, 8, dtype=torch.bfloat16)),
        ("v", torch.empty(4, 8, dtype=torch.float64)),
        ("v", torch.empty(8, 4).t()),
        ("src", torch.zeros(2, dtype=torch.int32)),
        ("src", torch.zeros(2, 1, dtype=torch.int64)),
        ("src", torch.zeros(2, dtype=torch.int64, device="meta")),
        ("dst", torch.zeros(3, dtype=torch.int64)),
        ("dst", torch.zeros(2, dtype=torch.int16)),
        ("dst", torch.zeros(2, dtype=torch.int64, device="meta")),
    ],
)
def test_bad_arguments_are_named(name, bad):
    arguments = {
        "k": torch.zeros(4, 8),
        "v": torch.zeros(4, 8),
        "src": torch.tensor([0, 1]),
        "dst": torch.tensor([2, 3]),
    }
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        compact_kv(**arguments | {name: bad})
