"""Statistics: simulated experiments must be covered as often as the intervals claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvbench.analysis import intervals, statistics
from kvbench.analysis.statistics import Interval, median_interval, ratio_interval
from kvbench.errors import InputError

EXPERIMENTS = 1000


def autoregressive(generator, shape, correlation):
    """Stationary AR(1) series along the last axis, with standard normal values."""
    noise = generator.standard_normal(shape)
    series = noise.copy()
    for i in range(1, shape[-1]):
        fresh = math.sqrt(1 - correlation**2) * noise[..., i]
        series[..., i] = correlation * series[..., i - 1] + fresh
    return series


def normal(generator, shape):
    return 1 + 0.05 * generator.standard_normal(shape)


def processes_differ(generator, shape):
    process = 1 + 0.05 * generator.standard_normal((*shape[:-1], 1))
    return process * (1 + 0.02 * generator.standard_normal(shape))


def lognormal(generator, shape):
    return np.exp(0.7 * generator.standard_normal(shape))


def exponential_tail(generator, shape):
    return (1 + 0.2 * generator.exponential(size=shape)) / (1 + 0.2 * math.log(2))


def autocorrelated(generator, shape):
    return np.exp(0.05 * autoregressive(generator, shape, 0.5))


def coverage(kind, replicates, iterations, experiments=EXPERIMENTS):
    """Share of experiments whose interval holds 1, the true median of every kind."""
    generator = np.random.default_rng(20240607)
    samples = kind(generator, (experiments, replicates, iterations))
    found = [median_interval(experiment) for experiment in samples]
    return np.mean([interval.low <= 1 <= interval.high for interval in found])


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 10)], ids=str)
@pytest.mark.parametrize(
    "kind", [normal, processes_differ, lognormal, exponential_tail, autocorrelated]
)
def test_replicated_medians_are_covered_as_promised(kind, shape):
    assert 0.93 <= coverage(kind, *shape) <= 0.97


@pytest.mark.parametrize("iterations", [5, 10])
@pytest.mark.parametrize("kind", [normal, lognormal, exponential_tail])
def test_a_single_process_is_covered_and_errs_on_the_wide_side(kind, iterations):
    assert 0.93 <= coverage(kind, 1, iterations) <= 0.985


def test_a_long_autocorrelated_process_is_widened_until_covered():
    assert 0.93 <= coverage(autocorrelated, 1, 30) <= 0.985


def test_without_the_widening_an_autocorrelated_process_would_not_be_covered(monkeypatch):
    monkeypatch.setattr(statistics, "_inflation", lambda series: 1.0)
    assert coverage(autocorrelated, 1, 30, 300) < 0.85


def test_without_students_quantile_three_replicates_would_not_be_covered(monkeypatch):
    monkeypatch.setattr(statistics, "_student", lambda freedom: statistics._NORMAL)
    assert coverage(normal, 3, 5, 500) < 0.90


def comparisons(kind, ratio, scenarios, turns, replicates, iterations, experiments=EXPERIMENTS):
    """Intervals of a ratio whose sides share key effects of up to four times."""
    generator = np.random.default_rng(7)
    keys = [(s, t) for s in range(scenarios) for t in range(turns)]
    level = np.exp(generator.uniform(0, 1.4, len(keys)))
    # One process measures all turns of a scenario, so its turns share a disturbance.
    shape = (2, experiments, scenarios, 1, replicates, 1)
    process = np.exp(0.02 * generator.standard_normal(shape))
    shape = (2, experiments, scenarios, turns, replicates, iterations)
    sides = process * kind(generator, shape)
    sides = sides.reshape(2, experiments, len(keys), replicates, iterations)
    sides *= level[None, None, :, None, None]
    sides[0] *= ratio
    return [
        ratio_interval(
            dict(zip(keys, sides[0, e], strict=True)), dict(zip(keys, sides[1, e], strict=True))
        )
        for e in range(experiments)
    ]


@pytest.mark.parametrize("kind", [normal, lognormal, autocorrelated])
@pytest.mark.parametrize("sizes", [(2, 2, 3, 3), (1, 2, 5, 5)], ids=str)
def test_ratios_are_covered_as_promised(kind, sizes):
    found = comparisons(kind, 1.3, *sizes)
    assert 0.93 <= np.mean([interval.low <= 1.3 <= interval.high for interval in found]) <= 0.97


def test_the_smallest_comparison_errs_on_the_wide_side():
    found = comparisons(normal, 1.3, 1, 1, 3, 5)
    assert 0.95 <= np.mean([interval.low <= 1.3 <= interval.high for interval in found]) <= 0.98


def test_a_strategy_against_itself_seldom_differs():
    found = comparisons(processes_differ, 1.0, 2, 2, 3, 3, 400)
    alarms = sum(map(statistics.differs, found))
    assert alarms / len(found) <= 0.07
    assert intervals.share(alarms, len(found))[0] <= 0.05


def test_a_slowdown_of_five_percent_is_found():
    quiet = lambda generator, shape: np.exp(0.01 * generator.standard_normal(shape))  # noqa: E731
    found = comparisons(quiet, 1.05, 4, 2, 3, 3, 200)
    assert np.mean([statistics.differs(ratio) for ratio in found]) >= 0.9


# ------------------------------------------------------------------ what is estimated


def test_one_replicate_is_summarised_by_its_median():
    assert median_interval([[1.0, 2.0, 40.0]]).value == pytest.approx(2.0)


def test_replicates_are_averaged_geometrically():
    assert median_interval([[1.0, 1.0, 9.0], [4.0]]).value == pytest.approx(2.0)


def test_a_slow_process_widens_the_interval_more_than_a_slow_iteration():
    iteration = median_interval([[1.0, 1.01, 1.5], [1.0, 1.02, 1.01], [1.0, 1.01, 1.02]])
    process = median_interval([[1.5, 1.51, 1.5], [1.0, 1.02, 1.01], [1.0, 1.01, 1.02]])
    assert process.high - process.low > 3 * (iteration.high - iteration.low)


def test_a_single_sample_has_no_interval():
    found = median_interval([[3.0]])
    assert found.value == pytest.approx(3.0)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_equal_samples_have_an_interval_of_no_width():
    assert median_interval([[2.0, 2.0], [2.0, 2.0]]).as_tuple() == pytest.approx((2.0, 2.0))


def test_values_that_may_be_zero_or_negative_are_averaged_as_they_are():
    assert median_interval([[0.0, 0.0], [0.0]]) == Interval(0.0, 0.0, 0.0)
    found = median_interval([[-2.0], [2.0], [3.0]])
    assert found.value == pytest.approx(1.0) and found.low < -2 < 3 < found.high


def test_the_same_samples_give_the_same_interval():
    samples = np.random.default_rng(3).lognormal(size=(3, 4))
    assert median_interval(samples) == median_interval(samples)


@settings(max_examples=40)
@given(
    samples=st.lists(
        st.lists(st.floats(0.01, 100), min_size=1, max_size=4), min_size=1, max_size=5
    ),
    scale=st.floats(0.01, 1000),
)
def test_a_change_of_unit_changes_only_the_unit(samples, scale):
    found = median_interval(samples)
    scaled = median_interval([[value * scale for value in replicate] for replicate in samples])
    assert scaled.value == pytest.approx(found.value * scale)
    if not math.isnan(found.low):
        assert scaled.as_tuple() == pytest.approx((found.low * scale, found.high * scale), rel=1e-6)
        assert found.low <= found.value * (1 + 1e-12) and found.value <= found.high * (1 + 1e-12)


@pytest.mark.parametrize(
    ("samples", "words"), [([], "no samples"), ([[], []], "no samples"), ([[math.nan]], "finite")]
)
def test_samples_without_meaning_are_refused(samples, words):
    with pytest.raises(InputError, match=words):
        median_interval(samples)


def test_empty_replicates_are_left_out():
    assert median_interval([[], [4.0]]).value == pytest.approx(4.0)


# ------------------------------------------------------------------ ratios


def test_the_ratio_is_the_geometric_mean_over_keys():
    found = ratio_interval({"a": [[2.0]], "b": [[8.0]]}, {"a": [[1.0]], "b": [[1.0]]})
    assert found.value == pytest.approx(4.0)


def test_only_shared_keys_are_compared():
    found = ratio_interval({"a": [[2.0]], "b": [[999.0]]}, {"a": [[1.0]], "c": [[1.0]]})
    assert found.value == pytest.approx(2.0)


def test_swapping_the_sides_inverts_the_ratio():
    generator = np.random.default_rng(5)
    one = {(s, t): generator.lognormal(size=(3, 3)) for s in "ab" for t in range(2)}
    two = {key: generator.lognormal(size=(3, 3)) for key in one}
    there, back = ratio_interval(one, two), ratio_interval(two, one)
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high, rel=0.15)


def test_a_ratio_of_one_cell_is_the_ratio_of_its_medians():
    one, two = [[1.0, 1.2], [1.1, 1.3]], [[2.0, 2.1], [2.2, 2.4]]
    found = ratio_interval({"a": two}, {"a": one})
    assert found.value == pytest.approx(median_interval(two).value / median_interval(one).value)


def test_turns_of_one_process_count_once():
    generator = np.random.default_rng(11)
    process = np.exp(0.1 * generator.standard_normal((2, 3, 1)))
    sides = [{("a", t): side * np.ones((3, 3)) for t in range(9)} for side in process]
    single = [{("a", 0): side * np.ones((3, 3))} for side in process]
    many, one = ratio_interval(*sides), ratio_interval(*single)
    assert many.high / many.low == pytest.approx(one.high / one.low, rel=1e-6)


def test_a_side_measured_once_borrows_the_spread_of_the_other():
    others = {"a": [[1.0], [1.02], [0.98]]}
    found = ratio_interval({"a": [[5.0]]}, others)
    assert found.value == pytest.approx(5.0, rel=0.01)
    assert found.low < 4.9 and found.high > 5.1
    assert found.high / found.low > ratio_interval({"a": [[5.0], [5.1], [4.9]]}, others).high / 5.5


def test_two_single_samples_have_a_ratio_without_interval():
    found = ratio_interval({"a": [[2.0]]}, {"a": [[1.0]]})
    assert math.isnan(found.low) and not statistics.differs(found)


@pytest.mark.parametrize(
    ("one", "two", "words"),
    [
        ({"a": [[1.0]]}, {"b": [[1.0]]}, "share no"),
        ({"a": [[0.0]]}, {"a": [[1.0]]}, "numerator a"),
        ({"a": [[1.0]]}, {"a": []}, "denominator a"),
    ],
)
def test_ratios_without_meaning_are_refused(one, two, words):
    with pytest.raises(InputError, match=words):
        ratio_interval(one, two)


# ------------------------------------------------------------------ verdicts and order


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1.01, 1.2, True), (0.8, 0.99, True), (0.99, 1.01, False), (1.0, 1.2, False)],
)
def test_a_ratio_differs_when_its_interval_excludes_one(low, high, expected):
    assert statistics.differs(Interval(1.0, low, high)) is expected


def test_spread_or_disturbance_makes_a_cell_unstable():
    calm = [[1.00, 1.01, 0.99]]
    assert not statistics.stability(calm, 0.20)
    assert statistics.stability(calm, 0.21)
    assert statistics.stability([[1.0, 1.3, 0.7]])
    assert statistics.stability([[1.0, 1.0], [1.4, 1.4]])


def test_the_bound_on_spread_is_ten_percent_of_the_mean():
    step = 0.1 / math.sqrt(2)
    assert statistics.stability([[1 - step * 1.001, 1 + step * 1.001]])
    assert not statistics.stability([[1 - step * 0.999, 1 + step * 0.999]])


def test_the_verdicts_are_plain_booleans():
    assert isinstance(statistics.stability([[1.0, 1.0]]), bool)
    assert isinstance(statistics.differs(Interval(1.0, 1.1, 1.2)), bool)


def test_geometric_mean_of_a_number_and_its_inverse_is_one():
    assert statistics.geometric_mean([4.0, 0.25]) == pytest.approx(1.0)
    with pytest.raises(InputError, match="positive"):
        statistics.geometric_mean([1.0, 0.0])


def test_interleaving_keeps_every_cell_and_depends_on_the_seed():
    cells = [f"cell{i}" for i in range(30)]
    order = statistics.interleave(cells, seed=1)
    assert sorted(order) == sorted(cells) and order != cells
    assert order == statistics.interleave(cells, seed=1) != statistics.interleave(cells, seed=2)


def test_interleaving_finishes_a_replicate_before_the_next():
    cells = [(replicate, strategy) for strategy in "abcdef" for replicate in (1, 2, 3)]
    order = statistics.interleave(cells, seed=4, replicate=lambda cell: cell[0])
    assert [cell[0] for cell in order] == [1] * 6 + [2] * 6 + [3] * 6
    assert [cell[1] for cell in order[:6]] != [cell[1] for cell in order[6:12]]
