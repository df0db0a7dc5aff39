"""Paired ratios: simulated rounds on a drifting machine must be covered as often as promised."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kvbench.analysis import paired
from kvbench.errors import InputError

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
EXPERIMENTS = 2500
CELLS = 4

# ------------------------------------------------------------------ a machine like the measured one


def autoregressive(generator, experiments, steps, correlation, spread):
    """Stationary AR(1) series, ``(experiments, steps)``."""
    series = np.empty((experiments, steps))
    series[:, 0] = generator.standard_normal(experiments)
    fresh = math.sqrt(1 - correlation**2)
    for i in range(1, steps):
        series[:, i] = correlation * series[:, i - 1] + fresh * generator.standard_normal(
            experiments
        )
    return spread * series


def normal(generator, shape):
    return 0.05 * generator.standard_normal(shape)


def skewed(generator, shape):
    return 0.05 * (generator.exponential(size=shape) - 1)


def with_outliers(generator, shape):
    hit = generator.random(shape) < 0.05
    return 0.05 * generator.standard_normal(shape) + hit * generator.exponential(0.4, size=shape)


def times(generator, experiments, rounds, noise):
    """Log times of two equal cells of a block of four, order drawn anew, ``(2, exp, rounds)``.

    The speed wanders by 15 % with a correlation of 0.7 from round to round; slots of one round lie a
    quarter of that apart.
    """
    drift = autoregressive(generator, experiments, rounds * CELLS, 0.7 ** (1 / CELLS), 0.15)
    drift = drift.reshape(experiments, rounds, CELLS)
    slots = np.argsort(generator.random(drift.shape), axis=2)
    drift = np.take_along_axis(drift, slots, 2)[:, :, :2]
    return np.moveaxis(drift + noise(generator, drift.shape), 2, 0)


def log_ratios(generator, experiments, rounds, noise, wander=0.0):
    """Log ratios of two equal cells; ``wander`` is a drift that hits only one of them."""
    one, other = times(generator, experiments, rounds, noise)
    return one - other + autoregressive(generator, experiments, rounds, 0.7, wander)


#: What the ratio of two equal processes was measured to differ by: 0.9 % each, side by side.
BETWEEN = 0.009 * math.sqrt(2)


def covered(experiments, **given):
    """Share of the experiments whose interval holds 1."""
    found = [paired.ratio(blocks, **given).interval for blocks in experiments]
    return np.mean([interval.low <= 1 <= interval.high for interval in found])


@pytest.mark.parametrize("rounds", [10, 20, 30, 60, 120])
@pytest.mark.parametrize("noise", [normal, skewed, with_outliers])
def test_one_block_is_covered_as_promised(noise, rounds):
    generator = np.random.default_rng(11)
    logs = log_ratios(generator, EXPERIMENTS, rounds, noise)
    logs += BETWEEN * generator.standard_normal((EXPERIMENTS, 1))
    assert 0.93 <= covered([[row] for row in logs]) <= 0.97


@pytest.mark.parametrize("rounds", [10, 20, 30, 60, 120])
@pytest.mark.parametrize("noise", [normal, skewed, with_outliers])
def test_what_works_in_one_process_is_covered_by_its_rounds(noise, rounds):
    logs = log_ratios(np.random.default_rng(11), EXPERIMENTS, rounds, noise)
    assert 0.93 <= covered([[row] for row in logs], one_process=True) <= 0.97


def test_rounds_alone_would_not_cover_what_processes_differ_by():
    generator = np.random.default_rng(11)
    logs = log_ratios(generator, EXPERIMENTS, 120, normal)
    logs += BETWEEN * generator.standard_normal((EXPERIMENTS, 1))
    assert covered([[row] for row in logs], one_process=True) < 0.85


@pytest.mark.parametrize("rounds", [10, 30, 60, 120])
@pytest.mark.parametrize("noise", [normal, with_outliers])
def test_a_ratio_that_itself_wanders_is_still_covered(noise, rounds):
    logs = log_ratios(np.random.default_rng(12), EXPERIMENTS, rounds, noise, wander=0.02)
    assert 0.93 <= covered([[row] for row in logs], one_process=True) <= 0.97


def test_without_the_slow_frequencies_a_wandering_ratio_would_not_be_covered(monkeypatch):
    original = paired._block

    def blind(logs):
        found = original(logs)
        return paired._Block(found.mean, 0.0, found.overall, found.freedom_slow, found.freedom)

    monkeypatch.setattr(paired, "_block", blind)
    logs = log_ratios(np.random.default_rng(12), EXPERIMENTS, 60, normal, wander=0.04)
    assert covered([[row] for row in logs], one_process=True) < 0.90


def of_blocks(generator, blocks, rounds, noise, apart):
    """Experiments of some blocks, whose ratios differ by a standard deviation of ``apart``."""
    logs = np.stack([log_ratios(generator, 1500, rounds, noise) for _ in range(blocks)], 1)
    return logs + apart * generator.standard_normal((1500, blocks, 1))


@pytest.mark.parametrize("blocks", [2, 3, 4, 5])
@pytest.mark.parametrize("rounds", [30, 60])
@pytest.mark.parametrize("noise", [normal, with_outliers])
def test_blocks_that_differ_by_two_per_cent_are_covered_as_promised(noise, rounds, blocks):
    logs = of_blocks(np.random.default_rng(13), blocks, rounds, noise, 0.02)
    assert 0.93 <= covered(logs) <= 0.97


@pytest.mark.parametrize("blocks", [2, 3, 5])
@pytest.mark.parametrize("rounds", [20, 60])
def test_equal_blocks_err_on_the_wide_side_but_not_by_much(rounds, blocks):
    logs = of_blocks(np.random.default_rng(14), blocks, rounds, normal, 0.0)
    assert covered(logs) >= 0.95
    widths = np.median([paired.ratio(one).half_width for one in logs])
    alone = np.median([paired.ratio([one[0]]).half_width for one in logs])
    # What equal blocks would allow is alone / sqrt(blocks); it may not be more than twice that.
    assert widths < 2 * alone / math.sqrt(blocks)


def test_pooling_blocks_that_happen_to_agree_would_not_cover(monkeypatch):
    monkeypatch.setattr(paired, "_WORTH", 1000)
    logs = of_blocks(np.random.default_rng(13), 2, 60, normal, 0.02)
    assert covered(logs, one_process=True) < 0.90


def test_blocks_that_differ_much_are_not_told_as_if_they_agreed():
    generator = np.random.default_rng(15)
    logs = np.stack([log_ratios(generator, 400, 60, normal) for _ in range(4)], 1)
    apart = logs + 0.1 * generator.standard_normal((400, 4, 1))
    widths = [np.median([paired.ratio(e).half_width for e in sides]) for sides in (logs, apart)]
    assert widths[1] > 3 * widths[0]


def test_pairing_removes_the_drift_that_two_medians_keep():
    one, other = times(np.random.default_rng(16), 400, 60, normal)
    unpaired = np.std(one.mean(1) - np.roll(other, 1, axis=0).mean(1))
    assert np.std(one.mean(1) - other.mean(1)) < unpaired / 3


# ------------------------------------------------------------------ stopping at a precision


def false_alarms(stops, noise, experiments=3000):
    """Share of equal pairs that "differ" when rounds go on until ``stops`` says so, 120 at most."""
    logs = log_ratios(np.random.default_rng(17), experiments, 120, noise)
    alarms = 0
    for series in logs:
        count = next((n for n in range(3, 120, 4) if stops(series[:n])), 120)
        ends = paired.ratio([series[:count]], one_process=True).interval
        alarms += not ends.low <= 1 <= ends.high
    return alarms / experiments


#: Two standard errors of a share of 5 % in 3,000 experiments.
MONTE_CARLO = 2 * math.sqrt(0.05 * 0.95 / 3000)


@pytest.mark.parametrize("precision", [0.03, 0.06])
@pytest.mark.parametrize("noise", [normal, with_outliers])
def test_stopping_at_a_precision_raises_no_false_alarms(noise, precision):
    share = false_alarms(lambda series: paired.reached([series], precision), noise)
    assert share <= 0.05 + MONTE_CARLO


def test_stopping_at_the_first_narrow_interval_would_raise_them():
    share = false_alarms(
        lambda series: paired.ratio([series], one_process=True).half_width <= 0.06, normal, 2000
    )
    assert share > 0.07


def test_a_handful_of_rounds_never_reaches_a_precision():
    quiet = [0.0001, -0.0001] * 7
    assert not paired.reached([quiet], 0.5)
    assert paired.reached([[*quiet, 0.0]], 0.001)


def test_the_precision_is_reached_when_the_widest_ratio_has_it():
    generator = np.random.default_rng(18)
    narrow, wide = 0.01 * generator.standard_normal(40), 0.2 * generator.standard_normal(40)
    assert paired.reached([narrow], 0.03)
    assert not paired.reached([narrow, wide], 0.03)


def test_asking_for_the_width_imports_neither_pandas_nor_the_statistics_of_scipy():
    program = (
        "import sys; from kvbench.analysis import paired;"
        "paired.half_width([0.01 * (i % 3) for i in range(30)]);"
        "print('pandas' in sys.modules, 'scipy.stats' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=WORKFLOW, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["False", "False", "False"], done.stderr[-1000:]


# ------------------------------------------------------------------ what is estimated


def test_the_ratio_is_the_geometric_mean_over_rounds():
    found = paired.ratio([[math.log(2.0), math.log(8.0)]])
    assert found.value == pytest.approx(4.0)
    assert (found.rounds, found.blocks) == (2, 1)


def test_a_round_is_the_mean_over_its_turns():
    assert paired.log_ratio([2.0, 8.0], [1.0, 1.0]) == pytest.approx(math.log(4.0))


def test_one_interrupted_slot_moves_nothing():
    calm = [0.10 + 0.001 * (i % 5) for i in range(20)]
    hit = [*calm[:-1], 3.0]
    assert paired.ratio([hit]).value == pytest.approx(paired.ratio([calm]).value, rel=0.002)


def test_a_single_round_is_a_value_without_an_interval():
    found = paired.ratio([[0.1]])
    assert found.value == pytest.approx(math.exp(0.1))
    assert math.isnan(found.interval.low) and math.isnan(found.smallest_difference)
    assert found.half_width == math.inf
    assert not paired.differs(found)


def test_blocks_of_one_round_tell_by_their_difference():
    found = paired.ratio([[0.1], [0.12], [0.08]])
    assert found.interval.low < math.exp(0.1) < found.interval.high
    assert (found.rounds, found.blocks) == (3, 3)


def test_equal_rounds_have_an_interval_of_no_width():
    found = paired.ratio([[0.5] * 12], one_process=True)
    assert found.interval.as_tuple() == pytest.approx((math.exp(0.5),) * 2)


def test_equal_rounds_of_one_block_do_not_hide_that_processes_differ():
    ends = paired.ratio([[0.5] * 12]).interval
    reach = 2.306 * paired.PROCESSES_APART  # Student's quantile at eight degrees of freedom
    assert math.log(ends.high) - 0.5 == pytest.approx(reach, rel=0.001)


def test_swapping_the_sides_inverts_ratio_and_interval():
    logs = np.random.default_rng(19).normal(0.1, 0.05, 40)
    there, back = paired.ratio([logs]).interval, paired.ratio([-logs]).interval
    assert there.value == pytest.approx(1 / back.value)
    assert there.as_tuple() == pytest.approx((1 / back.high, 1 / back.low))


def test_the_smallest_difference_is_found_nine_times_out_of_ten():
    generator = np.random.default_rng(20)
    logs = log_ratios(generator, 2000, 60, normal)
    logs += BETWEEN * generator.standard_normal((2000, 1))
    told = np.median([paired.ratio([row]).smallest_difference for row in logs])
    found = np.mean([paired.differs(paired.ratio([row + math.log1p(told)])) for row in logs])
    assert found == pytest.approx(0.90, abs=0.03)


def test_four_times_the_rounds_find_half_the_difference_in_one_process():
    logs = np.random.default_rng(21).normal(0, 0.07, 50)
    some, more = (paired.ratio([np.tile(logs, n)], one_process=True) for n in (1, 4))
    halved = math.log1p(some.smallest_difference) / math.log1p(more.smallest_difference)
    assert halved == pytest.approx(2, rel=0.05)


def test_no_number_of_rounds_finds_less_than_processes_differ_by():
    logs = np.random.default_rng(21).normal(0, 0.07, 10_000)
    assert paired.ratio([logs]).smallest_difference > 3 * paired.PROCESSES_APART


def test_few_rounds_differ_from_nothing_however_narrow():
    quiet = paired.ratio([[0.3, 0.3001, 0.2999]])
    assert quiet.interval.low > 1
    assert not paired.differs(quiet)
    assert paired.differs(quiet, rounds=3)


def test_a_machine_may_need_more_rounds_or_blocks():
    found = paired.ratio([[0.3, 0.3001] * 10])
    assert paired.differs(found, rounds=20)
    assert not paired.differs(found, rounds=21)
    assert not paired.differs(found, blocks=2)


@pytest.mark.parametrize(
    ("blocks", "words"), [([], "no round"), ([[]], "no round"), ([[0.1, math.nan]], "finite")]
)
def test_rounds_without_meaning_are_refused(blocks, words):
    with pytest.raises(InputError, match=words):
        paired.ratio(blocks)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [([1.0], [1.0, 2.0], "same turns"), ([], [], "same turns"), ([0.0], [1.0], "positive")],
)
def test_times_without_meaning_are_refused(one, other, words):
    with pytest.raises(InputError, match=words):
        paired.log_ratio(one, other)
