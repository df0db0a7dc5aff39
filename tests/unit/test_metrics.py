"""Metrics: their formulas, which samples count, and that records and tables give the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kvbench.analysis import metrics, tables
from kvbench.analysis.metrics import Evidence
from kvbench.analysis.statistics import Interval
from kvbench.errors import InputError


def times(ratio: float, seed: int, turns: int = 2, rounds: int = 14) -> list[list[float]]:
    noise = np.random.default_rng(seed).normal(0, 0.02, (turns, rounds))
    return (ratio * np.exp(noise)).tolist()


@pytest.fixture
def pair(make_record):
    """Two cells of one block; the second loses its fourth round."""
    return [
        make_record("none", times(2.0, 1), block="talk/r1"),
        make_record("dynamic", times(1.0, 2), block="talk/r1", disturbed={(1, 3): True}),
    ]


def test_a_conversation_is_told_by_the_sums_of_its_turns(make_record):
    record = make_record(e2e=[[1.0], [3.0]], new_tokens=11)
    found = metrics.repeats(record).conversations()
    assert found["e2e_s"] == [2.0]
    assert found["ttft_s"] == pytest.approx([0.2])
    assert found["tpot_s"] == pytest.approx([(4.0 - 0.4) / 20])
    assert found["output_tokens_per_s"] == pytest.approx([22 / 4])


def test_a_ratio_is_paired_round_by_round_and_turn_by_turn(pair):
    found = metrics.compare(*([metrics.repeats(record)] for record in pair))
    above, below = (
        np.array([[s["e2e_s"] for s in t["samples"]] for t in r["turns"]]) for r in pair
    )
    logs = np.delete(np.log(above / below).mean(axis=0), 3)
    # A tenth of thirteen rounds, one, is trimmed off at either end.
    assert math.log(found.value) == pytest.approx(np.sort(logs)[1:-1].mean())
    assert (found.rounds, found.blocks) == (13, 1)


def test_tables_and_records_give_the_same_ratio(pair):
    samples, summary = tables.kv_tables({"here": pair})
    by_records = metrics.compare(*([metrics.repeats(record)] for record in pair))
    by_rows = metrics.compare_rows(samples, "none", "dynamic", "e2e_s")
    assert by_rows.value == pytest.approx(by_records.value)
    assert by_rows.interval.as_tuple() == pytest.approx(by_records.interval.as_tuple())
    assert summary.set_index("strategy").loc["dynamic", "speedup_vs_none"] == by_records.value


def test_records_and_rows_give_the_same_conversations(pair):
    samples, _ = tables.kv_tables({"here": pair})
    rows = metrics.conversations(samples[samples["strategy"] == "dynamic"])
    found = metrics.repeats(pair[1]).conversations()
    for name in metrics.CONVERSATION:
        assert rows.loc[~rows["disturbed"], name].tolist() == pytest.approx(found[name])


def test_cells_of_different_blocks_are_never_paired(make_record):
    one, other = (
        metrics.repeats(make_record(name, times(1.0, 3), block=f"talk/{name}")) for name in "ab"
    )
    with pytest.raises(InputError, match="only cells of one block"):
        metrics.log_ratios(one, other)
    assert metrics.compare([one], [other]).paired is None


def test_rows_that_count_leave_out_whole_repeats_only(pair):
    samples, _ = tables.kv_tables({"here": pair})
    kept = metrics.counted(samples)
    assert len(samples) - len(kept) == 2
    assert set(kept.loc[kept["strategy"] == "dynamic", "round"]) == set(range(14)) - {3}


def test_where_every_repeat_was_disturbed_all_count(make_record):
    hit = {(0, number): True for number in range(3)}
    samples, _ = tables.kv_tables({"here": [make_record(disturbed=hit)]})
    assert len(metrics.counted(samples)) == len(samples) == 3


@pytest.mark.parametrize(
    ("rounds", "blocks", "control", "reason"),
    [
        (30, 1, (1.01, 0.99, 1.03), None),
        (30, 1, None, None),
        (1, 1, None, "one run"),
        (0, 0, None, "not enough rounds: 0 of 20"),
        (19, 1, None, "not enough rounds: 19 of 20"),
        (30, 1, (1.08, 1.04, 1.12), "the reference differs from itself by 8.0 %"),
        (30, 1, (0.9, 0.85, 0.96), "the reference differs from itself by 10.0 %"),
        (30, 1, (1.05, 1.02, 1.08), "the reference differs from itself by 5.0 %"),
        (30, 1, (0.96, 0.94, 0.98), "the reference differs from itself by 4.0 %"),
        # Beyond the precision by chance, or another by less than it.
        (30, 1, (1.032, 0.99, 1.07), None),
        (30, 1, (1.02, 1.01, 1.03), None),
        (30, 1, (1.2, math.nan, math.nan), None),
    ],
)
def test_a_verdict_needs_rounds_and_a_control_that_is_in_order(rounds, blocks, control, reason):
    ends = control and Interval(*control)
    assert metrics.why_not_judged(rounds, blocks, Evidence(20, 1), ends) == reason


def test_a_verdict_may_need_several_blocks():
    assert "blocks" in metrics.why_not_judged(90, 1, Evidence(20, 2))
