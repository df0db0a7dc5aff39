"""The instrument's own test: few false alarms, small slowdowns found, no process on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from kvbench.analysis import instrument, statistics

PROCESSES, ITERATIONS, TURNS = 24, 5, 2


def simulated(make_record, slowdowns=(0.0, 0.05), *, process=0.01, iteration=0.005, seed=1):
    """Records of processes that differ by ``process`` and iterations by ``iteration``."""
    generator = np.random.default_rng(seed)
    made = []
    for slowdown in slowdowns:
        for number in range(PROCESSES):
            shift = generator.normal(0.0, process)
            times = (1 + slowdown) * np.exp(
                shift + generator.normal(0.0, iteration, (TURNS, ITERATIONS))
            )
            record = make_record(e2e=times.tolist(), replicate=number + 1)
            record["cell"]["slowdown"] = slowdown
            made.append(record)
    return made


@pytest.fixture(scope="module")
def arms(make_record):
    table = instrument.evaluate({"here": simulated(make_record)}, replicates=[3], pairs=100, seed=1)
    return {row["arm"]: row for row in table.to_dict("records")}


def test_equal_cells_rarely_differ(arms):
    assert arms["same"]["share"] <= 0.10
    assert arms["same"]["ratio_median"] == pytest.approx(1.0, abs=0.01)


def test_a_slowdown_of_five_percent_is_found(arms):
    assert arms["slowed"]["share"] >= 0.95
    assert arms["slowed"]["ratio_median"] == pytest.approx(1.05, abs=0.01)


def test_a_share_lies_within_its_interval(arms):
    for row in arms.values():
        assert 0.0 <= row["share_ci_low"] <= row["share"] <= row["share_ci_high"] <= 1.0
        assert row["share_ci_low"] < row["share_ci_high"]


def test_noise_that_hides_a_slowdown_is_admitted(make_record):
    made = simulated(make_record, process=0.10)
    table = instrument.evaluate({"here": made}, replicates=[3], pairs=50, seed=1)
    assert table.set_index("arm").loc["slowed", "share"] < 0.5


def test_the_columns_are_those_that_are_described(make_record):
    made = simulated(make_record)
    table = instrument.evaluate({"here": made}, replicates=[2], pairs=5, seed=1)
    assert list(table.columns) == list(instrument.COLUMNS)
    assert list(table["processes"]) == [PROCESSES, PROCESSES]
    assert set(table["pairs"]) == {5}


def test_the_two_cells_of_a_pair_never_share_a_process(make_record, monkeypatch):
    pairs = []
    real = statistics.ratio_interval

    def spy(numerator, denominator):
        pairs.append((numerator, denominator))
        return real(numerator, denominator)

    monkeypatch.setattr(statistics, "ratio_interval", spy)
    made = simulated(make_record)
    instrument.evaluate({"here": made}, replicates=[3], pairs=40, seed=1)
    assert len(pairs) == 80
    for sides in pairs:
        processes = [tuple(series) for side in sides for series in side["talk", 1]]
        assert len(processes) == len(set(processes)) == 6


def test_the_draw_is_that_of_the_seed(make_record):
    made = simulated(make_record)
    first, again = (
        instrument.evaluate({"here": made}, replicates=[3], pairs=20, seed=4) for _ in range(2)
    )
    assert first.equals(again)


def test_more_processes_per_cell_find_more_and_half_a_test_is_left_out(make_record):
    made = simulated(make_record, process=0.03)
    table = instrument.evaluate({"here": made}, replicates=[10, 3, 20], pairs=50, seed=1)
    # 20 processes twice are more than were measured, so that row has no arm of equals.
    assert list(table["replicates"]) == [3, 3, 10, 10, 20]
    shares = table.set_index(["replicates", "arm"])["share"]
    assert shares[10, "slowed"] > shares[3, "slowed"]
    assert set(instrument.as_tests(table, "here")) == {3, 10}


def test_too_few_processes_give_no_row(make_record):
    made = [r for r in simulated(make_record) if r["cell"]["replicate"] <= 5]
    table = instrument.evaluate({"here": made}, replicates=[3], pairs=10, seed=1)
    assert list(table["arm"]) == ["slowed"]


def test_no_records_give_an_empty_table():
    table = instrument.evaluate({}, replicates=[3], pairs=10, seed=1)
    assert len(table) == 0
    assert list(table.columns) == list(instrument.COLUMNS)


def test_failed_cells_and_disturbed_samples_do_not_count(make_record):
    made = simulated(make_record, slowdowns=(0.0,))
    for record in made[:6]:
        record["status"] = "failed"
    for record in made[6:]:
        for turn in record["turns"]:
            turn["samples"][0] |= {"e2e_s": 50.0, "disturbed": True}
    (row,) = instrument.evaluate({"here": made}, [3], 20, seed=1).to_dict("records")
    assert row["processes"] == PROCESSES - 6
    assert row["iterations"] == ITERATIONS - 1
    assert row["ratio_median"] == pytest.approx(1.0, abs=0.02)


def test_a_machines_rows_are_found_by_arm(make_record):
    table = instrument.evaluate({"lab": simulated(make_record)}, replicates=[3], pairs=20, seed=1)
    (tests,) = instrument.as_tests(table, "lab").values()
    assert set(tests) == {"same", "slowed"}
    assert tests["slowed"].pairs == 20
    assert tests["slowed"].share.value == tests["slowed"].found / 20
    assert instrument.as_tests(table, "elsewhere") == {}
