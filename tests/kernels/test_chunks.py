"""Summaries of chunks, their scores, which are forced and which are the best, by the reference and for themselves."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridkv_kernels.chunks import (
    ESTIMATING_SCORES,
    SUMMARY_SCORES,
    Retrieval,
    summarize_chunks,
    summary_vectors,
    top_chunks,
)
from hybridkv_kernels.host_pages import HostPages
from hybridkv_kernels.retrieve_chunks.naive import fetch_chunks, score_chunks
from tests.builders import LAWS, fresh_generator
from tests.kernels.plain import plain_forced


@st.composite
def buffers(draw):
    """Keys [E, C, T, D] and queries [E, G, D]."""
    heads, chunks, group = draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 4, 7, 8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    keys = torch.randn(heads, chunks, 8, 16, generator=generator)
    return keys, torch.randn(heads, group, 16, generator=generator)


@LAWS
@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 9))
def test_forced_chunks_leave_one_place_to_the_score(num_chunks, counts, num_sinks, num_recent):
    counts = [min(count, num_chunks) for count in counts]
    forced = Retrieval(num_sinks, num_recent, "mean_max", 8).forced_chunks(num_chunks, torch.tensor(counts))
    for row, count in zip(forced, counts, strict=True):
        # Windows larger than the prompt overlap; nothing is counted twice then.
        if num_sinks + num_recent <= num_chunks:
            assert set(row.nonzero().flatten().tolist()) == plain_forced(num_chunks, count, num_sinks, num_recent)
        assert int(row.sum()) <= max(count - 1, 1)


@LAWS
@given(buffers())
def test_quest_bounds_every_key_of_a_chunk(buffer):
    keys, _q = buffer
    summaries = summarize_chunks(keys, "quest")
    low, high = summaries.unbind(2)
    assert (low[:, :, None] <= keys).all()
    assert (high[:, :, None] >= keys).all()


@LAWS
@given(buffers(), st.sampled_from(["mean_max", "mean_mean", "mean2_max", "mean4_max"]))
def test_means_are_the_means_of_the_parts_in_their_order(buffer, chunk_score):
    keys, vectors = buffer[0], summary_vectors(chunk_score)
    summaries = summarize_chunks(keys, chunk_score)
    assert summaries.shape[2] == vectors
    for part, start in enumerate(range(0, 8, 8 // vectors)):
        torch.testing.assert_close(summaries[:, :, part], keys[:, :, start : start + 8 // vectors].mean(2))
    torch.testing.assert_close(summaries.mean(2), summarize_chunks(keys, "mean_max")[:, :, 0])


@LAWS
@given(buffers(), st.sampled_from(ESTIMATING_SCORES))
def test_mean_values_follow_the_keys_and_are_of_the_same_parts(buffer, chunk_score):
    keys, vectors = buffer[0], summary_vectors(chunk_score)
    values = keys.flip(0, 1, 2, 3) * 3 + 1
    summaries = summarize_chunks(keys, chunk_score, values)
    assert summaries.shape[2] == Retrieval(0, 0, chunk_score, 8, True).stored_vectors == 2 * vectors
    assert torch.equal(summaries[:, :, :vectors], summarize_chunks(keys, chunk_score))
    for part, start in enumerate(range(0, 8, 8 // vectors)):
        expected = values[:, :, start : start + 8 // vectors].mean(2)
        torch.testing.assert_close(summaries[:, :, vectors + part], expected)


@LAWS
@given(buffers())
def test_finer_scores_lie_between_the_mean_and_the_best_key(buffer):
    keys, q = buffer
    scores = [score_chunks(q, summarize_chunks(keys, name), name) for name in ("mean_max", "mean2_max", "mean4_max")]
    scores.append((q[:, None] @ keys.transpose(2, 3)).flatten(2).amax(2))
    for coarse, fine in itertools.pairwise(scores):
        assert (coarse <= fine + 1e-4).all()


@pytest.mark.parametrize("page_size", [8, 16, 32, 64])
def test_a_needle_alone_among_zero_keys_scores_higher_the_finer_the_parts(page_size):
    generator = fresh_generator()
    needle = torch.randn(16, generator=generator)
    keys = torch.zeros(1, 5, page_size, 16)
    keys[0, 3, int(torch.randint(page_size, (1,), generator=generator))] = needle
    q = needle.expand(1, 2, 16)
    coarse, half, quarter = (
        score_chunks(q, summarize_chunks(keys, name), name)[0, 3] for name in ("mean_max", "mean2_max", "mean4_max")
    )
    assert coarse > 0
    torch.testing.assert_close(half, 2 * coarse)
    torch.testing.assert_close(quarter, 4 * coarse)


def test_a_needle_that_its_neighbours_cancel_is_found_by_the_finer_score():
    """QUALITY, lesson 2: one mean of a chunk whose tokens have nothing in common hides each of them."""
    needle = torch.zeros(16)
    needle[0] = 4.0
    keys = torch.full((1, 10, 16, 16), 0.01)
    keys[0, 6, 5], keys[0, 6, 12] = needle, -needle
    for chunk_score, expected in (("mean_max", 0), ("mean2_max", 6), ("mean4_max", 6)):
        scores = score_chunks(needle.expand(1, 1, 16), summarize_chunks(keys, chunk_score), chunk_score)
        assert top_chunks(scores, torch.tensor([1]))[0].nonzero().flatten().tolist() == [expected], chunk_score


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_score", SUMMARY_SCORES)
def test_summaries_keep_the_dtype(dtype, chunk_score):
    """fp16 chunks whose sum overflows must still have a finite mean."""
    keys = torch.full((1, 2, 64, 8), 3000.0, dtype=dtype)
    summaries = summarize_chunks(keys, chunk_score)
    assert summaries.dtype == dtype
    expected = keys[:, :, : summaries.shape[2]].clone()
    if chunk_score == "mean_spread":
        expected[..., 0] = 0.0  # all keys are the mean
    torch.testing.assert_close(summaries, expected)


@LAWS
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=20), st.data())
def test_ties_go_to_the_earlier_chunk(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    chosen = top_chunks(torch.tensor([scores]), torch.tensor([count]))[0].nonzero().flatten().tolist()
    assert chosen == sorted(sorted(range(len(scores)), key=lambda c: (-scores[c], c))[:count])


def test_ties_go_to_the_earlier_chunk_in_long_rows_too():
    """Short rows are sorted stably by chance."""
    chosen = top_chunks(torch.zeros(2, 5000), torch.tensor([700, 1]))
    assert chosen[0, :700].all()
    assert chosen.sum(1).tolist() == [700, 1]
    assert chosen[1, 0]


@pytest.mark.parametrize("kernels", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 300])
@pytest.mark.parametrize("values", [2, 9, 2**40])
def test_top_images_over_tiles_equals_a_stable_sort(kernels, monkeypatch, values, length, dtype):
    """Few different values make many ties; the images' bits are unsigned, so half of them look negative."""
    from hybridkv_kernels.gpu import top

    monkeypatch.setattr(top, "top_block", lambda num_columns: 32)
    most = min(values, 2**31 - 1 if dtype == torch.int32 else values)
    numbers = torch.randint(0, most, (2, length), generator=fresh_generator())
    order = numbers.double()
    sign = torch.iinfo(dtype).min
    images = torch.where(numbers % 2 == 0, numbers, numbers + sign).to(dtype)  # odd numbers get the highest bit
    order += torch.where(numbers % 2 == 0, 0.0, 2.0**50)
    for counts in ([1, length // 2 + 1], [length, length - 1]):
        counts = torch.tensor(counts, dtype=torch.int32).clamp(min=1, max=max(length, 1))
        got = top.top_images(images, counts)
        assert got.dtype == torch.bool
        assert torch.equal(got, top_chunks(order, counts))


def test_a_selection_of_another_size_than_its_buffer_is_an_error():
    rows, places = torch.zeros(3, 4, 8), torch.tensor([[0, 1]])
    host = HostPages.empty(3, 4, 8, torch.float32, "same", "cpu")
    held, selected = torch.tensor([0, 1, 2], dtype=torch.int32), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(AssertionError, match="as many places as its head selects"):
        fetch_chunks(selected, places, torch.tensor([2]), held, rows, rows, torch.tensor([[0, 1, 2]]), host)


@pytest.mark.parametrize(
    ("retrieval", "name"),
    [
        (Retrieval(1, 1, "best", 8), "chunk_score"),
        (Retrieval(1, 1, "key_codes", 8, estimate=True), "chunk_score"),
        (Retrieval(1, 1, "mean_max", 3), "chunk_size"),
        (Retrieval(1, 1, "mean_max", 0), "chunk_size"),
        (Retrieval(1, 1, "mean_max", 4, estimate=True), "chunk_size"),
        (Retrieval(1, 1, "mean_max", 1), "chunk_size"),
        (Retrieval(1, 1, "quest", 2), "chunk_size"),
        (Retrieval(1, 1, "quest", 8, hysteresis=0.5), "hysteresis"),
        (Retrieval(1, 1, "key_codes", 1, hysteresis=float("nan")), "hysteresis"),
    ],
)
def test_a_retrieval_that_cannot_be_is_named(retrieval, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        retrieval.check(8)


@pytest.mark.parametrize(
    ("k", "chunk_score", "name"),
    [
        (torch.zeros(2, 5, 8), "mean_max", "k"),
        (torch.zeros(2, 5, 8, 4, dtype=torch.int8), "mean_max", "k"),
        (torch.zeros(2, 5, 8, 4), "worst", "chunk_score"),
        (torch.zeros(2, 5, 8, 4), "mean3_max", "chunk_score"),
        (torch.zeros(2, 5, 6, 4), "mean4_max", "k"),
        (torch.zeros(2, 5, 7, 4), "mean2_max", "k"),
    ],
)
def test_bad_chunks_are_named(k, chunk_score, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        summarize_chunks(k, chunk_score)


@pytest.mark.parametrize(
    "change", [lambda v: v[:, 0], lambda v: v[:, :, :4], torch.Tensor.half, lambda v: v.to("meta")]
)
def test_values_unlike_the_keys_are_named(change):
    k = torch.zeros(2, 5, 8, 4)
    with pytest.raises(ValueError, match=r"^v: expected .*, got "):
        summarize_chunks(k, "mean_max", change(k))
