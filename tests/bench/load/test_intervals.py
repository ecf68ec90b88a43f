"""Intervals: exact values, agreement with scipy, and coverage over seeded runs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.load.analysis.intervals import (
    correlation_time,
    min_samples,
    percentile,
    percentile_interval,
    percentile_ranks,
    share_of,
    wilson,
)


@pytest.mark.parametrize(
    ("q", "least"), [(0.5, 5), (0.9, 29), (0.95, 59), (0.99, 299), (0.999, 2995)]
)
def test_a_percentile_needs_its_sample(q: float, least: int) -> None:
    assert min_samples(q) == least
    assert q**least <= 0.05 < q ** (least - 1)


@given(st.integers(0, 400), st.integers(1, 400))
def test_wilson_agrees_with_scipy(met: int, num: int) -> None:
    met = min(met, num)
    expected = stats.binomtest(met, num).proportion_ci(0.95, method="wilson")
    assert wilson(met, num) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert str(share_of([])) == "no requests"


@pytest.mark.parametrize(
    ("num", "low", "high"),
    [(300, 293, None), (1000, 983, 997), (3000, 2959, 2981), (10_000, 9880, 9920)],
)
def test_the_ranks_around_p99(num: int, low: int, high: int | None) -> None:
    assert percentile_ranks(0.99, num) == (low, high)


@given(st.integers(1, 3000), st.sampled_from([0.5, 0.9, 0.99, 0.999]))
def test_the_ranks_leave_out_what_they_may_and_no_more(num: int, q: float) -> None:
    low, high = percentile_ranks(q, num)
    if low is not None:
        assert (
            stats.binom.cdf(low - 1, num, q) <= 0.025 + 1e-9 < stats.binom.cdf(low, num, q) + 2e-9
        )
    if high is not None:
        assert stats.binom.sf(high - 1, num, q) <= 0.025 + 1e-9
        assert stats.binom.sf(high - 2, num, q) > 0.025 - 1e-9


@given(st.lists(st.floats(-1e9, 1e9), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_a_value_that_was_seen(values: list[float], q: float) -> None:
    ordered = sorted(values)
    found = percentile(ordered, q)
    assert sum(value <= found for value in values) >= q * len(values) - 1e-9
    assert sum(value < found for value in values) < q * len(values) + 1e-9


def test_percentile_interval_of_one_to_a_thousand() -> None:
    values = np.random.default_rng(5).permutation(1000) + 1.0
    low, high = percentile_interval(list(values), 0.99)
    assert 976 <= low <= 983  # the ranks of a thousand independent ones, or a little outside
    assert 997 <= high <= 1000
    assert percentile_interval(list(values[:20]), 0.99)[1] == math.inf
    assert percentile_interval([], 0.5) == (-math.inf, math.inf)


def test_repeated_values_count_once() -> None:
    draws = np.random.default_rng(1).random(4000)
    assert 1.0 <= correlation_time(draws) < 1.2
    assert 9.0 < correlation_time(np.repeat(draws[:400], 10)) < 14.0
    assert correlation_time(np.ones(100)) == 1.0


def _waits(seed: int, num: int, load: float) -> list[float]:
    """Waits in a queue with one server (Lindley): the longer the queue, the stronger their tie."""
    random = np.random.default_rng(seed)
    wait, waits = 0.0, []
    for service, gap in zip(
        random.exponential(load, num), random.exponential(1.0, num), strict=True
    ):
        waits.append(wait)
        wait = max(0.0, wait + service - gap)
    return waits


@pytest.mark.parametrize("load", [0.0, 0.5, 0.7])
def test_attainment_covers_the_truth(load: float) -> None:
    """93 of 100 seeded runs at least, also when requests queue behind one another."""
    limit = 1.0
    # M/M/1: P(wait > t) = load * exp(-(1 - load) * t / load); without load, a coin
    truth = 0.9 if load == 0 else 1 - load * math.exp(-(1 - load) * limit / load)
    covered = 0
    for seed in range(100):
        if load == 0:
            hits = list(np.random.default_rng(seed).random(1000) < truth)
        else:
            hits = [wait <= limit for wait in _waits(seed, 2500, load)[500:]]
        share = share_of(hits)
        covered += share.low <= truth <= share.high
    assert covered >= 93


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_percentile_intervals_cover_the_truth(q: float) -> None:
    truth = -math.log(1 - q)
    covered = 0
    for seed in range(100):
        values = list(np.random.default_rng(seed).exponential(1.0, 1500))
        low, high = percentile_interval(values, q)
        covered += low <= truth <= high
    assert covered >= 93
