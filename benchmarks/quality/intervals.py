"""Intervals, tests and divergences of right and wrong answers; pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

Z_95 = NormalDist().inv_cdf(0.975)
_LEAST = 1e-9

TopLogprobs = Mapping[str, float]
"""Natural logarithms of the probabilities of the most likely tokens at one position."""


class Interval(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Pairs(NamedTuple):
    """How often both, only the first, only the second, and neither of two servers were right on the same prompts."""

    both: int
    first_only: int
    second_only: int
    neither: int


def wilson(num_right: int, n: int) -> Interval:
    """Return a proportion and its Wilson score interval.

    Parameters
    ----------
    num_right, n : 0 <= num_right <= n, n >= 1.

    Notes
    -----
    Source: Wilson 1927; the form is that of Newcombe 1998, method 3.
    """
    assert 0 <= num_right <= n, f"{num_right} of {n}"
    share = num_right / n
    centre = share + Z_95**2 / (2 * n)
    reach = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    # At the ends the bound is exact; rounding must not put it beyond the value.
    return Interval(
        share, max(0.0, min(share, (centre - reach) / scale)), min(1.0, max(share, (centre + reach) / scale))
    )


def count_pairs(first: Sequence[bool], second: Sequence[bool]) -> Pairs:
    """Count the outcomes of two servers on the same prompts, in the same order."""
    outcomes = list(zip(first, second, strict=True))
    return Pairs(*(outcomes.count(outcome) for outcome in ((True, True), (True, False), (False, True), (False, False))))


def paired_difference(pairs: Pairs) -> Interval:
    """Return the difference of two paired proportions, first minus second, with its interval.

    Notes
    -----
    Source: Newcombe 1998 (Statistics in Medicine 17, 2635), method 10: Wilson intervals joined by phi. Its continuity
    correction of phi is left out.
    """
    n = sum(pairs)
    first = wilson(pairs.both + pairs.first_only, n)
    second = wilson(pairs.both + pairs.second_only, n)
    margins = math.prod(
        (
            pairs.both + pairs.first_only,
            pairs.second_only + pairs.neither,
            pairs.both + pairs.second_only,
            pairs.first_only + pairs.neither,
        )
    )
    covariance = pairs.both * pairs.neither - pairs.first_only * pairs.second_only
    phi = covariance / math.sqrt(margins) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    value = first.value - second.value
    low = value - reach(first.value - first.low, second.high - second.value)
    return Interval(value, low, value + reach(first.high - first.value, second.value - second.low))


def mcnemar(pairs: Pairs) -> float:
    """Return the two-sided exact p value of McNemar's test; 1 when the servers never differ."""
    n = pairs.first_only + pairs.second_only
    tail: int = sum(math.comb(n, i) for i in range(min(pairs.first_only, pairs.second_only) + 1))
    return min(1.0, tail * 2.0 ** (1 - n))


def coarse_kl(reference: TopLogprobs, other: TopLogprobs) -> float:
    """Return the least KL(reference || other), in nats, that fits what both servers reported; at most the true one.

    The sum is over the tokens that both list, one bucket of those that only `reference` lists, and one of all others.
    What `other` gives the first bucket is not known, but each of its tokens has at most the smallest probability that
    `other` lists. Within this limit, the value that makes the divergence smallest is taken.
    """
    shared = reference.keys() & other.keys()
    p = [math.exp(reference[token]) for token in shared]
    q = [math.exp(other[token]) for token in shared]
    missed = reference.keys() - shared
    p_missed = sum(math.exp(reference[token]) for token in missed)
    # Rounded log-probabilities may sum to a little more than 1.
    p_rest = max(0.0, 1.0 - sum(p) - p_missed)
    q_left = max(_LEAST, 1.0 - sum(q))
    bound = len(missed) * math.exp(min(other.values(), default=0.0))
    q_missed = min(bound, q_left * p_missed / (p_missed + p_rest) if p_missed else 0.0)
    p += [p_missed, p_rest]
    q += [max(_LEAST, q_missed), max(_LEAST, q_left - q_missed)]
    return max(0.0, sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


class Agreement(NamedTuple):
    """Two servers' distributions over one answer, compared while both continue the same text.

    Attributes
    ----------
    num_positions : positions with the same tokens before them.
    num_same : positions of these at which both chose the same token.
    kl_sum : sum of coarse_kl over them, nats.
    """

    num_positions: int
    num_same: int
    kl_sum: float


def compare_answers(
    reference_tokens: Sequence[str],
    reference_top: Sequence[TopLogprobs],
    tokens: Sequence[str],
    top: Sequence[TopLogprobs],
) -> Agreement:
    """Compare two greedy answers position by position, up to and including the first at which they differ."""
    num_same = 0
    for ours, theirs in zip(tokens, reference_tokens, strict=False):
        if ours != theirs:
            break
        num_same += 1
    num_positions = min(num_same + 1, len(tokens), len(reference_tokens))
    kl_sum = sum(coarse_kl(reference_top[i], top[i]) for i in range(num_positions))
    return Agreement(num_positions, num_same, kl_sum)
