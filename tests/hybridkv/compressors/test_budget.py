import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_hybridkv.compressors.budget import apportion, head_weights, share_by_ratio
from tests.builders import LAWS

shares = st.floats(0.0, 1.0)
weightings = st.sampled_from(["sparsity", "density", "uniform"])
# Exact 0 and 1 are frequent in practice: a head with one hot token, a head that is quite uniform.
statistics = st.lists(st.floats(0.0, 1.0, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=24)


@st.composite
def heads(draw):
    """Statistic, types, and weights of one prompt's heads; all of one type is frequent."""
    statistic = torch.tensor(draw(statistics))
    theta = draw(st.sampled_from([0.0, 0.5, 0.9, 1.01]))
    is_dynamic = statistic < theta
    weights = head_weights(statistic, is_dynamic, draw(shares), draw(weightings))
    return statistic, is_dynamic, weights


@st.composite
def races(draw):
    """Weights and legal floor, cap and total."""
    _, is_dynamic, weights = draw(heads())
    floor = draw(st.integers(0, 4))
    cap = draw(st.integers(floor, floor + 40))
    least, most = len(weights) * floor, len(weights) * cap
    total = draw(st.integers(least, most) | st.sampled_from([least, most]))
    return is_dynamic, weights, total, floor, cap


@LAWS
@given(races())
def test_sum_is_the_budget_and_every_head_lies_between_floor_and_cap(race):
    _, weights, total, floor, cap = race
    seats = apportion(weights, total, floor, cap)
    assert seats.dtype == torch.int64
    assert int(seats.sum()) == total
    assert int(seats.min()) >= floor
    assert int(seats.max()) <= cap


@LAWS
@given(races(), st.data())
def test_a_larger_budget_takes_no_page_from_any_head(race, data):
    _, weights, total, floor, cap = race
    more = data.draw(st.integers(total, len(weights) * cap))
    assert (apportion(weights, more, floor, cap) >= apportion(weights, total, floor, cap)).all()


@LAWS
@given(races())
def test_heads_of_equal_weight_differ_by_at_most_one_page(race):
    is_dynamic, weights, total, floor, cap = race
    seats = apportion(weights, total, floor, cap)
    for weight in weights.unique():
        mine = seats[weights == weight]
        assert int(mine.max() - mine.min()) <= 1
    if is_dynamic.any():
        mine = seats[is_dynamic]
        assert int(mine.max() - mine.min()) <= 1, "dynamic heads share uniformly"


@LAWS
@given(races())
def test_a_heavier_head_never_gets_less(race):
    _, weights, total, floor, cap = race
    seats = apportion(weights, total, floor, cap)
    order = weights.argsort(stable=True)
    for lighter, heavier in itertools.pairwise(order):
        assert weights[lighter] == weights[heavier] or seats[lighter] <= seats[heavier]


@LAWS
@given(races())
def test_each_head_gets_its_quota_unless_a_bound_binds(race):
    """Webster against plain arithmetic: when no floor or cap binds, a head is within 1 page of its share, E large."""
    _, weights, total, _, _ = race
    cap = total  # never binds
    assume(total > 0)
    seats = apportion(weights, total, 0, cap)
    # The definition, seat by seat.
    plain = [0] * len(weights)
    for _ in range(total):
        quotients = [float(w) / (2 * s + 1) for w, s in zip(weights, plain, strict=True)]
        best = max(range(len(plain)), key=lambda i: (quotients[i], -plain[i], -i))
        plain[best] += 1
    assert seats.tolist() == plain


@LAWS
@given(heads())
def test_weights_are_positive_so_that_no_seat_is_left_over(case):
    assert (case[2] > 0).all()


@LAWS
@given(
    st.lists(st.floats(0.05, 0.95), min_size=4, max_size=16),
    st.integers(1, 15),
    st.floats(0.2, 0.5),
    weightings,
)
def test_level_one_splits_by_the_dynamic_share(values, num_dynamic, share, weighting):
    """When neither floor nor cap binds, dynamic heads hold r of the budget, up to half a page a head."""
    num_dynamic = min(num_dynamic, len(values) - 1)
    is_dynamic = torch.arange(len(values)) < num_dynamic
    weights = head_weights(torch.tensor(values), is_dynamic, share, weighting)
    total = 400 * len(values)
    seats = apportion(weights, total, 0, total)
    assert abs(int(seats[is_dynamic].sum()) / total - share) <= len(values) / total


@LAWS
@given(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=16), st.integers(0, 16), st.floats(0.25, 8.0), weightings)
def test_a_ratio_holds_however_many_heads_are_dynamic(values, num_dynamic, ratio, weighting):
    is_dynamic = torch.arange(len(values)) < num_dynamic
    share = share_by_ratio(is_dynamic, ratio)
    weights = head_weights(torch.tensor(values), is_dynamic, share, weighting)
    if 0 < num_dynamic < len(values):
        assert weights[is_dynamic].mean() / weights[~is_dynamic].mean() == pytest.approx(ratio, rel=1e-3)
    else:
        assert share == (num_dynamic > 0)


@LAWS
@given(st.lists(st.floats(0.05, 0.95), min_size=2, max_size=16), weightings)
def test_level_two_weighs_static_heads_by_their_statistic(values, weighting):
    statistic = torch.tensor(values, dtype=torch.float64)
    weights = head_weights(statistic, torch.zeros(len(values), dtype=torch.bool), 0.3, weighting)
    expected = {"sparsity": statistic, "density": 1 - statistic, "uniform": torch.ones_like(statistic)}[weighting]
    torch.testing.assert_close(weights / weights.sum(), expected / expected.sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.32, 1.0])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_only_type_there_is_takes_the_whole_budget(share, dynamic):
    is_dynamic = torch.full((6,), dynamic)
    weights = head_weights(torch.full((6,), 0.5), is_dynamic, share, "sparsity")
    assert apportion(weights, 60, 2, 30).tolist() == [10] * 6


@pytest.mark.parametrize(("share", "starved"), [(0.0, True), (1.0, False)])
def test_a_type_without_share_keeps_its_floor_and_takes_only_what_is_left(share, starved):
    is_dynamic = torch.tensor([True, True, False, False])
    weights = head_weights(torch.full((4,), 0.5), is_dynamic, share, "sparsity")
    seats = apportion(weights, 20, 2, 30)
    assert seats[is_dynamic == starved].tolist() == [2, 2]
    seats = apportion(weights, 2 * 30 + 2 * 7, 2, 30)
    assert seats[is_dynamic == starved].tolist() == [7, 7], "the full heads leave the rest to the others"


@pytest.mark.parametrize("total", [-1, 5, 31])
def test_a_total_no_split_can_meet_is_refused(total):
    with pytest.raises(ValueError, match=rf"total: expected 6\.\.30 seats, got {total}"):
        apportion(torch.ones(3, dtype=torch.float64), total, 2, 10)
