"""Intervals against published values, and the laws of tests and divergences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.intervals import (
    Pairs,
    coarse_kl,
    compare_answers,
    count_pairs,
    mcnemar,
    paired_difference,
    wilson,
)
from tests.builders import LAWS

counts = st.integers(0, 60)
all_pairs = st.builds(Pairs, counts, counts, counts, counts).filter(lambda pairs: sum(pairs) > 0)


# Newcombe 1998, Statistics in Medicine 17, 857, table I, method 3.
@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_as_published(right: int, n: int, low: float, high: float) -> None:
    interval = wilson(right, n)
    assert (interval.value, interval.low, interval.high) == pytest.approx((right / n, low, high), abs=6e-5)


@LAWS
@given(st.integers(1, 400), st.data())
def test_wilson_holds_the_share_stays_in_range_and_mirrors(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    interval, mirror = wilson(right, n), wilson(n - right, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert (mirror.low, mirror.high) == pytest.approx((1 - interval.high, 1 - interval.low))


def test_pairs_count_each_outcome() -> None:
    assert count_pairs([True, True, False, False, True], [True, False, True, False, True]) == (2, 1, 1, 1)
    with pytest.raises(ValueError):
        count_pairs([True], [])


@LAWS
@given(all_pairs)
def test_paired_difference_holds_its_value_and_changes_sign_with_the_order(pairs: Pairs) -> None:
    swapped = Pairs(pairs.both, pairs.second_only, pairs.first_only, pairs.neither)
    forward, backward = paired_difference(pairs), paired_difference(swapped)
    assert forward.value == pytest.approx((pairs.first_only - pairs.second_only) / sum(pairs))
    assert -1 - 1e-9 <= forward.low <= forward.value <= forward.high <= 1 + 1e-9
    assert tuple(backward) == pytest.approx((-forward.value, -forward.high, -forward.low))


def test_paired_interval_covers_the_truth_about_95_times_of_100() -> None:
    rng = np.random.default_rng(7)
    shares = (0.6, 0.2, 0.1, 0.1)
    draws = rng.multinomial(80, shares, size=2000)
    intervals = [paired_difference(Pairs(*map(int, draw))) for draw in draws]
    covered = np.mean([interval.low <= 0.1 <= interval.high for interval in intervals])
    assert 0.93 < covered < 0.975


@pytest.mark.parametrize(
    ("first", "second", "p"), [(1, 9, 22 / 1024), (0, 6, 2 / 64), (0, 5, 2 / 32), (3, 3, 1.0), (0, 0, 1.0)]
)
def test_mcnemar_is_the_exact_binomial_tail(first: int, second: int, p: float) -> None:
    assert mcnemar(Pairs(17, first, second, 4)) == mcnemar(Pairs(0, second, first, 90)) == pytest.approx(p)


def logs(**shares: float) -> dict[str, float]:
    return {token: math.log(share) for token, share in shares.items()}


def test_kl_of_hand_made_distributions() -> None:
    assert coarse_kl(logs(a=0.5, b=0.5), logs(a=0.25, b=0.75)) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    )
    # `a` is in both, `b` only here; there it has at most .3, and .6 are left: the share that `b` has of what is left
    # here, a half, fits.
    expected = 0.8 * math.log(0.8 / 0.4) + 2 * 0.1 * math.log(0.1 / 0.3)
    assert coarse_kl(logs(a=0.8, b=0.1), logs(a=0.4, c=0.3)) == pytest.approx(expected)
    # Here it does not: nothing but `b` is left here, and there `b` has at most .1.
    expected = 0.9 * math.log(0.9 / 0.1) + 0.1 * math.log(0.1 / 0.1)
    assert coarse_kl(logs(b=0.9, a=0.1), logs(c=0.8, a=0.1)) == pytest.approx(expected, abs=1e-6)


@LAWS
@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 12))
def test_coarse_kl_is_never_above_the_true_one_nor_negative(seed: int, vocabulary: int, listed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(vocabulary, 0.7), size=2) + 1e-6

    p, q = p / p.sum(), q / q.sum()

    def top(shares: np.ndarray) -> dict[str, float]:
        best = np.argsort(shares)[::-1][:listed]
        return {str(i): math.log(shares[i]) for i in best}

    true = float(np.sum(p * np.log(p / q)))
    assert 0 <= coarse_kl(top(p), top(q)) <= true + 1e-6
    assert coarse_kl(top(p), top(p)) == pytest.approx(0, abs=1e-6)


def test_answers_are_compared_up_to_the_first_difference() -> None:
    same, other = logs(a=0.9), logs(a=0.3)
    agreement = compare_answers(["a", "b", "c"], [same, same, same], ["a", "x", "c"], [same, other, other])
    assert (agreement.num_positions, agreement.num_same) == (2, 1)
    assert agreement.kl_sum == pytest.approx(coarse_kl(same, other))
    assert compare_answers(["a"], [same], ["a"], [same]) == (1, 1, 0.0)
    assert compare_answers([], [], ["a"], [same]) == (0, 0, 0.0)
