"""Memoised functions: what they compute, how often, and what the study says about it."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import jsonschema
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import study_runs
from kvbench import studies
from kvbench.caching import memo
from kvbench.errors import InputError
from kvbench.paper import sections, tex
from kvbench.studies import _estimates, _values, memoization

ROOMY = ("cache", "lru_cache", "lru_128", "lru_3", "dict")


@pytest.mark.parametrize("variant", memo.VARIANTS)
@pytest.mark.parametrize(("n", "number"), [(0, 0), (1, 1), (2, 1), (10, 55), (16, 987)])
def test_every_variant_computes_the_fibonacci_number(variant, n, number):
    assert memo.build(variant).call(n) == number


@pytest.mark.parametrize("variant", ROOMY)
@pytest.mark.parametrize("n", [2, 3, 10, 20, 30, 35])
def test_room_for_three_results_computes_each_number_once(variant, n):
    function = memo.build(variant)
    function.call(n)
    assert function.counts() == (n + 1, n - 2) == memo.ideal_counts(n)
    function.call(n)
    assert function.counts() == (n + 1, n - 1) == memo.ideal_counts(n, calls=2)


@pytest.mark.parametrize(
    ("variant", "n", "misses"), [("lru_2", 35, 208_627), ("lru_1", 20, 21_891)]
)
def test_less_room_than_three_falls_off_a_cliff(variant, n, misses):
    function = memo.build(variant)
    function.call(n)
    assert function.counts()[0] == misses


@pytest.mark.parametrize("n", [0, 1, 2, 10, 20])
def test_recursion_without_a_cache_makes_2_f_of_n_plus_1_minus_1_calls(n):
    assert memo.counted_calls(n) == memo.plain_calls(n) == 2 * memo.fibonacci(n + 1) - 1


def test_every_build_is_fresh():
    memo.build("cache").call(10)
    assert memo.build("cache").counts() == (0, 0)


def test_cache_is_lru_cache_without_a_bound():
    def info(function):
        return function.call.cache_parameters()

    assert info(memo.build("cache")) == info(memo.build("lru_cache"))


@pytest.mark.parametrize("result", [None, 0, "", []])
def test_dict_cache_remembers_false_results(result):
    calls = []
    function = memo.DictCache(lambda argument: calls.append(argument) or result)
    assert function(1) == function(1) == result
    assert calls == [1]


def test_dict_cache_does_not_remember_an_exception():
    calls = []

    @memo.DictCache
    def fails_once():
        calls.append(1)
        if len(calls) == 1:
            raise OSError("first time")
        return "well"

    with pytest.raises(OSError, match="first time"):
        fails_once()
    assert fails_once() == "well"


def test_unknown_variant_is_refused_and_the_known_ones_are_named():
    with pytest.raises(InputError, match=r"unknown variant 'memo'.*lru_cache"):
        memo.build("memo")


# --- the study ---


def table(tmp_path, **changed):
    return study_runs.table("memoization", tmp_path, **changed)


def test_study_measures_what_theory_says_about_counts(tmp_path):
    rows = table(tmp_path, n=[10, 12], repeats=7)
    values = memoization.values(rows)
    assert values["memoization_counts_wrong"].value == 0
    # Five roomy variants cold and warm and the plain recursion, for two n.
    assert values["memoization_counts_checked"].value == 22


def test_study_gives_the_guides_numbers_at_n_35(tmp_path):
    cached = [name for name in memo.VARIANTS if name != "plain"]
    # Every round, however long the machine takes.
    rows = table(tmp_path, n=[35], repeats=12, variants=cached, variant_limit_s=600)
    values = memoization.values(rows)
    assert 0 < values["memoization_cache_s"].value < 0.01
    assert values["memoization_lru_2_misses"].value == 208_627
    low, high = values["memoization_cache_over_lru_cache"].ci
    assert low < values["memoization_cache_over_lru_cache"].value < high
    assert values["memoization_plain_s"].value is None
    # The way the document used: a bare lru_cache, with its 128 places.
    assert values["memoization_cache_over_lru_128"].ci is not None


def test_study_draws_no_conclusion_from_fewer_than_ten_rounds(tmp_path):
    rows = table(tmp_path, n=[35], repeats=9, variants=["cache", "lru_cache"])
    ratio = memoization.values(rows)["memoization_cache_over_lru_cache"]
    assert ratio.value > 0 and ratio.ci is None


def test_study_compares_within_rounds_and_not_across_a_change_of_the_machine():
    """Both are three times as slow from the fifth round on, in which alone they differ in number."""
    weather = [1.0] * 5 + [3.0] * 15
    arms = {
        "lru_cache": {"round": list(range(20)), "cold_s": weather},
        "cache": {"round": list(range(8)), "cold_s": [2 * one for one in weather[:8]]},
    }
    row = {"n": 20, "variant": "cache", "state": "cold"}
    (found,) = memoization.aggregate({"rows": [row], "samples": {"arms": arms}})
    assert found["ratio_to_lru_cache"] == pytest.approx(2)
    assert found["ratio_to_lru_cache_rounds"] == 8


def test_a_record_from_before_there_were_rounds_keeps_its_ratio_without_an_interval():
    old = {"variant": "cache", "state": "cold", "ratio_to_lru_cache": 1.1, "ratio_ci_low": 1.0}
    assert memoization.aggregate({"rows": [old], "samples": {"times_s": {}}}) == [
        {"variant": "cache", "state": "cold", "ratio_to_lru_cache": 1.1}
    ]


def test_study_stops_repeating_a_slow_variant(tmp_path):
    rows = table(tmp_path, n=[20], repeats=50, variants=["plain", "cache"], variant_limit_s=1e-5)
    samples = rows[rows["state"] == "cold"].set_index("variant")["samples"]
    assert samples["plain"] == 1


@pytest.mark.parametrize("name", ["memoization", "http", "eviction", "write_policy", "expiry"])
def test_values_of_an_empty_table_are_all_named_and_all_empty(name):
    study = studies.get(name)
    values = study.values(pd.DataFrame(columns=list(study.columns)))
    assert values
    assert all(key.startswith(f"{name}_") for key in values)
    assert all(value.value is None for value in values.values())


@pytest.mark.parametrize("name", ["memoization", "http", "eviction", "write_policy", "expiry"])
def test_options_are_documented_and_their_defaults_valid(name):
    schema = studies.get(name).options
    jsonschema.Draft202012Validator.check_schema(schema)
    assert all({"description", "default"} <= set(one) for one in schema["properties"].values())
    jsonschema.validate({k: one["default"] for k, one in schema["properties"].items()}, schema)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("memoization", {"n": [41]}),
        ("memoization", {"variants": ["memo"]}),
        ("http", {"clients": ["curl"]}),
        ("http", {"requests": [0]}),
        ("eviction", {"capacity_shares": [0]}),
        ("eviction", {"policies": ["lfru"]}),
        ("eviction", {"server_policies": ["volatile-all"]}),
        ("write_policy", {"capacity": 0}),
        ("write_policy", {"flush_every": [0]}),
        ("write_policy", {"policies": ["write_sideways"]}),
        ("expiry", {"ttl_s": [0]}),
        ("expiry", {"invalidations": ["hope"]}),
        ("expiry", {"ttl": [10]}),
    ],
)
def test_options_refuse_what_cannot_be_measured(name, wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, studies.get(name).options)


NAMES = ["memoization", "http", "eviction", "write_policy", "expiry"]
TEMPLATES = Path(__file__).resolve().parents[2] / "paper" / "studies"


def filled(name):
    """Values as if everything had been measured: numbers are 2, and the best policy is LRU."""
    study = studies.get(name)
    empty = study.values(pd.DataFrame(columns=list(study.columns)))
    return {
        key: replace(value, value="lru" if key.endswith("_best") else 2, ci=(1.5, 2.5))
        for key, value in empty.items()
    }


@pytest.mark.parametrize("lang", ["en", "pt"])
@pytest.mark.parametrize("name", NAMES)
def test_paragraph_is_written_whatever_was_not_measured(name, lang):
    def written(values, part="text"):
        text = sections.study_tex(name, values, lang, TEMPLATES.parent, part)
        # The name of an unbounded cache is the only None that a reader may see.
        assert "None" not in text.replace("(None)", "")
        return text

    everything = filled(name)
    nothing = {key: replace(value, value=None, ci=None) for key, value in everything.items()}
    full, bare = written(everything), written(nothing)
    assert rf"\label{{sec:{name}}}" in full
    assert rf"\label{{sec:{name}}}" in bare
    assert f"{{app_{name}.{lang}.pdf}}" in written(everything, "tables")
    assert "includegraphics" not in written(nothing, "tables")
    for key in everything:
        for part in ("text", "tables"):
            written(everything | {key: nothing[key]}, part)


@pytest.mark.parametrize("name", NAMES)
def test_units_are_known_to_the_paper(name):
    units = {value.unit for value in filled(name).values()}
    assert units <= {"", "x", *tex.UNITS}


@pytest.mark.parametrize("name", NAMES)
def test_figure_says_so_when_there_is_nothing_to_draw(name):
    module = importlib.import_module(f"kvbench.figures.app_{name}")
    figure = module.draw(pd.DataFrame(columns=["machine", *studies.get(name).columns]))
    assert figure.get_suptitle() == module.QUESTION
    plt.close(figure)


# --- the intervals of these studies ---


def test_mean_interval_is_students():
    mean, (low, high) = _estimates.mean_interval([1.0, 2.0, 3.0])
    # t(0.975; 2) = 4.3027, standard error 1/sqrt(3).
    assert (mean, high - low) == (2.0, pytest.approx(2 * 4.30265 / 3**0.5, rel=1e-5))


def test_share_value_keeps_its_interval_between_0_and_100_percent():
    assert _values.share_value([0.0, 0.01, 0.0]).ci[0] == 0.0
    assert _values.share_value([1.0, 0.99, 1.0]).ci[1] == 100.0
