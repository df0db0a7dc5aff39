"""The instrument's own test: few false alarms, small slowdowns found, and what it takes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from kvbench.analysis import instrument, metrics, paired

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, CELLS, BLOCKS = 60, 4, 6


def simulated(make_record, slowdowns=(0.0, 0.05), *, noise=0.03, rounds=ROUNDS, apart=0.0, seed=1):
    """Records of blocks whose cells share a drift; ``apart`` is what is wrong with every second."""
    generator = np.random.default_rng(seed)
    made = []
    for block in range(BLOCKS):
        drift = 0.15 * np.cumsum(generator.standard_normal(rounds)) / math.sqrt(rounds)
        for slowdown in slowdowns:
            for number in range(CELLS):
                shift = drift + apart * (number % 2) + generator.normal(0.0, noise, rounds)
                times = [((1 + slowdown) * np.exp(shift)).tolist()]
                record = make_record(e2e=times, replicate=number + 1, block=f"aa/r{block}")
                record["cell"]["slowdown"] = slowdown
                made.append(record)
    return made


@pytest.fixture(scope="module")
def table(make_record):
    return instrument.evaluate({"here": simulated(make_record)})


def rows(table, arm, blocks=1):
    return table[(table["arm"] == arm) & (table["blocks"] == blocks)].set_index("rounds")


def test_equal_cells_rarely_differ(table):
    same = rows(table, "same")
    assert (same["share_ci_low"] <= 0.05).all()
    assert same["ratio_median"].to_numpy() == pytest.approx(1.0, abs=0.01)


def test_more_rounds_find_more_and_smaller_slowdowns(table):
    slowed, same = rows(table, "slowed"), rows(table, "same")
    assert slowed.loc[60, "share"] >= 0.95
    assert slowed.loc[10, "share"] < slowed.loc[60, "share"]
    assert same.loc[60, "smallest_slowdown"] < 0.05 < same.loc[10, "smallest_slowdown"]
    assert same.loc[60, "measuring_s"] == pytest.approx(6 * same.loc[10, "measuring_s"], rel=0.1)


def test_what_was_truly_injected_is_told_beside_what_was_asked_for(make_record, table):
    made = simulated(make_record)
    for record in made:
        if record["cell"]["slowdown"]:
            for sample in record["turns"][0]["samples"]:
                sample["injected_s"] = 0.07 * sample["e2e_s"] / 1.07
    found = instrument.evaluate({"here": made})
    assert rows(found, "slowed")["injected"].to_numpy() == pytest.approx(0.07)
    assert rows(found, "same")["injected"].isna().all()
    # Older records do not say it.
    assert table["injected"].isna().all()


def test_the_rule_that_lets_strategies_rest_is_tested_too(table):
    same, slowed = rows(table, "same"), rows(table, "slowed")
    # By the precision, which is reached well before the blocks end.
    assert 15 <= same["stopped_rounds"].iloc[0] < ROUNDS
    assert same["stopped_share"].iloc[0] <= 0.15
    assert slowed["stopped_share"].iloc[0] >= 0.90
    for rows_ in (same, slowed):
        row = rows_.iloc[0]
        assert row["stopped_ci_low"] <= row["stopped_share"] <= row["stopped_ci_high"]
        assert row["stopped_ci_high"] - row["stopped_ci_low"] > 0.1


def test_comparisons_rest_at_the_precision_of_the_default_configuration():
    with (ROOT / "config" / "config.yaml").open(encoding="utf-8") as stream:
        assert yaml.safe_load(stream)["kv"]["precision"] == instrument.PRECISION


def test_a_block_is_cut_into_stretches_that_are_no_more_independent_than_the_block(table):
    same = rows(table, "same")
    pairs = CELLS * (CELLS - 1) // 2
    assert same.loc[10, "comparisons"] == BLOCKS * pairs * 6
    assert same.loc[10, "independent"] == BLOCKS * 2
    assert same.loc[60, "comparisons"] == BLOCKS * pairs
    assert 90 not in same.index


def test_a_share_lies_within_its_interval(table):
    for row in table.to_dict("records"):
        assert 0.0 <= row["share_ci_low"] <= row["share"] <= row["share_ci_high"] <= 1.0
        assert row["share_ci_low"] < row["share_ci_high"]


def test_blocks_are_put_together_too(table):
    assert set(table["blocks"]) == {1, 2, 3}
    assert rows(table, "same", 3).loc[60, "independent"] == 2 * 2


def test_noise_that_hides_a_slowdown_is_admitted(make_record):
    found = instrument.evaluate({"here": simulated(make_record, noise=0.3)})
    assert rows(found, "slowed").loc[30, "share"] < 0.5


def test_failed_cells_and_disturbed_rounds_do_not_count(make_record):
    made = simulated(make_record, slowdowns=(0.0,))
    made[0]["status"] = "failed"
    for record in made:
        record["turns"][0]["samples"][0] |= {"e2e_s": 50.0, "disturbed": True}
    found = rows(instrument.evaluate({"here": made}), "same")
    assert found.loc[10, "cells"] == BLOCKS * CELLS - 1
    assert found["ratio_median"].to_numpy() == pytest.approx(1.0, abs=0.02)
    # 59 rounds are left, so that no stretch of 60 is.
    assert 60 not in found.index


@pytest.mark.parametrize("cells", [0, 1])
def test_nothing_to_compare_gives_no_row_and_no_interval(make_record, cells):
    made = simulated(make_record, slowdowns=(0.0,))[:cells]
    found = instrument.evaluate({"here": made})
    assert len(found) == 0
    assert list(found.columns) == list(instrument.COLUMNS)


def test_processes_that_ran_one_after_the_other_are_left_out(make_record):
    made = [make_record(replicate=number) for number in range(1, 20)]
    for record in made:
        record["cell"]["slowdown"] = 0.0
    assert len(instrument.evaluate({"old": made})) == 0


# ------------------------------------------------------------------ what it allows


def test_a_sound_machine_needs_as_few_rounds_as_simulated_ones(table):
    assert instrument.evidence(table, "here") == metrics.Evidence(paired.FEWEST_ROUNDS, 1)


def test_without_a_test_the_recorded_machines_counts(table):
    recorded = table.assign(machine="lab", share_ci_low=np.where(table["rounds"] < 30, 0.2, 0.0))
    assert instrument.evidence(recorded, "here").rounds == 30
    assert instrument.evidence(recorded.iloc[:0], "here") == metrics.Evidence()


def test_a_machine_that_cries_wolf_at_every_length_judges_nothing(make_record):
    found = instrument.evaluate({"here": simulated(make_record, slowdowns=(0.0,), apart=0.1)})
    needed = instrument.evidence(found, "here")
    assert needed.rounds > (found["rounds"] * found["blocks"]).max()


def test_of_several_machines_this_one_is_told_and_else_the_first(table):
    both = pd.concat([table.assign(machine=name) for name in ("zeta", "alpha")])
    assert instrument.machine_of(both) == "alpha"
    assert instrument.machine_of(pd.concat([both, table])) == "here"
    assert instrument.machine_of(both[both["arm"] == "same"]) is None


def test_a_run_says_what_differences_it_could_tell():
    found = [
        {"machine": "here", "smallest_difference": "0.02", "not_judged": ""},
        {"machine": "here", "smallest_difference": "0.04", "not_judged": ""},
        {"machine": "here", "smallest_difference": "0.5", "not_judged": "one run"},
        {"machine": "lab", "smallest_difference": "0.001", "not_judged": ""},
    ]
    assert instrument.told_differences(found) == (
        "this run could tell differences from 3.0 % on (4.0 % in the widest of 2 comparisons)"
    )
    assert instrument.told_differences([]) is None
