"""What a run hands on: a data package that validates, a spreadsheet's tables, a research object."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
from kvbench import documents
from kvbench.errors import InputError
from kvbench.publication import columns, crate, datapackage
from kvbench.records import gathering

ROOT = Path(__file__).resolve().parents[2]
MEANINGS = {"strategy": "how keys are kept", "e2e_s": "time (s)", "rounds": "how many", "note": "x"}


@pytest.fixture
def tables(tmp_path):
    """A folder with one table, written as the workflow writes tables."""
    table = pd.DataFrame(
        {
            "strategy": ["none", "dynamic"],
            "e2e_s": [1.5, None],
            "rounds": [3, 4],
            "note": [None, None],
        }
    )
    gathering.write_csv(table, tmp_path / "times.csv")
    return tmp_path


def test_the_descriptor_gives_types_meanings_and_missing_values(tables):
    resource = datapackage.describe({"times.csv": MEANINGS}, tables)["resources"][0]
    fields = {field["name"]: field for field in resource["schema"]["fields"]}
    kinds = {name: field["type"] for name, field in fields.items()}
    assert kinds == {"strategy": "string", "e2e_s": "number", "rounds": "integer", "note": "string"}
    assert fields["e2e_s"]["description"] == "time (s)"
    assert resource["schema"]["missingValues"] == [""]
    digest = hashlib.sha256((tables / "times.csv").read_bytes()).hexdigest()
    assert resource["hash"] == f"sha256:{digest}"


def test_the_package_validates(tables):
    documents.write_json(
        tables / "datapackage.json", datapackage.describe({"times.csv": MEANINGS}, tables)
    )
    datapackage.check(tables / "datapackage.json")


def test_a_package_whose_table_was_changed_is_refused_in_one_line(tables):
    documents.write_json(
        tables / "datapackage.json", datapackage.describe({"times.csv": MEANINGS}, tables)
    )
    path = tables / "times.csv"
    path.write_text(path.read_text().replace("1.5", '"soon"'))
    with pytest.raises(InputError, match=r"datapackage\.json") as error:
        datapackage.check(tables / "datapackage.json")
    assert "\n" not in str(error.value)


def test_a_column_that_nothing_describes_is_named(tables):
    with pytest.raises(InputError, match="note"):
        datapackage.describe(
            {"times.csv": {k: v for k, v in MEANINGS.items() if k != "note"}}, tables
        )


def test_parquet_holds_what_the_table_holds(tables):
    datapackage.write_parquet(tables / "times.csv", tables / "times.parquet")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tables / "times.parquet"), gathering.read_csv(tables / "times.csv")
    )


def test_a_portuguese_spreadsheet_gets_semicolons_commas_and_a_mark(tables):
    datapackage.write_spreadsheet(tables / "times.csv", tables / "out.csv")
    data = (tables / "out.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")
    assert data.decode("utf-8-sig").splitlines()[:2] == [
        "strategy;e2e_s;rounds;note",
        "none;1,5;3;",
    ]


def test_every_study_and_table_is_described():
    from kvbench import studies

    found = columns.described(studies.names(), traffic=True)
    assert {f"app_{name}.csv" for name in studies.names()} <= set(found)
    assert {"kv_summary.csv", "kv_rounds.csv", "aa_test.csv", "capacity.csv"} <= set(found)
    assert all(meaning for own in found.values() for meaning in own.values())


@pytest.fixture
def checkout(tmp_path):
    """A small checkout with one published file."""
    root = tmp_path / "checkout"
    (root / "results").mkdir(parents=True)
    (root / "Snakefile").write_text("rule all:\n")
    (root / "config").mkdir()
    (root / "config" / "config.yaml").write_text("suites: []\n")
    (root / "CITATION.cff").write_text((ROOT / "CITATION.cff").read_text())
    (root / "results" / "table.csv").write_text("a\n1\n")
    return root


def manifest(root: Path) -> dict:
    path = root / "results" / "table.csv"
    facts = {"bytes": 4, "rule": "aggregate", "sha256": documents.sha256_of_file(path)}
    return {"files": {"results/table.csv": facts}}


MACHINE = {"cpu": "a processor", "cores": 2, "system": "a system", "commit": "abc"}


def test_a_crate_holds_workflow_configuration_and_results(checkout, tmp_path):
    crate.write(tmp_path / "crate", checkout, ["config"], manifest(checkout), MACHINE)
    crate.check(tmp_path / "crate")
    graph = json.loads((tmp_path / "crate/ro-crate-metadata.json").read_text())["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    assert entities["./"]["mainEntity"] == {"@id": "Snakefile"}
    assert "ComputationalWorkflow" in entities["Snakefile"]["@type"]
    assert entities["results/table.csv"]["description"] == "made by the rule aggregate"
    assert (tmp_path / "crate/config/config.yaml").is_file()


def test_a_published_file_that_changed_is_refused_and_no_crate_is_left(checkout, tmp_path):
    listed = manifest(checkout)
    (checkout / "results" / "table.csv").write_text("a\n2\n")
    with pytest.raises(InputError, match=r"table\.csv"):
        crate.write(tmp_path / "crate", checkout, ["config"], listed, MACHINE)
    assert not (tmp_path / "crate").exists()
    assert not (tmp_path / ".crate.part").exists()


def test_a_crate_that_lost_a_file_is_noticed(checkout, tmp_path):
    crate.write(tmp_path / "crate", checkout, ["config"], manifest(checkout), MACHINE)
    (tmp_path / "crate" / "results" / "table.csv").unlink()
    with pytest.raises(InputError, match=r"table\.csv"):
        crate.check(tmp_path / "crate")
