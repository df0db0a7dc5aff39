"""Both parts of every study: the names that options allow are those that the measuring part knows."""

from __future__ import annotations

import importlib
import json

import jsonschema
import pandas as pd
import pytest
from kvbench import documents, studies
from kvbench.caching import expiry, http, memo, policies, stampede
from kvbench.caching.guards import GUARDS
from kvbench.caching.write_policies import POLICIES as WRITE_POLICIES
from kvbench.measurement import startup
from kvbench.studies.measuring import eviction, semantic

ALL = studies.names()


def allowed(study: str, key: str) -> set[str]:
    return set(studies.get(study).options["properties"][key]["items"]["enum"])


@pytest.mark.parametrize(
    ("study", "key", "known"),
    [
        ("memoization", "variants", memo.VARIANTS),
        ("http", "clients", http.CLIENTS),
        ("http", "behaviours", http.BEHAVIOURS),
        ("eviction", "policies", policies.POLICIES),
        ("eviction", "server_policies", eviction.EXACT),
        ("stampede", "protections", stampede.PROTECTIONS),
        ("write_policy", "policies", WRITE_POLICIES),
    ],
)
def test_an_option_allows_exactly_what_can_be_measured(study, key, known):
    assert allowed(study, key) == set(known)


def test_the_paper_names_every_policy_of_the_semantic_study():
    light = importlib.import_module("kvbench.studies.semantic")
    assert light.POLICIES == semantic.POLICIES == ("static", "context", *GUARDS, "margin")


def test_classes_of_expiry_have_a_rate_of_change_and_times_to_live():
    light = importlib.import_module("kvbench.studies.expiry")
    measuring = importlib.import_module("kvbench.studies.measuring.expiry")
    assert tuple(measuring.CLASSES) == light.CLASSES
    assert {tuple(times) for times in measuring.CLASS_TTL_S.values()} == {light.CLASSES}
    assert expiry.ByClass(lambda _: "static", measuring.CLASS_TTL_S["guide"])


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_described_and_its_default_allowed(name):
    schema = studies.get(name).options
    jsonschema.Draft202012Validator.check_schema(schema)
    assert all({"description", "default"} <= set(one) for one in schema["properties"].values())
    jsonschema.validate(documents.fill_defaults({}, schema), schema)


@pytest.mark.parametrize("name", ALL)
def test_a_plan_holds_what_a_record_can_hold_and_every_cell_has_a_name_for_a_file(name):
    study = studies.get(name)
    cells = study.plan(documents.fill_defaults({}, study.options))
    assert cells
    for cell_id, cell in cells.items():
        assert json.loads(json.dumps(dict(cell.factors))) == dict(cell.factors)
        assert set(cell_id) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
        )


@pytest.mark.parametrize("name", ALL)
def test_every_cell_starts_with_libraries_that_there_are_or_in_a_process_of_its_own(name):
    study = studies.get(name)
    cells = study.plan(documents.fill_defaults({}, study.options)).values()
    assert {cell.libraries for cell in cells} <= {*startup.LIBRARIES, ""}


@pytest.mark.parametrize("name", ALL)
def test_a_measuring_part_measures(name):
    assert callable(importlib.import_module(f"kvbench.studies.measuring.{name}").measure)


@pytest.mark.parametrize("name", ALL)
def test_values_of_an_empty_table_are_named_after_the_study(name):
    study = studies.get(name)
    values = study.values(pd.DataFrame(columns=["machine", *study.columns]))
    assert values
    assert all(key.startswith(f"{name}_") for key in values)


@pytest.mark.parametrize("name", ALL)
def test_a_record_that_found_nothing_has_no_rows(name):
    assert studies.get(name).aggregate({"rows": [], "samples": {}}) == []
