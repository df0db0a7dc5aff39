"""Figures of the studies: drawn from the committed record, and no variant of a study is left out."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from kvbench import studies
from kvbench.analysis import tables
from kvbench.figures import _app, _variants, kv_profile
from matplotlib.text import Text

RECORDED = Path(__file__).parents[2] / "results" / "recorded"

#: Figure, and the column and the variant that is renamed in its table.
RENAMED = [
    ("app_eviction", "policy", "sieve"),
    ("app_expiry", "policy", "tag"),
    ("app_http", "client", "dict"),
    ("app_layered", "configuration", "l1_l2"),
    ("app_llm_api", "call", "repeated"),
    ("app_memoization", "variant", "dict"),
    ("app_one_stream", "strategy", "exact"),
    ("app_resilience", "client", "breaker"),
    ("app_resilience", "fault", "slow"),
    ("app_response_cache", "backend", "sqlite"),
    ("app_response_cache", "policy", "pool"),
    ("app_stampede", "protection", "single_flight"),
    ("app_write_policy", "policy", "write_around"),
]


def table_of(figure: str) -> pd.DataFrame:
    """The table of a study as it comes out of the committed records of one machine."""
    study = studies.get(figure.removeprefix("app_"))
    folders = sorted(RECORDED.glob(f"*/cells/app/{study.name}"))
    assert folders, f"no committed record of {study.name}"
    files = sorted(folders[-1].glob("*.json"))
    records = [json.loads(file.read_text()) for file in files]
    return tables.app_table(study.columns, {"here": records}, study.aggregate)


def words_of(figure: plt.Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize(("figure", "column", "variant"), RENAMED)
def test_a_variant_that_a_figure_does_not_know_is_drawn_under_its_own_name(figure, column, variant):
    table = table_of(figure)
    assert (table[column] == variant).any()
    table[column] = table[column].replace({variant: "brand_new"})
    drawn = importlib.import_module(f"kvbench.figures.{figure}").draw(table)
    assert "brand new" in words_of(drawn)
    plt.close(drawn)


def test_known_variants_keep_their_order_and_unknown_ones_follow():
    assert _variants.labels({"b": "B", "a": "A"}, ["new_one", "a", float("nan"), "new_one"]) == {
        "b": "B",
        "a": "A",
        "new_one": "new one",
    }


def test_an_unknown_variant_gets_a_look_as_long_as_the_known_ones():
    assert _variants.looks({"a": ("A", "blue")}, ["x"])["x"][0] == "x"
    assert len(_variants.looks({"a": ("A", "blue")}, ["x"])["x"]) == 2
    assert len(_variants.looks({"a": ("A", "blue", "o")}, ["x"])["x"]) == 3


@pytest.mark.parametrize(
    ("counts", "said"),
    [([1, 1], "n = 1 run"), ([10, 10], "n = 10 runs"), ([1, 1200], "n = 1 to 1,200 runs")],
)
def test_a_title_counts_one_in_the_singular(counts, said):
    rows = pd.DataFrame({"machine": "here", "runs": counts})
    assert _app.title("Why?", rows, "runs", "runs").endswith(said)


def test_the_parts_of_a_token_are_told_apart_without_colour():
    hatches = [hatch for _, _, hatch in kv_profile.PARTS.values()]
    assert len(set(hatches)) == len(hatches)
