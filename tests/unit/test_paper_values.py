from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_kv
from kvbench.analysis import metrics
from kvbench.errors import InputError
from kvbench.paper import numbers
from kvbench.paper.values import Value
from kvbench.records import identity

PAPER = Path(__file__).resolve().parents[2] / "paper"
MACHINES = ("here", "epyc", "h200-gpu")
ENVIRONMENT = {
    "here": {
        "commit": "0123456789ab-dirty",
        "date": "2026-01-02T03:04:05Z",
        "gpu": {"memory_bytes": 2},
    },
    "epyc": {"commit": "fedcba", "date": "2025-12-01", "libraries": ["torch"]},
}
CLAIMS = [
    {
        "id": "dynamic_over_none",
        "statement_en": "Dynamic is faster than none.",
        "statement_pt": "O dinâmico é mais rápido.",
        "figure": "5.36x",
        "machine": "here",
        "value": 5.9,
        "ci_low": 5.8,
        "ci_high": 6.0,
        "verdict": "reproduced",
        "reason": np.nan,
    },
    {"id": "llama2", "machine": "here", "verdict": "not tested", "reason": "50 % of cells & more"},
]


@pytest.fixture(scope="module")
def tables():
    return synthetic_kv.tables(MACHINES)


@pytest.fixture(scope="module")
def values(tables):
    return numbers.kv_values(*tables, CLAIMS, ENVIRONMENT)


def row_of(summary, **wanted):
    rows = summary
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1
    return rows.iloc[0]


def test_headline_ratio_carries_interval_and_its_records(tables, values):
    row = row_of(tables[0], machine="here", scenario="symposium_turn", strategy="static")
    entry = values["headline_static_speedup_vs_dynamic"]
    assert entry.value == row["speedup_vs_dynamic"]
    assert entry.ci == (row["speedup_vs_dynamic_ci_low"], row["speedup_vs_dynamic_ci_high"])
    cell = "results/cells/kv/cpu/llama-3.2-1b-geometry/symposium_turn/static"
    assert entry.cells == tuple(f"{cell}/r{n}.json" for n in (1, 2, 3))


def test_recorded_machine_is_in_the_name_and_in_the_path(values):
    entry = values["h200_gpu_headline_dynamic_e2e"]
    assert entry.cells[0].startswith("results/recorded/h200-gpu/cells/kv/cuda/llama-3.2-1b/")
    assert values["machines"].value == "here, epyc, h200-gpu"


def test_unusual_dtype_is_in_the_path_of_its_records(tables):
    row = row_of(
        tables[0], machine="h200-gpu", scenario="symposium_turn", strategy="none"
    ).to_dict() | {"dtype": "float32"}
    (path, *_) = identity.record_paths({}, row)
    assert "/kv/cuda-float32/" in path


def test_unsupported_strategy_has_no_number_but_a_reason(values):
    stem = "banking_loan_application_offloaded"
    assert values[f"{stem}_status"].value == "unsupported"
    assert "CUDA" in values[f"{stem}_reason"].value
    assert values[f"{stem}_e2e"].value is None
    assert "offloaded, offloaded_static" in values["not_run"].value


def test_counts_of_cells(tables, values):
    here = tables[0][tables[0]["machine"] == "here"]
    assert values["cells_total"].value == len(here)
    assert values["cells_unsupported"].value == 4
    assert values["cells_ok"].value == len(here) - 4
    assert values["cells_failed"].value == 0
    assert values["cells_unstable"].value == 2


def test_exactness_is_counted_in_float32_only(tables):
    summary, samples = (table.copy() for table in tables)
    gpu = summary["machine"] == "h200-gpu"
    summary.loc[gpu, "tokens_match_reference"] = 0.1
    values = numbers.kv_values(summary, samples)
    assert values["h200_gpu_exact_cells"].value == 0
    assert values["exact_cells_matching"].value == values["exact_cells"].value > 0


def test_an_exact_cell_with_other_tokens_is_counted_as_not_matching(tables):
    summary, samples = (table.copy() for table in tables)
    first = summary.index[(summary["machine"] == "here") & (summary["strategy"] == "static")][0]
    summary.loc[first, "tokens_match_reference"] = 0.9
    values = numbers.kv_values(summary, samples)
    assert values["exact_cells_matching"].value == values["exact_cells"].value - 1


def test_a_single_byte_off_the_predicted_storage_is_noticed(tables):
    summary, samples = (table.copy() for table in tables)
    first = summary.index[(summary["machine"] == "here") & (summary["strategy"] == "static")][0]
    summary.loc[first, "kv_mib"] += 1 / 2**20
    values = numbers.kv_values(summary, samples)
    assert values["kv_cells_equal_to_prediction"].value == values["kv_cells_compared"].value - 1


def test_growth_is_last_turn_over_first(tables, values):
    samples = tables[1]
    own = samples[
        (samples["machine"] == "here")
        & (samples["scenario"] == "banking_loan_application")
        & (samples["strategy"] == "none")
    ]
    by_turn = metrics.counted(own).groupby("turn")["e2e_s"].median()
    assert values["growth_none"].value == pytest.approx(by_turn.loc[3] / by_turn.loc[1])
    assert values["growth_prompt"].value == pytest.approx(400 / 120)


def test_nothing_measured_here_still_gives_the_published_strategies_a_name():
    values = numbers.kv_values(*synthetic_kv.tables(("epyc",)))
    assert values["headline_static_speedup_vs_dynamic"].value is None
    assert values["headline_none_status"].value == "not planned"
    assert values["epyc_headline_static_speedup_vs_dynamic"].value is not None


def test_claims_are_counted_by_verdict(values):
    assert values["claims_total"].value == 2
    assert values["claims_reproduced"].value == 1
    assert values["claims_not_tested"].value == 1
    assert values["claims_refuted"].value == 0


def test_provenance_takes_the_latest_date_and_all_commits_and_digests(values):
    assert values["date"].value == "2026-01-02"
    assert values["commits"].value == "0123456789ab-dirty, fedcba"
    assert values["code_digests"].value == "0123456789abcdef"
    assert values["machine_gpu_memory_bytes"].value == 2
    assert "epyc_machine_libraries" not in values


def test_colliding_names_are_refused():
    summary, samples = synthetic_kv.tables(("here", "h200-gpu"))
    twin = summary[summary["machine"] == "h200-gpu"].assign(machine="h200_gpu")
    both = pd.concat([summary, twin], ignore_index=True)
    with pytest.raises(InputError, match="rename the machine"):
        numbers.kv_values(both, samples)


def test_what_a_comparison_rests_on_survives_the_file(tmp_path):
    gain = Value(1.2, rounds=9, not_judged="not enough rounds: 9 of 10")
    judged = Value(1.2, (1.1, 1.3), rounds=40, smallest_difference=0.12)
    numbers.write_values(tmp_path / "a.json", {"gain": gain, "judged": judged})
    assert numbers.read_values(tmp_path / "a.json") == {"gain": gain, "judged": judged}


def test_values_survive_the_file_with_stable_bytes(values, tmp_path):
    numbers.write_values(tmp_path / "a.json", values)
    numbers.write_values(tmp_path / "b.json", dict(reversed(values.items())))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    back = numbers.read_values(tmp_path / "a.json")
    assert back == {
        name: Value(entry.value, entry.ci, entry.unit, entry.digits, tuple(sorted(entry.cells)))
        for name, entry in values.items()
    }
    numbers.write_values(tmp_path / "c.json", {"a": Value(float("nan"))})
    assert json.loads((tmp_path / "c.json").read_text())["a"]["value"] is None


def test_damaged_values_file_is_named(tmp_path):
    (tmp_path / "values.json").write_text('{"a": {"value": 1}}')
    with pytest.raises(InputError, match=r"values\.json: a is not a value"):
        numbers.read_values(tmp_path / "values.json")


@pytest.mark.parametrize(
    ("value", "digits"), [(None, 0), (0, 1), (314.42, 0), (58.7, 1), (5.36, 2), (0.0045, 5)]
)
def test_digits_show_three_figures(value, digits):
    assert numbers.digits_for(value) == digits


def test_partly_failed_cell_keeps_its_numbers_and_its_reason(tables):
    summary, samples = (table.copy() for table in tables)
    where = (
        (summary["machine"] == "here")
        & (summary["scenario"] == "symposium_turn")
        & (summary["strategy"] == "static")
    )
    summary.loc[where, "status"] = "mixed"
    summary.loc[where, "reason"] = "killed"
    values = numbers.kv_values(summary, samples)
    assert values["headline_static_e2e"].value is not None
    assert values["headline_static_reason"].value == "killed"
    assert values["cells_mixed"].value == 1


def test_pooled_digests_are_listed_one_by_one(tables):
    summary, samples = (table.copy() for table in tables)
    summary.loc[0, "code_digest"] = "b" * 16 + "+" + "a" * 16
    summary.loc[1:, "code_digest"] = "b" * 16
    values = numbers.kv_values(summary, samples)
    assert values["code_digests"].value == "a" * 16 + ", " + "b" * 16
    assert values["code_digest_count"].value == 2


def test_claim_without_verdict_is_refused(values):
    with pytest.raises(InputError, match="no verdict"):
        numbers.section_context(values, [{"id": "a"}])


def aa_table(found: float) -> pd.DataFrame:
    shared = {"machine": "lab", "cells": 40, "blocks": 1, "rounds": 60, "comparisons": 100}
    shared |= {"measuring_s": 20.0, "smallest_slowdown": 0.03}
    same = {"arm": "same", "slowdown": 0.0, "share": 0.03, "share_ci_low": 0.006}
    slowed = {"arm": "slowed", "slowdown": 0.05, "share": found, "share_ci_low": found - 0.05}
    rows = [
        shared | same | {"share_ci_high": 0.085},
        shared | slowed | {"share_ci_high": found + 0.03},
    ]
    return pd.DataFrame(rows)


def test_aa_values_say_from_how_many_rounds_the_aims_are_met():
    values = numbers.aa_values(aa_table(0.95))
    assert (values["aa_machine"].value, values["aa_enough"].value) == ("lab", 60)
    assert values["aa_60_false_alarms"].ci == pytest.approx((0.006, 0.085))
    assert numbers.aa_values(aa_table(0.5))["aa_enough"].value is None


def test_half_an_aa_test_gives_no_values():
    assert numbers.aa_values(aa_table(0.95).iloc[:1]) == {}


def test_without_a_single_kv_cell_there_are_values_all_the_same():
    summary, samples = synthetic_kv.tables()
    nothing = [rows.iloc[:0].astype(object) for rows in (summary, samples)]
    values = numbers.kv_values(*nothing, [], {"here": {"cores": 2}})
    assert values["all_cells_total"].value == 0


def test_the_controls_of_all_blocks_are_counted(tables):
    summary, samples = tables
    reference = summary["strategy"] == "dynamic"
    summary = summary.assign(control_ci_low=np.where(reference, 0.99, np.nan))
    first, second = summary.index[reference][:2]
    summary.loc[first, ["control_ratio", "control_ci_low", "control_ci_high"]] = [1.2, 1.1, 1.3]
    summary["not_judged"] = summary["not_judged"].astype(object)
    summary.loc[first, "not_judged"] = f"{metrics.CONTROL_OFF} by 20.0 %"
    summary.loc[second, ["control_ratio", "control_ci_low", "control_ci_high"]] = np.nan
    found = numbers.kv_values(summary, samples)
    count = int(reference.sum()) - 1
    assert found["all_controls"].value == count
    assert found["all_controls_holding"].value == count - 1
    assert found["all_controls_off"].value == 1
    assert (found["all_controls_lowest"].value, found["all_controls_highest"].value) == (1.002, 1.2)


def app_tables():
    """Two rows beside one control that holds, one beside a control that is off, and one without."""
    rows = pd.DataFrame(
        [
            ("here", "latency", 1.01, 0.99, 1.03),
            ("here", "latency", 1.01, 0.99, 1.03),
            ("elsewhere", "latency", 1.20, 1.10, 1.30),
            ("older", "latency", None, None, None),
        ],
        columns=[
            "machine",
            "cell",
            *(f"speedup_control_{e}" for e in ("ratio", "ci_low", "ci_high")),
        ],
    )
    return {"response_cache": rows, "eviction": rows[["machine", "cell"]]}


def test_a_control_of_an_application_study_counts_once_however_many_rows_it_stands_beside():
    found = numbers.app_control_values(app_tables())
    assert found["all_app_controls"].value == 2
    assert found["all_app_controls_holding"].value == found["all_app_controls_off"].value == 1
    ends = [found[f"all_app_controls_{name}"].value for name in ("lowest", "highest")]
    assert ends == [1.01, 1.20]


def test_without_controls_of_application_studies_there_are_none_to_count():
    found = numbers.app_control_values({"eviction": app_tables()["eviction"]})
    assert found["all_app_controls"].value == 0
    assert found["all_app_controls_lowest"].value is None


def test_a_gain_over_too_few_rounds_of_recomputing_has_no_interval(tables):
    summary, samples = tables
    summary = summary.assign(not_judged_vs_none="not enough rounds: 2 of 10")
    found = numbers.kv_values(summary, samples)
    assert found["headline_dynamic_speedup_vs_none"].value is not None
    assert found["headline_dynamic_speedup_vs_none"].ci is None
    assert found["headline_static_speedup_vs_dynamic"].ci is not None
