"""Intervals without a distribution: what they promise, and that they are the library's."""

from __future__ import annotations

import numpy as np
import pytest
from kvbench.analysis import intervals


def test_the_median_is_covered_as_often_as_its_order_statistics_promise():
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(2000):
        _, (low, high) = intervals.median(rng.exponential(size=15))
        inside += low <= np.log(2) <= high
    # The order-statistics interval of 15 samples covers 96.5 %; standard error 0.41 %.
    assert 0.952 < inside / 2000 < 0.978


def test_a_median_needs_six_samples():
    assert intervals.median([1, 2, 3, 4, 5])[1] is None
    assert intervals.median([1, 2, 3, 4, 5, 6])[1] == (1, 6)


@pytest.mark.parametrize("count", [6, 9, 20, 99, 1000])
def test_the_median_has_the_interval_that_scipy_gives(count):
    from scipy import stats

    samples = np.random.default_rng(count).lognormal(size=count)
    centre, ends = intervals.median(samples)
    test = stats.quantile_test(samples, q=centre, p=0.5).confidence_interval(0.95)
    assert ends == (test.low, test.high)


def test_a_share_has_its_exact_interval():
    # Clopper and Pearson for 2 of 100: 0.24 % to 7.04 %.
    assert intervals.share(2, 100) == pytest.approx((0.002431, 0.070384), abs=1e-5)


def test_wilsons_interval_is_narrower():
    exact, wilson = intervals.share(5, 50), intervals.share(5, 50, "wilson")
    assert wilson[1] - wilson[0] < exact[1] - exact[0]


@pytest.mark.parametrize("method", ["exact", "wilson"])
@pytest.mark.parametrize(
    ("found", "cases"), [(0, 1), (1, 1), (0, 40), (7, 40), (40, 40), (1577, 5000)]
)
def test_a_share_has_the_interval_that_scipy_gives(found, cases, method):
    from scipy import stats

    expected = stats.binomtest(found, cases).proportion_ci(0.95, method=method)
    assert intervals.share(found, cases, method) == pytest.approx(tuple(expected), abs=1e-11)
