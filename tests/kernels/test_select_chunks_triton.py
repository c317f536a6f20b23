import pytest
import torch

pytest.importorskip("triton")

from hybridkv_kernels.select_chunks import SUMMARY_SCORES, naive, select_chunks, summary_vectors, top_chunks
from hybridkv_kernels.select_chunks import triton as twin
from tests.builders import fresh_generator

pytestmark = pytest.mark.usefixtures("triton_kernels")


@pytest.mark.parametrize("chunk_score", SUMMARY_SCORES)
@pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "num_chunks"),
    [
        (torch.float32, 7, 80, 33),
        (torch.bfloat16, 1, 128, 31),
        (torch.float16, 16, 96, 70),
        (torch.bfloat16, 4, 64, 1),
        (torch.float32, 2, 64, 16),
    ],
)
def test_equals_naive(dtype, group, head_dim, num_chunks, chunk_score):
    generator = fresh_generator()
    q = torch.randn(3, group, head_dim, generator=generator).to(dtype)
    shape = (3, num_chunks, summary_vectors(chunk_score), head_dim)
    summaries = torch.randn(shape, generator=generator).to(dtype)
    if chunk_score in ("quest", "arkvale"):
        summaries = summaries.sort(dim=2).values
    counts = torch.randint(1, num_chunks + 1, (3,), generator=generator)
    windows = {"num_sink_chunks": 2, "num_recent_chunks": 3}
    for queries in (q, torch.zeros_like(q)):
        got = select_chunks(queries, summaries, counts, **windows, chunk_score=chunk_score)
        plain, score = naive.as_plain_score(queries, chunk_score)  # in the type of the queries
        scores = naive.score_chunks(plain.float(), summaries.float(), score)
        forced = naive.forced_chunks(num_chunks, counts, 2, 3)
        scores = scores.masked_fill(forced, float("inf"))
        assert got.sum(1).tolist() == counts.tolist()
        assert (got | ~forced).all()
        least = scores.masked_fill(~got, float("inf")).amin(1)
        most = scores.masked_fill(got, -float("inf")).amax(1)
        assert (least >= most - 1e-5 * scores.masked_fill(forced, 0.0).abs().amax()).all(), (
            "no better chunk is left out"
        )
    assert torch.equal(got, naive.select_chunks(queries, summaries, counts, 2, 3, chunk_score)), "ties: the earlier one"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 300])
@pytest.mark.parametrize("values", [2, 9, 2**40])
def test_top_images_over_tiles_equals_a_stable_sort(monkeypatch, values, length, dtype):
    """Few different values make many ties; the images' bits are unsigned, so half of them look negative."""
    monkeypatch.setattr(twin, "select_block", lambda num_chunks: 32)
    generator = fresh_generator()
    numbers = torch.randint(
        0, min(values, 2**31 - 1 if dtype == torch.int32 else values), (4, length), generator=generator
    )
    order = numbers.double()
    sign = torch.iinfo(dtype).min
    images = torch.where(numbers % 2 == 0, numbers, numbers + sign).to(dtype)  # odd numbers get the highest bit
    order += torch.where(numbers % 2 == 0, 0.0, 2.0**50)
    counts = torch.tensor([1, length // 2 + 1, length, max(length - 1, 1)], dtype=torch.int32).clamp(max=max(length, 1))
    got = twin.top_images(images, counts)
    assert got.dtype == torch.bool
    assert torch.equal(got, top_chunks(order, counts))
