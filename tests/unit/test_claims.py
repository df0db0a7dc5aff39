from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_kv
import yaml
from kvbench import studies
from kvbench.analysis import claims, metrics, paired
from kvbench.analysis.claims import Bound, Claim, pages
from kvbench.analysis.claims.measured import NO_INTERVAL
from kvbench.analysis.metrics import Evidence
from kvbench.analysis.statistics import Interval
from kvbench.analysis.tables import SAMPLE_COLUMNS, SUMMARY_COLUMNS
from kvbench.errors import InputError
from kvbench.paper import numbers
from kvbench.paper.values import Value

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config" / "claims.yaml"
RATIO = {
    "kind": "ratio",
    "metric": "e2e_s",
    "numerator": "none",
    "denominator": "dynamic",
    "scenario": "headline",
}


@pytest.fixture(scope="module")
def one():
    summary, samples = synthetic_kv.tables()
    return samples, summary


@pytest.fixture(scope="module")
def shipped():
    return claims.load(SHIPPED)


def claim(measure, bound=None, **more):
    given = {
        "id": "a_claim",
        "source": "a document, a place",
        "statement": {"en": "It is so.", "pt": "É assim."},
        "figure": None,
        "figure_value": None,
        "unit": "",
        "measure": measure,
        "bound": bound or Bound(low=1, low_open=True),
    }
    return Claim(**(given | more))


def judge(measure, tables, bound=None, others=None):
    samples, summary = tables
    (row,) = claims.evaluate([claim(measure, bound)], samples, summary, others or {})
    return row


def written(tmp_path, **changes):
    entry = {
        "id": "a_claim",
        "document": "S1",
        "kind": "stated",
        "place": "page 1",
        "statement": {"en": "It is so.", "pt": "É assim."},
        "measure": RATIO,
        "holds_if": {"above": 1},
    } | changes
    path = tmp_path / "claims.yaml"
    document = {"documents": {"S1": "A document"}, "claims": [entry]}
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return path


def load(tmp_path, **changes):
    return claims.load(written(tmp_path, **changes), scenarios=["context_growth"])


def empty_tables():
    return pd.DataFrame(columns=list(SAMPLE_COLUMNS)), pd.DataFrame(columns=list(SUMMARY_COLUMNS))


# ---------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((1.1, 1.3), "reproduced"),
        ((0.7, 0.9), "refuted"),
        ((0.9, 1.1), "inconclusive"),
        ((1.0, 1.2), "inconclusive"),
        ((0.8, 1.0), "refuted"),
        ((math.nan, math.nan), "inconclusive"),
    ],
)
def test_an_open_bound_judges_the_whole_interval(ends, verdict):
    assert Bound(low=1, low_open=True).verdict(Interval(1.0, *ends)) == verdict


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((10, 100), "reproduced"),
        ((5, 9.9), "refuted"),
        ((101, 120), "refuted"),
        ((9, 11), "inconclusive"),
        ((90, 110), "inconclusive"),
        ((1, 1000), "inconclusive"),
        ((5, 10), "inconclusive"),
    ],
)
def test_a_closed_bound_includes_its_ends(ends, verdict):
    assert Bound(10, 100).verdict(Interval(50.0, *ends)) == verdict


def test_an_exact_number_meets_an_equality():
    assert Bound(1, 1).verdict(Interval(1.0, 1.0, 1.0)) == "reproduced"
    assert Bound(1, 1).verdict(Interval(2.0, 2.0, 2.0)) == "refuted"


@pytest.mark.parametrize(
    ("holds_if", "figure", "low", "high"),
    [
        ({"within_percent": 10}, {"value": 5.0}, 4.5, 5.5),
        ({"within_factor": 2}, {"value": 5.0}, 2.5, 10.0),
        ({"between": [1.8, 2.2]}, None, 1.8, 2.2),
        ({"at_least": 1, "below": 2}, None, 1.0, 2.0),
        ({"equals": 3}, None, 3.0, 3.0),
    ],
)
def test_bounds_are_read(tmp_path, holds_if, figure, low, high):
    (found,) = load(tmp_path, holds_if=holds_if, figure=figure)
    assert (found.bound.low, found.bound.high) == pytest.approx((low, high))


def test_a_small_figure_is_printed_without_an_exponent(tmp_path):
    (found,) = load(tmp_path, figure={"value": 0.000022}, unit="s")
    assert found.figure == "0.000022 s"


# ---------------------------------------------------------------------------- measures


def test_ratio_equals_the_ratio_of_the_samples(one):
    samples, _ = one
    own = samples[(samples["scenario"] == "symposium_turn") & ~samples["disturbed"]]
    times = {
        name: own[own["strategy"] == name].set_index(["block", "round"])["e2e_s"]
        for name in ("none", "dynamic")
    }
    disturbed = samples[(samples["scenario"] == "symposium_turn") & samples["disturbed"]]
    assert len(disturbed), "the fixture has a disturbed iteration that must not count"
    logs = np.log(times["none"] / times["dynamic"]).dropna()
    expected = paired.ratio([part.tolist() for _, part in logs.groupby("block")])
    row = judge(RATIO, one)
    assert row["value"] == pytest.approx(expected.value)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(expected.interval.as_tuple())
    assert (row["rounds"], row["blocks"]) == (expected.rounds, 3)
    assert row["smallest_difference"] == pytest.approx(expected.smallest_difference)
    assert row["verdict"] == "reproduced"


def test_ratio_of_the_headline_names_its_cell_and_records(one):
    row = judge(RATIO, one)
    assert row["measured_on"] == (
        "llama-3.2-1b-geometry, float32 on cpu, symposium_turn (152 + 150 tokens)"
    )
    stem = "results/cells/kv/cpu/llama-3.2-1b-geometry/symposium_turn"
    assert f"{stem}/none/r1.json" in row["cells"]
    assert f"{stem}/dynamic/r3.json" in row["cells"]


def test_ratio_can_be_asked_at_the_longest_prompt(one):
    row = judge(RATIO | {"scenario": "sweep", "prompt_tokens": "longest"}, one)
    assert "context_growth (2048 + 16 tokens)" in row["measured_on"]
    shortest = judge(RATIO | {"scenario": "sweep", "prompt_tokens": "shortest"}, one)
    assert row["value"] > shortest["value"]


def test_ratio_of_lengths_that_were_not_run_is_not_tested(one):
    row = judge(RATIO | {"scenario": "sweep", "prompt_tokens": {"at_least": 100_000}}, one)
    assert row["verdict"] == "not tested"
    assert "no turn of these lengths" in row["reason"]


def test_bytes_of_the_cache_have_no_interval_to_doubt(one):
    measure = RATIO | {
        "metric": "kv_mib",
        "numerator": "dynamic",
        "denominator": "quantized_int4",
        "scenario": "sweep",
    }
    row = judge(measure, one)
    assert row["value"] == pytest.approx(1 / 0.28)
    assert row["ci_low"] == row["ci_high"] == row["value"]


def test_peak_memory_of_one_process_has_a_value_and_no_verdict(one):
    samples, summary = one
    alone = samples[samples["replicate"] == 1]
    row = judge(RATIO | {"metric": "peak_memory_mib"}, (alone, summary))
    assert (row["verdict"], row["reason"]) == ("not enough rounds", NO_INTERVAL)
    assert row["value"] is not None
    assert row["ci_low"] is None
    assert claims.measured_text(row).endswith("(no interval)")


def test_cells_that_ran_one_after_the_other_are_not_judged(one):
    samples, summary = one
    row = judge(RATIO, (samples.assign(block=None, round=None), summary))
    assert (row["verdict"], row["rounds"]) == ("not enough rounds", 0)
    assert row["reason"] == "not enough rounds: 0 of 10"
    assert row["value"] == pytest.approx(5.0, rel=0.5)
    assert row["ci_low"] is None


def test_a_machine_whose_test_needs_more_rounds_gets_no_verdict_from_fewer(one):
    samples, summary = one
    needed = {"here": Evidence(rounds=30, blocks=1)}
    (row,) = claims.evaluate([claim(RATIO)], samples, summary, {}, needed)
    assert row["verdict"] == "not enough rounds"
    assert "11 of 30" in row["reason"]
    assert row["ci_low"] < row["value"] < row["ci_high"]


def test_a_block_whose_control_is_off_is_not_judged(one):
    samples, summary = one
    off = summary.assign(not_judged=f"{metrics.CONTROL_OFF} by 6.0 %")
    row = judge(RATIO, (samples, off))
    assert (row["verdict"], row["reason"]) == (
        "not enough rounds",
        f"{metrics.CONTROL_OFF} by 6.0 %",
    )


def test_a_target_is_met_or_not_met(one):
    samples, summary = one
    given = [
        claim(RATIO, Bound(low=2), id="reached", kind="target"),
        claim(RATIO, Bound(low=100), id="missed", kind="target"),
    ]
    rows = claims.evaluate(given, samples, summary, {})
    assert [row["verdict"] for row in rows] == ["met", "not met"]


def test_only_finished_replicates_count(one):
    samples, summary = one
    half = (
        samples["strategy"].eq("none") & samples["replicate"].eq(2) & samples["turn"].gt(1)
    ) & samples["scenario"].eq("context_growth")
    wrong = samples.copy()
    wrong.loc[samples["strategy"].eq("none") & samples["replicate"].eq(2), "e2e_s"] *= 1000
    measure = RATIO | {"scenario": "sweep"}
    without = samples[~(samples["strategy"].eq("none") & samples["replicate"].eq(2))]
    expected = judge(measure, (without, summary))["value"]
    assert judge(measure, (wrong[~half], summary))["value"] == pytest.approx(expected)


def test_fastest_is_held_against_its_nearest_rival(one):
    measure = {
        "kind": "fastest",
        "strategy": "static",
        "among": ["none", "dynamic"],
        "scenario": "headline",
    }
    fastest = judge(measure, one)
    nearest = judge(RATIO | {"numerator": "dynamic", "denominator": "static"}, one)
    assert fastest["value"] == pytest.approx(nearest["value"])


def test_fastest_is_refuted_when_one_rival_is_faster(one):
    measure = {
        "kind": "fastest",
        "strategy": "dynamic",
        "among": ["none", "static_compiled"],
        "scenario": "sweep",
    }
    assert judge(measure, one)["verdict"] == "refuted"


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_growth_recovers_the_exponent(one, exponent):
    samples, summary = one
    grown = samples.copy()
    context = grown["prompt_tokens"] + (grown["new_tokens"] - 1) / 2
    wobble = 1 + 0.001 * grown["iteration"] * grown["replicate"]
    grown["e2e_s"] = context**exponent * wobble
    measure = {"kind": "growth", "metric": "e2e_s", "strategy": "none", "scenario": "conversation"}
    row = judge(measure, (grown, summary))
    assert row["value"] == pytest.approx(exponent, rel=1e-6)


def test_growth_needs_three_lengths(one):
    measure = {"kind": "growth", "metric": "e2e_s", "strategy": "none", "scenario": "headline"}
    row = judge(measure, one)
    assert (row["verdict"], row["reason"]) == (
        "not tested",
        "a growth needs turns of at least three lengths",
    )


def test_value_takes_the_interval_of_the_summary(one):
    _, summary = one
    measure = {
        "kind": "value",
        "column": "e2e_s_median",
        "strategy": "dynamic",
        "scenario": "headline",
    }
    row = judge(measure, one)
    cell = summary[(summary["scenario"] == "symposium_turn") & (summary["strategy"] == "dynamic")]
    assert row["value"] == cell["e2e_s_median"].item()
    assert row["ci_low"] == cell["e2e_s_ci_low"].item()


def test_the_lowest_success_rate_decides(one):
    samples, summary = one
    measure = {"kind": "extreme", "column": "success_rate", "pick": "lowest"}
    assert judge(measure, one, Bound(low=1))["verdict"] == "reproduced"
    failed = summary.copy()
    failed.loc[failed["strategy"] == "paged", "success_rate"] = 0.5
    row = judge(measure, (samples, failed), Bound(low=1))
    assert (row["verdict"], row["value"]) == ("refuted", 0.5)
    spared = judge(measure | {"strategies": ["none"]}, (samples, failed), Bound(low=1))
    assert spared["verdict"] == "reproduced"


def test_inexact_strategies_do_not_break_the_claim_of_equal_tokens(one):
    measure = {
        "kind": "extreme",
        "column": "tokens_match_reference",
        "pick": "lowest",
        "exact": True,
    }
    assert judge(measure, one)["value"] == 1
    assert judge(measure | {"exact": False}, one)["value"] == 0.6


def test_the_reference_alone_shows_no_equality(one):
    samples, summary = one
    alone = summary[summary["strategy"] == "dynamic"]
    measure = {"kind": "extreme", "column": "tokens_match_reference", "pick": "lowest"}
    assert judge(measure, (samples, alone))["verdict"] == "not tested"


def test_a_claim_about_three_strategies_needs_all_three(one):
    samples, summary = one
    measure = {
        "kind": "extreme",
        "column": "success_rate",
        "pick": "lowest",
        "strategies": ["none", "dynamic", "static"],
    }
    two = summary[summary["strategy"] != "static"]
    assert judge(measure, (samples, two))["reason"] == "static: not measured"


def test_a_cell_that_was_not_run_says_why(one):
    measure = RATIO | {"denominator": "offloaded", "scenario": "sweep"}
    row = judge(measure, one)
    assert row["verdict"] == "not tested"
    assert row["reason"].startswith("offloaded: unsupported (offloaded caches need CUDA")


def test_a_filter_that_fits_no_cell_says_so(one):
    row = judge(RATIO | {"dtype": ["bfloat16"]}, one)
    assert row["reason"] == "symposium_turn was not measured with dtype bfloat16"


def test_every_machine_has_its_own_row():
    summary, samples = synthetic_kv.tables(("here", "gpu-box"))
    rows = claims.evaluate([claim(RATIO)], samples, summary, {})
    assert [row["machine"] for row in rows] == ["here", "gpu-box"]
    assert "llama-3.2-1b, bfloat16 on cuda" in rows[1]["measured_on"]
    assert rows[1]["cells"][0].startswith("results/recorded/gpu-box/cells/kv/cuda/")


def test_nothing_measured_leaves_every_claim_in_place(shipped):
    rows = claims.evaluate(shipped, *empty_tables(), {})
    assert [row["id"] for row in rows] == [one.id for one in shipped]
    untested = [row for row in rows if row["verdict"] == "not tested"]
    assert {row["machine"] for row in untested} == {"here"}
    assert all(row["reason"] for row in untested)
    assert {row["id"] for row in rows if row["verdict"] != "not tested"} == {
        one.id for one in shipped if one.measure["kind"] == "formula"
    }


@pytest.mark.parametrize(("tokens", "gib"), [("512", 0.25), ("2048", 1.0)])
def test_llama_2_7b_needs_an_eighth_of_what_the_guide_says(shipped, tokens, gib):
    chosen = [one for one in shipped if one.id == f"llama2_7b_{tokens}_tokens"]
    (row,) = claims.evaluate(chosen, *empty_tables(), {})
    assert (row["value"], row["verdict"], row["machine"]) == (gib, "refuted", "")


def test_recomputing_takes_a_hundred_times_the_arithmetic(shipped):
    chosen = [one for one in shipped if one.id == "recompute_work_100_times"]
    (row,) = claims.evaluate(chosen, *empty_tables(), {})
    assert row["value"] == pytest.approx(100.06, abs=0.01)


# ---------------------------------------------------------------------------- studies and tables


def stampede(loads_at_once, status="ok", reason=None):
    row = dict.fromkeys(studies.get("stampede").columns)
    row |= {"machine": "here", "cell": "c1", "status": status, "reason": reason}
    if status == "ok":
        row |= {
            "protection": "xfetch",
            "beta": 1.0,
            "threads": 50,
            "exclusive": False,
            "loads": 9,
            "loads_at_once": loads_at_once,
            "wait_p99_s": 0.1,
            "wait_p99_s_ci_low": 0.09,
            "wait_p99_s_ci_high": 0.11,
        }
    return {"stampede": pd.DataFrame([row])}


XFETCH = {"kind": "study", "study": "stampede", "value": "stampede_xfetch_loads_at_once"}


def test_a_count_of_a_study_is_exact_only_if_the_claim_says_so():
    row = judge(XFETCH | {"exact": True}, empty_tables(), Bound(1, 1), stampede(50))
    assert (row["verdict"], row["value"]) == ("refuted", 50)
    assert row["cells"] == ["results/cells/app/stampede/c1.json"]
    unsure = judge(XFETCH, empty_tables(), Bound(1, 1), stampede(50))
    assert (unsure["verdict"], unsure["reason"]) == ("not enough rounds", NO_INTERVAL)


def test_a_study_that_could_not_run_gives_its_reason():
    found = stampede(1, "unsupported", "no cache server is installed")
    row = judge(XFETCH, empty_tables(), None, found)
    assert (row["verdict"], row["reason"]) == ("not tested", "no cache server is installed")


def test_a_study_that_was_left_out_is_not_tested():
    row = judge(XFETCH, empty_tables())
    assert row["reason"] == "study stampede was not measured"


def test_the_ratio_of_two_values_takes_the_wider_interval(monkeypatch):
    given = {"s_slow": Value(10.0, (9.0, 11.0)), "s_fast": Value(2.0, (1.0, 4.0))}

    class Fake:
        @staticmethod
        def values(_table):
            return given

    monkeypatch.setattr(studies, "get", lambda name: Fake)
    table = {"s": pd.DataFrame([{"machine": "here", "cell": "c", "status": "ok", "reason": None}])}
    measure = {"kind": "study", "study": "s", "value": "s_slow", "over": "s_fast"}
    row = judge(measure, empty_tables(), None, table)
    assert (row["value"], row["ci_low"], row["ci_high"]) == (5.0, 2.25, 11.0)


def test_a_comparison_of_a_study_says_what_it_rests_on_and_would_have_found(monkeypatch):
    given = {"s_gain": Value(1.2, (1.1, 1.3), rounds=40, smallest_difference=0.12)}
    fake = type("Fake", (), {"values": staticmethod(lambda _table: given)})
    monkeypatch.setattr(studies, "get", lambda name: fake)
    table = {"s": pd.DataFrame([{"machine": "here", "cell": "c", "status": "ok", "reason": None}])}
    row = judge({"kind": "study", "study": "s", "value": "s_gain"}, empty_tables(), None, table)
    assert (row["rounds"], row["smallest_difference"]) == (40, 0.12)
    assert pages.seen_text(row) == "12 %"


@pytest.mark.parametrize("over", [{}, {"over": "s_other"}])
def test_a_comparison_of_a_study_that_is_not_judged_has_no_verdict_and_says_why(monkeypatch, over):
    given = {
        "s_gain": Value(1.2, not_judged=metrics.ALL_DISTURBED, rounds=0),
        "s_other": Value(1.0, (0.9, 1.1)),
    }
    fake = type("Fake", (), {"values": staticmethod(lambda _table: given)})
    monkeypatch.setattr(studies, "get", lambda name: fake)
    table = {"s": pd.DataFrame([{"machine": "here", "cell": "c", "status": "ok", "reason": None}])}
    measure = {"kind": "study", "study": "s", "value": "s_gain", **over}
    row = judge(measure, empty_tables(), None, table)
    assert (row["verdict"], row["reason"]) == ("not enough rounds", metrics.ALL_DISTURBED)


def test_a_further_table_is_judged_by_its_worst_row():
    quality = pd.DataFrame(
        {
            "machine": "here",
            "strategy": ["quantized_int4", "quantized_int4", "dynamic"],
            "kl_mean": [0.002, 0.02, 0.5],
            "kl_mean_ci_low": [0.001, 0.015, 0.4],
            "kl_mean_ci_high": [0.003, 0.025, 0.6],
        }
    )
    measure = {
        "kind": "table",
        "table": "kv_quality",
        "column": "kl_mean",
        "where": {"strategy": "quantized_int4"},
        "pick": "highest",
    }
    row = judge(measure, empty_tables(), Bound(high=0.01), {"kv_quality": quality})
    assert (row["verdict"], row["value"]) == ("refuted", 0.02)
    with pytest.raises(InputError, match="unknown column 'kl_median'"):
        judge(measure | {"column": "kl_median"}, empty_tables(), None, {"kv_quality": quality})


# ---------------------------------------------------------------------------- the file


def test_every_shipped_claim_names_its_document_and_kind(shipped):
    assert {claim.document for claim in shipped} == {"S1", "S2", "S3", "S4", "other", "ours"}
    assert all(claim.kind for claim in shipped)
    ours = {claim.id for claim in shipped if claim.document == "ours"}
    assert ours == {claim.id for claim in shipped if claim.kind == "hypothesis"}


def test_nothing_that_no_document_printed_is_called_the_documents_own():
    text = SHIPPED.read_text(encoding="utf-8")
    for never_printed in ("31.7", "0.008", "4.45 MB"):
        assert never_printed not in text
    sources = yaml.safe_load(text)
    success = [one for one in sources["claims"] if one["measure"].get("column") == "success_rate"]
    assert {one["document"] for one in success} == {"ours"}


def test_a_number_printed_for_the_1b_model_is_held_against_that_shape_only(shipped):
    own = [one for one in shipped if one.document == "S1" and one.kind in ("printed", "derived")]
    timed = [one for one in own if one.unit]
    assert timed
    for claim in timed:
        assert all(name.startswith("llama-3.2-1b") for name in claim.measure["model"]), claim.id


def test_derived_figures_are_the_quotients_of_what_was_printed(shipped):
    printed = {
        "dynamic_speedup_derived": 314.42 / 58.71,
        "static_speedup_derived": 314.42 / 56.52,
        "static_over_dynamic_derived": 58.71 / 56.52,
        "memoization_speedup_derived": 9.122187 / 0.000022,
        "http_dict_1_derived": 0.149507523 / 0.073524475,
        "http_lru_cache_1_derived": 0.149507523 / 0.026438475,
        "http_dict_10_derived": 0.218742847 / 0.019894361,
        "http_lru_cache_10_derived": 0.218742847 / 0.011918306,
        "http_dict_100_derived": 1.577921152 / 0.043052197,
        "http_lru_cache_100_derived": 1.577921152 / 0.026732683,
        "http_dict_500_derived": 7.365094662 / 0.011998177,
        "http_lru_cache_500_derived": 7.365094662 / 0.011190891,
    }
    derived = {one.id: one.figure_value for one in shipped if one.kind == "derived"}
    assert set(derived) == set(printed)
    for name, value in printed.items():
        assert derived[name] == pytest.approx(value, rel=0.003), name


def test_what_cannot_be_tested_says_why_in_both_languages():
    rows = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))["not_tested"]
    assert {row["document"] for row in rows} == {"S1", "S2", "S3", "S4", "other"}
    for row in rows:
        assert row["reason"]["en"] != row["reason"]["pt"]


def test_every_statement_of_the_documents_has_a_claim_or_a_reason(shipped):
    rows = yaml.safe_load((ROOT / "tests" / "data" / "source_rows.yaml").read_text("utf-8"))
    entries = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))["not_tested"]
    for document, statements in rows.items():
        known = {one.id for one in shipped if one.document == document}
        places = {entry["place"] for entry in entries if entry["document"] == document}
        answered = [set(row.get("claims", ())) for row in statements.values()]
        excused = [set(row.get("untested", ())) for row in statements.values()]
        assert all(one or other for one, other in zip(answered, excused, strict=True))
        # In both directions: no statement is forgotten, and none is attributed to a document at will.
        assert set().union(*answered) == known, document
        assert set().union(*excused) == places, document


def test_the_cache_client_has_neither_method_that_the_guide_calls():
    redis = pytest.importorskip("redis")
    assert not hasattr(redis.Redis, "delete_pattern")
    assert list(inspect.signature(redis.Redis.setex).parameters) == [
        "self",
        "name",
        "time",
        "value",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"measure": RATIO | {"numerator": "magic"}},
            "measure.numerator: unknown strategy 'magic'",
        ),
        ({"measure": RATIO | {"metric": "e3e_s"}}, "measure.metric: unknown metric 'e3e_s'"),
        ({"measure": RATIO | {"scenario": "x"}}, "measure.scenario: unknown scenario 'x'"),
        ({"measure": RATIO | {"model": ["gpt"]}}, "measure.model: unknown model 'gpt'"),
        ({"measure": RATIO | {"value": "x"}}, "kind ratio has no key value; it takes metric"),
        ({"measure": {"kind": "ratio", "metric": "e2e_s"}}, "kind ratio needs numerator"),
        ({"measure": {"kind": "guess"}}, "measure.kind is 'guess'; use one of ratio"),
        ({"document": "S2"}, "document: unknown document 'S2'"),
        ({"document": "other"}, "document other needs author, title, url, date"),
        ({"measure": RATIO | {"allowance": 2.0}}, "measure: unknown key 'allowance'"),
        (
            {"measure": RATIO | {"denominator": "none"}},
            "(a_claim): measure: numerator and denominator are both 'none'",
        ),
        (
            {
                "measure": {
                    "kind": "fastest",
                    "strategy": "static",
                    "among": ["static"],
                    "scenario": "headline",
                }
            },
            "(a_claim): measure: among names 'static' alone",
        ),
        ({"holds_if": {"above": math.nan}}, "claims[0].holds_if.above is nan; it must be a finite"),
        ({"holds_if": {"above": 10**400}}, "claims[0].holds_if.above has 401 digits; it must be"),
        ({"holds_if": {"below": math.inf}}, "claims[0].holds_if.below is inf"),
        ({"figure": {"value": math.nan}}, "claims[0].figure.value is nan"),
        ({"holds_if": {"within_factor": 2}}, "holds_if.within_factor needs a positive figure"),
        ({"holds_if": {"at_least": 2, "at_most": 1}}, "is not one interval"),
        ({"holds_if": {"at_least": 2, "above": 1}}, "is not one interval"),
        ({"statement": {"en": "x"}}, "statement: missing key 'pt'"),
        ({"id": "Bad Id"}, "claims[0].id"),
        (
            {"measure": {"kind": "study", "study": "nap", "value": "nap_s"}},
            "measure.study: unknown study 'nap'",
        ),
        (
            {"measure": {"kind": "study", "study": "stampede", "value": "stampede_x"}},
            "measure.value: unknown value of stampede 'stampede_x'",
        ),
        (
            {"measure": {"kind": "extreme", "column": "speed", "pick": "lowest"}},
            "measure.column: unknown column 'speed'",
        ),
        (
            {
                "measure": {
                    "kind": "formula",
                    "quantity": "kv_bytes",
                    "tokens": 1,
                    "bytes_per_element": 2,
                    "architecture": {"hidden_size": 64},
                }
            },
            "num_hidden_layers is missing",
        ),
    ],
)
def test_a_wrong_claim_is_one_line_that_names_file_and_key(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        load(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert message in str(caught.value)
    assert str(tmp_path / "claims.yaml") in str(caught.value)


def test_an_id_is_taken_once(tmp_path):
    path = written(tmp_path)
    document = yaml.safe_load(path.read_text())
    document["claims"] *= 2
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match="the id is already taken"):
        claims.load(path, scenarios=[])


def test_a_file_without_claims_is_refused(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text("documents: {S1: A document}\nclaims: []\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"claims\.yaml: claims"):
        claims.load(path, scenarios=[])


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text() + "documents: {S2: Another}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line \d+: the key 'documents' stands twice"):
        claims.load(path, scenarios=[])


# ---------------------------------------------------------------------------- what is written


def test_expectations_that_fail_are_found_and_untested_ones_are_not(one):
    samples, summary = one
    slower = RATIO | {"numerator": "dynamic", "denominator": "none"}
    given = [
        claim(RATIO, id="right", expected="reproduced"),
        claim(slower, id="wrong", expected="reproduced"),
        claim(XFETCH, id="absent", expected="reproduced"),
        claim(slower, id="free"),
    ]
    rows = claims.evaluate(given, samples, summary, {})
    assert [row["id"] for row in claims.unexpected(rows)] == ["wrong"]
    with pytest.raises(InputError, match=r"wrong \(here\) is refuted, expected reproduced"):
        claims.hold(rows)
    claims.hold([row for row in rows if row["id"] != "wrong"])


def test_the_terminal_table_shows_the_measurement_beside_the_figure(one):
    samples, summary = one
    rows = claims.evaluate([claim(RATIO, figure="5.36x", unit="x")], samples, summary, {})
    text = claims.claims_table(rows)
    line = next(line for line in text.splitlines() if "a_claim" in line)
    assert line.startswith("reproduced")
    assert "5.36x" in line
    assert claims.measured_text(rows[0]) in line
    assert "> 1x" in line


def test_files_agree_and_can_be_read_again(tmp_path, shipped, one):
    samples, summary = one
    rows = claims.evaluate(shipped, samples, summary, {})
    claims.write(tmp_path, rows)
    from_json = claims.read(tmp_path / "claims.json")
    from_csv = claims.read(tmp_path / "claims.csv")
    assert json.loads(json.dumps(rows)) == from_json
    assert [row["cells"] for row in from_csv] == [row["cells"] for row in from_json]
    assert claims.claims_table(from_csv) == claims.claims_table(from_json)
    text = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert all(text.count(f"`{one.id}`") <= 1 for one in shipped)


def test_a_file_that_is_no_claims_table_is_refused(tmp_path):
    path = tmp_path / "claims.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not the claims of this version"):
        claims.read(path)


def test_the_paper_finds_every_column_it_reads(one, shipped):
    samples, summary = one
    rows = claims.evaluate(shipped, samples, summary, {})
    context = numbers.section_context({}, rows, lang="pt")
    first = context["claims"][0]
    assert first["statement"].startswith("Sem cache, um turno de 152 + 150 tokens leva 314,42 s")
    assert first["figure"] == "314.42 s"
    assert first["measured"].ci == (rows[0]["ci_low"], rows[0]["ci_high"])
    untested = next(entry for entry in context["claims"] if entry["verdict"] == "not tested")
    assert untested["reason"]


def test_claims_are_judged_without_torch_and_plotting():
    code = (
        "import sys; sys.path.insert(0, 'workflow')\n"
        "from pathlib import Path\n"
        "from kvbench.analysis import claims\n"
        "claims.load(Path('config/claims.yaml'))\n"
        "bad = {'torch', 'transformers', 'matplotlib', 'seaborn'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(bad)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------ the pages


def row(name="one", machine="here", verdict="reproduced", **given):
    """A row of the table of claims."""
    found = dict.fromkeys(claims.COLUMNS)
    found |= {"id": name, "machine": machine, "verdict": verdict, "document": "S1", "unit": "s"}
    found |= {"statement_en": f"Claim {name}.", "statement_pt": f"Afirmação {name}."}
    found |= {"place": "section 4", "bound": "> 1 s", "measured_on": "", "source": "a document"}
    return found | given


def test_a_page_has_a_claim_once_with_the_machines_that_tested_it():
    rows = [
        row(value=2.5, ci_low=2.0, ci_high=3.0),
        row(machine="lab", verdict="not tested", reason="study http was not measured"),
        row(
            machine="box",
            verdict="not enough rounds",
            value=4.0,
            reason="not enough rounds: 2 of 10",
        ),
    ]
    text = claims.page(rows, "en", {"here": {"cpu": "Some CPU", "cores": 2, "gpu": None}})
    assert text.count("Claim one.") == 1
    assert "- ✓ **reproduced**, this machine: 2.5 s [2, 3]" in text
    assert "- – **not enough rounds**, box: 4 s; 2 of 10 rounds" in text
    assert "was not measured" not in text
    assert "| this machine (Some CPU, 2 cores) | 1 | 0 | 0 |" in text


def test_what_no_machine_tested_stands_once_at_the_end_with_its_reasons():
    rows = [
        row("absent", machine, "not tested", reason="study http was not measured")
        for machine in ("here", "lab")
    ]
    text = claims.page([row(value=1.0), *rows], "en", {})
    end = text.partition("## Tested on no machine")[2]
    assert end.count("Claim absent. *study http was not measured.*") == text.count("absent") == 1


def test_the_portuguese_page_has_portuguese_reasons_commas_and_semicolons():
    rows = [
        row(value=2.5, ci_low=2.25, ci_high=3.5),
        row("b", verdict="not tested", reason="study http was not measured"),
    ]
    text = claims.page(rows, "pt", {})
    assert "**reproduzida**, esta máquina: 2,5 s [2,25; 3,5]" in text
    assert "o estudo http não foi medido" in text and "seção 4" in text


@pytest.mark.parametrize(
    ("verdicts", "outcome"),
    [
        (("reproduced", "met", "not tested"), "held"),
        (("refuted", "not enough rounds"), "failed"),
        (("reproduced", "refuted"), "mixed"),
        (("inconclusive",), "mixed"),
        (("not enough rounds", "not tested"), "open"),
    ],
)
def test_the_verdicts_of_all_machines_make_one_outcome(verdicts, outcome):
    rows = [row(machine=f"m{n}", verdict=one) for n, one in enumerate(verdicts)]
    assert claims.outcomes(rows)[outcome] == 1
    assert sum(claims.outcomes(rows).values()) == 1


def test_every_shipped_claim_has_a_label_of_its_own_in_each_language(shipped):
    for language in ("en", "pt"):
        labels = [one.named(language) for one in shipped]
        assert len(set(labels)) == len(labels)
        assert not [label for label in labels if "_" in label.replace("lru_cache", "")]


# ---------------------------------------------------------------------------- the figure


def draw(rows):
    from kvbench.figures import claims as figure

    return figure.draw(rows)


def words(figure):
    found = figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
    return [artist.get_text() for artist in found]


def test_the_figure_has_a_row_per_claim_and_a_panel_per_machine(shipped):
    summary, samples = synthetic_kv.tables(("here", "gpu-box"))
    rows = claims.evaluate(shipped, samples, summary, {})
    figure = draw(rows)
    assert len(figure.axes) == 2
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == [one.label["en"] for one in shipped]


def test_the_figure_prints_the_measurement_of_every_row(shipped, one):
    samples, summary = one
    rows = claims.evaluate(shipped, samples, summary, {})
    shown = words(draw(rows))
    for row in rows:
        expected = row["verdict"] if row["value"] is None else claims.measured_text(row)
        assert expected in shown


def test_the_figure_gives_each_verdict_its_own_colour_and_symbol():
    from kvbench.figures.claims import VERDICTS

    assert set(VERDICTS) == set(claims.VERDICTS)
    for part in (0, 1):
        assert len({look[part] for look in VERDICTS.values()}) == len(VERDICTS)


def test_the_figure_names_machines_it_leaves_out(shipped):
    machines = ("here", "box-a", "box-b", "box-c")
    summary, samples = synthetic_kv.tables(machines, scenarios=("symposium_turn",))
    figure = draw(claims.evaluate(shipped[:2], samples, summary, {}))
    assert len(figure.axes) == 3
    assert "not shown: box-c" in words(figure)


def test_the_figure_of_no_claims_says_so():
    assert "there are no claims" in words(draw([]))


def test_where_a_statement_stands_is_said_in_the_readers_language():
    from kvbench.analysis.claims.pages import source_text

    own = {"document": "S1", "place": "section 4, output of the run, turn 1", "source": "unused"}
    assert source_text(own, "pt").endswith("2025, seção 4, saída da execução, turno 1")
    assert source_text({"document": "", "place": "", "source": "x"}, "pt") == "Nossas hipóteses"
    other = {"document": "other", "place": "memory", "source": "A. Author, A Title, 2024, memory"}
    assert source_text(other, "pt") == "A. Author, A Title, 2024, memória"
