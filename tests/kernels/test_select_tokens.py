import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hybridkv_kernels.select_tokens as op
from hybridkv_kernels import gpu
from hybridkv_kernels.select_tokens import naive
from tests.builders import LAWS, fresh_generator


def select_tokens(*args, **options):
    """As it is; other tests have the reference in place of what Triton's interpreter takes long for."""
    with mock.patch.dict(op._IMPLEMENTATIONS, triton=gpu.twin("select_tokens")):
        return op.select_tokens(*args, **options)


NUMBERS = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 2e-6, math.inf, -math.inf, math.nan]


def first_tokens(score, count, tier, num_first, num_last):
    """The definition in Python, of one entry; Python's sort is stable."""
    num_tokens = len(score)

    def rank(token):
        is_forced = token < num_first or token >= num_tokens - num_last
        number = score[token]
        return -is_forced, -tier[token], not math.isnan(number), 0.0 if math.isnan(number) else -number

    return sorted(sorted(range(num_tokens), key=rank)[: max(count, 0)])


@st.composite
def entries(draw):
    """Scores [2, N] with ties, numbers of all kinds, tiers or none, and counts, also more than there are tokens."""
    num_tokens = draw(st.integers(1, 40))
    numbers = st.lists(st.sampled_from(NUMBERS), min_size=num_tokens, max_size=num_tokens)
    tiers = st.lists(st.sampled_from([0, 1, 255]), min_size=num_tokens, max_size=num_tokens)
    tier = draw(st.one_of(st.none(), tiers, st.tuples(tiers, tiers)))
    counts = draw(st.tuples(st.integers(-1, 42), st.integers(-1, 42)))
    return [draw(numbers), draw(numbers)], counts, tier, draw(st.integers(0, 5)), draw(st.integers(0, 45))


@pytest.mark.usefixtures("kernels")
@LAWS
@given(entries())
def test_equals_the_definition(entry):
    scores, counts, tier, num_first, num_last = entry
    tiers = None if tier is None else torch.tensor(tier, dtype=torch.uint8)
    got = select_tokens(torch.tensor(scores), torch.tensor(counts), tiers, num_first=num_first, num_last=num_last)
    assert got.dtype == torch.bool
    each = [tier, tier] if isinstance(tier, list) else tier or [[0] * len(scores[0])] * 2
    for e in range(2):
        expected = first_tokens(scores[e], counts[e], each[e], num_first, num_last)
        assert got[e].nonzero().flatten().tolist() == expected


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("num_values", [3, 2**20])
def test_long_entries_equal_the_reference(num_values, threads):
    """Over many tiles, with few values, so that most are ties, and with many."""
    generator = fresh_generator()
    score = torch.randint(0, num_values, (3, 2500), generator=generator) * 1e-6
    tier = torch.rand(2500, generator=generator) < 0.1
    counts = torch.tensor([1, 700, 2499])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = select_tokens(score, counts, tier, num_first=4, num_last=8)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, naive.select_tokens(score, counts, tier, 4, 8))
    assert torch.equal(got.sum(1), counts)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_to_select_from(shape):
    got = select_tokens(torch.empty(shape), torch.ones(shape[0], dtype=torch.int64))
    assert got.shape == shape


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("score", torch.zeros(5)),
        ("score", torch.zeros(2, 5, dtype=torch.float64)),
        ("num_selected", torch.zeros(3, dtype=torch.int64)),
        ("num_selected", torch.zeros(2, dtype=torch.int32)),
        ("tier", torch.zeros(4, dtype=torch.uint8)),
        ("tier", torch.zeros(1, 5, dtype=torch.uint8)),
        ("tier", torch.zeros(5, dtype=torch.int64)),
        ("num_first", -1),
        ("num_last", -1),
    ],
)
def test_bad_arguments_are_named(name, bad):
    good = {"score": torch.zeros(2, 5), "num_selected": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        select_tokens(**good | {name: bad})
