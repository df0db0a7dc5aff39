"""Tables from hand-made records whose medians and ratios are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from kvbench import physics
from kvbench.analysis import metrics, tables
from kvbench.errors import InputError
from kvbench.records import gathering
from kvbench.studies import recorded_rows


@pytest.fixture
def build(make_record):
    """Tables of one machine from (strategy, keyword) pairs."""

    def build(*cells: tuple[str, dict], ceilings=None) -> tuple[pd.DataFrame, pd.DataFrame]:
        made = [make_record(strategy, **fields) for strategy, fields in cells]
        return tables.kv_tables({"here": made}, ceilings)

    return build


def row(summary: pd.DataFrame, strategy: str) -> pd.Series:
    (found,) = [r for _, r in summary.iterrows() if r["strategy"] == strategy]
    return found


TWO_TURNS = [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]


# Samples --------------------------------------------------------------------------------------


def test_there_is_one_row_per_turn_and_iteration(build):
    samples, _ = build(("dynamic", {"e2e": TWO_TURNS}))
    assert list(samples["e2e_s"]) == [1, 2, 3, 3, 4, 5]
    assert list(samples["turn"]) == [1, 1, 1, 2, 2, 2]
    assert list(samples["iteration"]) == [0, 1, 2] * 2


def test_tpot_is_the_time_after_the_first_token_per_further_token(build):
    samples, _ = build(("dynamic", {"e2e": [[2.0]], "new_tokens": 11}))
    (only,) = samples.to_dict("records")
    assert only["ttft_s"] == pytest.approx(0.2)
    assert only["tpot_s"] == pytest.approx((2.0 - 0.2) / 10)
    assert only["output_tokens_per_s"] == pytest.approx(11 / 2)


def test_a_single_token_has_no_tpot():
    assert math.isnan(metrics.tpot(2.0, 2.0, 0))


def test_memory_is_in_mebibytes(build):
    samples, _ = build(("dynamic", {"e2e": [[1.0], [1.0]]}))
    assert list(samples["kv_mib"]) == [1, 2]
    assert list(samples["peak_memory_mib"]) == [3, 4]


def test_cold_samples_are_not_among_the_samples(build):
    samples, summary = build(("dynamic", {"cold_s": 9.0}))
    assert 9.0 not in list(samples["e2e_s"])
    assert row(summary, "dynamic")["cold_e2e_s"] == 9.0


# Summary --------------------------------------------------------------------------------------


def test_medians_are_those_of_whole_conversations(build):
    _, summary = build(("dynamic", {"e2e": TWO_TURNS, "new_tokens": 11}))
    found = row(summary, "dynamic")
    assert found["e2e_s_median"] == pytest.approx(3.0)
    assert found["ttft_s_median"] == pytest.approx(0.3)
    assert found["tpot_s_median"] == pytest.approx((6.0 - 0.6) / 20)
    assert found["output_tokens_per_s_median"] == pytest.approx(22 / 6)
    assert found["turns"] == 2
    assert found["samples"] == 3


def test_an_interval_holds_its_median(build):
    _, summary = build(("dynamic", {"e2e": TWO_TURNS}))
    found = row(summary, "dynamic")
    for name in ("e2e_s", "ttft_s", "tpot_s", "output_tokens_per_s"):
        assert found[f"{name}_ci_low"] < found[f"{name}_median"] < found[f"{name}_ci_high"]


def test_replicates_are_averaged_and_not_pooled(build):
    _, summary = build(
        ("dynamic", {"e2e": [[1.0, 1.0, 1.0, 1.0]]}),
        ("dynamic", {"e2e": [[4.0]], "replicate": 2}),
    )
    found = row(summary, "dynamic")
    assert found["e2e_s_median"] == pytest.approx(2.0)
    assert found["replicates"] == 2
    assert found["samples"] == 5


def test_speed_ups_are_geometric_means_over_the_turns(build):
    _, summary = build(
        ("none", {"e2e": [[2.0] * 3, [8.0] * 3]}),
        ("dynamic", {"e2e": [[1.0] * 3, [2.0] * 3]}),
        ("static", {"e2e": [[0.5] * 3, [1.0] * 3]}),
    )
    assert row(summary, "dynamic")["speedup_vs_none"] == pytest.approx(math.sqrt(2 * 4))
    assert row(summary, "static")["speedup_vs_dynamic"] == pytest.approx(2.0)
    assert row(summary, "none")["speedup_vs_dynamic"] == pytest.approx(1 / math.sqrt(8))


def test_a_reference_is_once_as_fast_as_itself_exactly(build):
    _, summary = build(("none", {"e2e": TWO_TURNS}), ("dynamic", {"e2e": TWO_TURNS}))
    found = row(summary, "none")
    ends = [found[f"speedup_vs_none{end}"] for end in ("", "_ci_low", "_ci_high")]
    assert ends == [1.0, 1.0, 1.0]


def test_without_the_reference_there_is_no_speed_up(build):
    _, summary = build(("static", {}), ("none", {"status": "failed", "reason": "x"}))
    assert math.isnan(row(summary, "static")["speedup_vs_none"])
    assert math.isnan(row(summary, "static")["speedup_vs_dynamic"])


def test_references_of_another_scenario_or_dtype_do_not_count(build):
    _, summary = build(
        ("static", {}),
        ("none", {"scenario": "other"}),
        ("dynamic", {"dtype": "bfloat16"}),
    )
    assert math.isnan(row(summary, "static")["speedup_vs_none"])
    assert math.isnan(row(summary, "static")["speedup_vs_dynamic"])


# Rounds ---------------------------------------------------------------------------------------


def rounds(ratio: float, count: int = 12, seed: int = 1) -> list[list[float]]:
    """One turn's seconds on a machine whose speed wanders, the same weather for every ratio."""
    drift = 0.2 * np.sin(np.arange(count) / 2)
    noise = 0.01 * np.random.default_rng(seed).standard_normal(count)
    return [(ratio * np.exp(drift + noise)).tolist()]


def in_block(ratio: float, seed: int = 1, **fields) -> dict:
    return {"e2e": rounds(ratio, seed=seed), "block": "talk/r1", **fields}


def test_cells_of_a_block_are_paired_within_its_rounds(build):
    _, summary = build(("dynamic", in_block(1.0)), ("static", in_block(0.9, seed=2)))
    found = row(summary, "static")
    assert found["speedup_vs_dynamic"] == pytest.approx(1 / 0.9, rel=0.02)
    # The rounds, and 3 % on either side for what two processes may differ by.
    assert 1.07 < found["speedup_vs_dynamic_ci_low"] < 1.09
    assert 1.13 < found["speedup_vs_dynamic_ci_high"] < 1.15
    assert (found["rounds"], found["blocks"]) == (12, 1)
    assert 0 < found["smallest_difference"] < 0.05
    assert pd.isna(found["not_judged"])


def test_a_disturbed_slot_drops_its_round_for_that_pair_only(build):
    hit = in_block(0.9, seed=2, disturbed={(0, 3): True})
    _, summary = build(
        ("dynamic", in_block(1.0)), ("static", hit), ("paged", in_block(1.1, seed=3))
    )
    assert row(summary, "static")["rounds"] == 11
    assert row(summary, "paged")["rounds"] == 12


def test_a_block_without_a_clean_round_has_a_value_and_says_why_it_is_not_judged(build):
    everything = {(0, number): True for number in range(12)}
    _, summary = build(
        ("dynamic", in_block(1.0)), ("static", in_block(0.9, seed=2, disturbed=everything))
    )
    found = row(summary, "static")
    assert found["not_judged"] == metrics.ALL_DISTURBED
    assert found["speedup_vs_dynamic"] == pytest.approx(1 / 0.9, rel=0.02)
    assert math.isnan(found["speedup_vs_dynamic_ci_low"])


def test_records_without_rounds_have_a_value_and_no_interval(build):
    _, summary = build(("dynamic", {"e2e": TWO_TURNS}), ("static", {"e2e": TWO_TURNS}))
    found = row(summary, "static")
    assert found["speedup_vs_dynamic"] == pytest.approx(1.0)
    assert math.isnan(found["speedup_vs_dynamic_ci_low"])
    assert (found["rounds"], found["blocks"]) == (0, 0)
    assert found["not_judged"] == "not enough rounds: 0 of 10"


def test_a_single_round_is_one_run(build):
    once = {"e2e": [[5.0]], "block": "talk/r1"}
    _, summary = build(("dynamic", in_block(1.0)), ("none", once), ("static", in_block(0.9)))
    found = row(summary, "none")
    assert (found["rounds"], found["not_judged"]) == (1, "one run")
    assert math.isnan(found["speedup_vs_dynamic_ci_low"])
    assert math.isnan(found["e2e_s_ci_low"])
    static = row(summary, "static")
    assert static["speedup_vs_none"] > 1
    assert math.isnan(static["speedup_vs_none_ci_low"])
    assert not math.isnan(static["speedup_vs_dynamic_ci_low"])


def test_a_ratio_over_few_rounds_of_none_says_so_beside_many_over_the_reference(build):
    """Three rounds beside `none` carry no verdict, however many there were beside the reference."""
    few = {"e2e": [rounds(5.0, seed=4)[0][:3]], "block": "talk/r1"}
    _, summary = build(("dynamic", in_block(1.0)), ("none", few), ("static", in_block(0.9, seed=2)))
    for name in ("static", "dynamic"):
        found = row(summary, name)
        assert found["rounds_vs_none"] == 3
        assert found["not_judged_vs_none"] == "not enough rounds: 3 of 10"
        assert found["smallest_difference_vs_none"] > 0
    static = row(summary, "static")
    assert (static["rounds"], static["smallest_difference"] < 0.05) == (12, True)
    assert pd.isna(static["not_judged"])
    assert pd.isna(row(summary, "none")["not_judged_vs_none"])


def test_the_control_stands_beside_every_cell_and_is_no_strategy(build):
    samples, summary = build(
        ("dynamic", in_block(1.0)),
        ("control", in_block(1.0, seed=5)),
        ("static", in_block(0.9, seed=2)),
    )
    assert list(summary["strategy"]) == ["dynamic", "static"]
    assert set(samples["strategy"]) == {"dynamic", "static", "control"}
    for _, found in summary.iterrows():
        assert found["control_ci_low"] < 1 < found["control_ci_high"]
        assert pd.isna(found["not_judged"])


def test_a_block_whose_control_is_off_is_not_judged(build):
    _, summary = build(
        ("dynamic", in_block(1.0)),
        ("control", in_block(1.08, seed=5)),
        ("static", in_block(0.9, seed=2)),
    )
    assert row(summary, "static")["not_judged"].startswith(metrics.CONTROL_OFF)


def test_a_machine_that_needs_more_rounds_is_not_judged_on_fewer(make_record):
    made = [make_record("dynamic", **in_block(1.0)), make_record("static", **in_block(0.9))]
    needed = {"here": metrics.Evidence(rounds=60, blocks=1)}
    _, summary = tables.kv_tables({"here": made}, None, needed)
    assert set(summary["not_judged"].iloc[1:]) == {"not enough rounds: 12 of 60"}


def test_the_rounds_of_a_block_are_told_one_by_one(make_record):
    made = [make_record("dynamic", **in_block(1.0)), make_record("static", **in_block(0.5))]
    for record in made:
        record["block"]["probe_s"] = [0.001 * (n + 1) for n in range(12)]
    table = tables.round_table({"here": made, "old": [make_record("dynamic")]})
    assert list(table.columns) == list(tables.ROUND_COLUMNS)
    static = table[table["strategy"] == "static"]
    assert static["ratio"].tolist() == pytest.approx([2.0] * 12)
    assert static["probe_s"].tolist() == pytest.approx(made[0]["block"]["probe_s"])
    assert table.loc[table["strategy"] == "dynamic", "ratio"].isna().all()
    assert set(table["machine"]) == {"here"}


def test_the_share_of_turns_with_the_references_tokens_is_counted(build):
    four = {"e2e": [[1.0]] * 4}
    _, summary = build(
        ("dynamic", four | {"digests": ["a", "b", "c", "d"]}),
        ("quantized_int4", four | {"digests": ["a", "b", "c", "0"], "exact": False}),
    )
    assert row(summary, "quantized_int4")["tokens_match_reference"] == 0.75
    assert row(summary, "dynamic")["tokens_match_reference"] == 1.0


def test_a_replicate_without_counterpart_is_held_against_the_first_reference(build):
    _, summary = build(
        ("dynamic", {"digests": ["a"]}),
        ("static", {"digests": ["a"]}),
        ("static", {"digests": ["b"], "replicate": 2}),
    )
    assert row(summary, "static")["tokens_match_reference"] == 0.5


# Status ---------------------------------------------------------------------------------------


def test_an_unsupported_cell_has_a_reason_and_was_no_attempt(build):
    _, summary = build(("offloaded", {"status": "unsupported", "reason": "needs CUDA"}))
    found = row(summary, "offloaded")
    assert (found["status"], found["reason"]) == ("unsupported", "needs CUDA")
    assert math.isnan(found["success_rate"])
    assert math.isnan(found["e2e_s_median"])
    assert found["samples"] == 0


@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_a_failed_cell_was_an_attempt(build, status):
    _, summary = build(("dynamic", {"status": status, "reason": "x", "e2e": TWO_TURNS}))
    assert row(summary, "dynamic")["success_rate"] == 0.0


def test_replicates_that_ended_differently_are_mixed_and_the_good_ones_count(build):
    _, summary = build(
        ("dynamic", {"e2e": TWO_TURNS}),
        ("dynamic", {"e2e": TWO_TURNS, "replicate": 2, "status": "failed", "reason": "x"}),
    )
    found = row(summary, "dynamic")
    assert found["status"] == "mixed"
    assert found["reason"] == "x"
    assert found["success_rate"] == 0.5
    assert found["e2e_s_median"] == pytest.approx(3.0)


# Noise ----------------------------------------------------------------------------------------


def test_a_disturbed_iteration_is_dropped_in_all_its_turns(build):
    samples, summary = build(
        (
            "dynamic",
            {
                "e2e": [[1.0, 100.0, 2.0, 3.0], [1.0, 50.0, 2.0, 3.0]],
                "disturbed": {(0, 1): True},
            },
        )
    )
    found = row(summary, "dynamic")
    assert found["e2e_s_median"] == pytest.approx(2.0)
    assert found["samples"] == 3
    assert found["disturbed_share"] == pytest.approx(1 / 8)
    assert len(samples) == 8


def test_when_everything_was_disturbed_everything_counts_and_is_unstable(build):
    marks = {(0, i): True for i in range(3)}
    _, summary = build(("dynamic", {"e2e": [[1.0, 1.0, 1.0]], "disturbed": marks}))
    found = row(summary, "dynamic")
    assert found["samples"] == 3
    assert found["e2e_s_median"] == pytest.approx(1.0)
    assert found["unstable"]


@pytest.mark.parametrize(("spread", "unstable"), [(0.05, False), (0.30, True)])
def test_a_wide_spread_is_unstable(build, spread, unstable):
    _, summary = build(("dynamic", {"e2e": [[1.0 - spread, 1.0, 1.0 + spread]]}))
    assert bool(row(summary, "dynamic")["unstable"]) is unstable


# Roofline -------------------------------------------------------------------------------------


def ceiling() -> physics.Ceilings:
    return physics.Ceilings(
        read_bytes_per_s=1e9,
        copy_bytes_per_s=1e9,
        prefill_flops_per_s=1e9,
        decode_flops_per_s=1e9,
        call_overhead_s=0.0,
    )


def test_the_roofline_is_the_predicted_over_the_measured_time(build):
    known = {("here", "cpu", "float32"): ceiling()}
    _, summary = build(("dynamic", {"e2e": TWO_TURNS}), ceilings=known)
    found = row(summary, "dynamic")
    assert found["predicted_e2e_s"] > 0
    assert found["roofline_fraction"] == pytest.approx(found["predicted_e2e_s"] / 3.0)
    assert found["bound"] in {"memory", "compute"}


def test_ceilings_of_another_machine_or_dtype_give_no_roofline(build):
    known = {("there", "cpu", "float32"): ceiling(), ("here", "cpu", "bfloat16"): ceiling()}
    _, summary = build(("dynamic", {}), ceilings=known)
    assert math.isnan(row(summary, "dynamic")["roofline_fraction"])


# Replies --------------------------------------------------------------------------------------


@pytest.fixture
def answered(make_record):
    """Records of two replicates with three replies each."""

    def answered(responses: list[str], exact: list[bool | None]) -> list[dict]:
        made = [make_record(e2e=[[1.0]] * len(responses), replicate=n) for n in (1, 2)]
        for record in made:
            for turn, text, mark in zip(record["turns"], responses, exact, strict=True):
                turn |= {"response": text, "reply_exact": mark}
        return made

    return answered


def test_the_share_of_exact_replies_counts_turns_that_have_a_reference(answered):
    _, summary = tables.kv_tables({"here": answered(["a", "b", "c"], [True, False, None])})
    assert row(summary, "dynamic")["replies_exact"] == 0.5


def test_without_references_there_is_no_share_of_exact_replies(build):
    _, summary = build(("dynamic", {}))
    assert math.isnan(row(summary, "dynamic")["replies_exact"])


def test_replies_are_those_of_the_first_replicate_turn_by_turn(answered):
    table = tables.reply_table({"here": answered(["a", "b"], [True, False])})
    assert list(table.columns) == list(tables.REPLY_COLUMNS)
    assert table["response"].tolist() == ["a", "b"]
    assert table["reply_exact"].tolist() == [True, False]


@pytest.mark.parametrize("text", ['a, "b"', "two\nlines", "a\rb", "a\r\nb", "ação ✓", " x "])
def test_a_reply_survives_the_csv_file_whatever_is_in_it(answered, tmp_path, text):
    table = tables.reply_table({"here": answered([text, "next"], [True, True])})
    gathering.write_csv(table, tmp_path / "kv_replies.csv")
    found = gathering.read_csv(tmp_path / "kv_replies.csv")
    assert found["response"].tolist() == [text, "next"]


# Form -----------------------------------------------------------------------------------------


def test_the_columns_are_those_that_are_described(build):
    samples, summary = build(("none", {}), ("dynamic", {}), ("paged", {"status": "failed"}))
    assert list(samples.columns) == list(tables.SAMPLE_COLUMNS)
    assert list(summary.columns) == list(tables.SUMMARY_COLUMNS)
    assert all({**tables.SAMPLE_COLUMNS, **tables.SUMMARY_COLUMNS}.values())


def test_no_records_give_empty_tables_with_all_columns():
    samples, summary = tables.kv_tables({})
    assert (len(samples), len(summary)) == (0, 0)
    assert list(samples.columns) == list(tables.SAMPLE_COLUMNS)


def test_two_records_of_one_cell_are_refused(build):
    with pytest.raises(InputError, match=r"two records of .*dynamic r1; keep one") as error:
        build(("dynamic", {}), ("dynamic", {}))
    assert "\n" not in str(error.value)


def test_equal_records_in_any_order_give_equal_bytes(make_record, tmp_path):
    made = [
        make_record(strategy, [[1.0, 1.1, 1.2]], scenario=scenario, replicate=replicate)
        for strategy in ("none", "dynamic", "static")
        for scenario in ("a", "b")
        for replicate in (1, 2)
    ]
    files = []
    for number, order in enumerate((made, made[::-1])):
        for table in tables.kv_tables({"here": order}):
            files.append(tmp_path / f"{number}-{len(table)}.csv")
            gathering.write_csv(table, files[-1])
    assert files[0].read_bytes() == files[2].read_bytes()
    assert files[1].read_bytes() == files[3].read_bytes()


def test_machines_stand_apart(make_record):
    found = {"here": [make_record("dynamic")], "lab": [make_record("none")]}
    _, summary = tables.kv_tables(found)
    assert list(summary["machine"]) == ["here", "lab"]
    assert summary["speedup_vs_dynamic"].isna().tolist() == [False, True]


def test_the_readme_lists_every_column():
    text = tables.columns_readme({"kv_summary.csv": tables.SUMMARY_COLUMNS})
    assert "## kv_summary.csv" in text
    assert all(f"| `{column}` | {m} |" in text for column, m in tables.SUMMARY_COLUMNS.items())


# Application tables ---------------------------------------------------------------------------


def app_record(cell: str, rows: list[dict], status: str = "ok") -> dict:
    return {
        "cell": {"id": cell, "factors": {"policy": cell}},
        "status": status,
        "reason": None if status == "ok" else "no server",
        "rows": rows,
    }


def test_a_studys_table_has_its_rows_with_machine_and_cell_in_front():
    columns = {"policy": "Policy.", "hits": "Hits."}
    made = [app_record("lru", [{"policy": "lru", "hits": 1}, {"policy": "lru", "hits": 2}])]
    table = tables.app_table(columns, {"here": made}, recorded_rows)
    assert list(table.columns) == ["machine", "cell", "status", "reason", "policy", "hits"]
    assert table["hits"].tolist() == [1, 2]


def test_a_cell_without_rows_still_says_what_became_of_it():
    made = [app_record("lru", [], "unsupported")]
    table = tables.app_table({"policy": "Policy.", "hits": "Hits."}, {"here": made}, recorded_rows)
    (only,) = table.to_dict("records")
    assert (only["status"], only["reason"], only["policy"]) == ("unsupported", "no server", "lru")
    assert math.isnan(only["hits"])
