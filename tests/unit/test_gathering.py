"""Bringing records, facts and tables together, and CSV that survives the round trip."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from kvbench import documents, records
from kvbench.analysis import selection, tables
from kvbench.errors import InputError
from kvbench.records import gathering, machines

#: What every file of facts holds.
FACTS = {"device": "cpu", "digest": "0", "cpu": "x", "cores": 2, "commit": "unknown"}


@pytest.fixture
def run_folder(tmp_path, make_record) -> Path:
    """Results of a small run, as the cells and inputs stages leave them."""
    folder = tmp_path / "results"
    for strategy in ("none", "dynamic"):
        path = folder / f"cells/kv/cpu/tiny/talk/{strategy}/r1.json"
        path.parent.mkdir(parents=True)
        records.write(path, make_record(strategy))
    return folder


def test_recorded_machines_are_found_by_name(tmp_path):
    for name in ("lab-gpu", "laptop"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text("x")
    assert [p.name for p in gathering.list_machines(tmp_path, ["all"])] == ["lab-gpu", "laptop"]
    assert [p.name for p in gathering.list_machines(tmp_path, ["laptop"])] == ["laptop"]
    assert gathering.list_machines(tmp_path, []) == []
    assert gathering.list_machines(tmp_path / "absent", ["all"]) == []


def test_an_unknown_machine_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "laptop").mkdir()
    with pytest.raises(
        InputError, match=r"unknown machine 'labtop' \(did you mean 'laptop'\?\); known: laptop"
    ):
        gathering.list_machines(tmp_path, ["labtop"])


def test_machines_whose_names_differ_in_case_only_are_refused(tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "Lab").mkdir()
    with pytest.raises(InputError, match="the same name"):
        gathering.list_machines(tmp_path, ["all"])


def test_a_recorded_machine_is_read(run_folder, tmp_path):
    machines.record(run_folder, tmp_path / "recorded", "lab-1")
    read = gathering.machines([str(tmp_path / "recorded" / "lab-1")])
    assert read == {"lab-1": tmp_path / "recorded" / "lab-1"}
    found = gathering.kv_records([], read)
    assert [r["cell"]["strategy"] for r in found["lab-1"]] == ["dynamic", "none"]


def test_an_altered_recorded_machine_is_refused(run_folder, tmp_path):
    machines.record(run_folder, tmp_path / "recorded", "lab-1")
    folder = tmp_path / "recorded" / "lab-1"
    path = folder / "cells/kv/cpu/tiny/talk/none/r1.json"
    document = json.loads(path.read_text())
    document["turns"][0]["samples"][0]["e2e_s"] = 0.5
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"r1\.json"):
        machines.verify(folder)


def test_a_run_that_measured_nothing_is_left_out(run_folder):
    assert gathering.kv_records([], {}) == {}
    here = [str(path) for path in run_folder.rglob("*.json")]
    assert list(gathering.kv_records(here, {})) == ["here"]


def test_the_facts_of_a_gpu_tell_more_than_those_of_the_cpu(tmp_path):
    for device in ("cpu", "cuda"):
        (tmp_path / f"{device}.json").write_text(json.dumps({**FACTS, "device": device}))
    here = [str(tmp_path / "cuda.json"), str(tmp_path / "cpu.json")]
    assert gathering.environments(here, {})["here"]["device"] == "cuda"


def test_studies_of_recorded_machines_are_listed_once(tmp_path):
    for machine, study in (("a", "eviction"), ("b", "eviction"), ("b", "http")):
        (tmp_path / machine / "cells/app" / study).mkdir(parents=True)
    assert gathering.studies_of([tmp_path / "a", tmp_path / "b"]) == ["eviction", "http"]


# CSV ------------------------------------------------------------------------------------------


def round_trip(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    gathering.write_csv(table, folder / "t.csv")
    return gathering.read_csv(folder / "t.csv")


def test_the_strategy_none_survives_the_round_trip(make_record, tmp_path):
    made = [make_record("none"), make_record("dynamic")]
    for table in tables.kv_tables({"here": made}):
        again = round_trip(table, tmp_path)
        assert set(again["strategy"]) == {"none", "dynamic"}


def test_empty_cells_are_missing_and_words_for_missing_are_words(tmp_path):
    table = pd.DataFrame({"name": ["NA", "null", None], "x": [1.5, None, 2.5]})
    again = round_trip(table, tmp_path)
    assert again["name"].tolist()[:2] == ["NA", "null"]
    assert again["name"].isna().tolist() == [False, False, True]
    assert again["x"].isna().tolist() == [False, True, False]


def test_numbers_and_truth_values_are_the_same_after_the_round_trip(make_record, tmp_path):
    samples, summary = tables.kv_tables({"here": [make_record("none"), make_record("dynamic")]})
    again = round_trip(summary, tmp_path)
    assert again["e2e_s_median"].tolist() == summary["e2e_s_median"].tolist()
    assert again["exact"].tolist() == [True, True]
    assert round_trip(samples, tmp_path)["disturbed"].dtype == bool


@pytest.mark.parametrize("digest", ["1234567890123456", "12345678e1234567", "0000000000000000"])
def test_a_digest_that_looks_like_a_number_stays_text(make_record, tmp_path, digest):
    record = make_record("none") | {"code_digest": digest}
    _, summary = tables.kv_tables({"here": [record]})
    assert round_trip(summary, tmp_path)["code_digest"].tolist() == [digest]


def test_writing_a_table_twice_gives_the_same_bytes(make_record, tmp_path):
    samples, _ = tables.kv_tables({"here": [make_record("none")]})
    gathering.write_csv(samples, tmp_path / "a.csv")
    gathering.write_csv(gathering.read_csv(tmp_path / "a.csv"), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


@pytest.mark.parametrize("text", ["{}", "[]", '"x"', "[" * 10_000 + "]" * 10_000, '{"device": 3}'])
@pytest.mark.parametrize("kind", ["ceilings", "environments"])
def test_a_damaged_file_about_the_machine_is_one_line_with_the_remedy(tmp_path, kind, text):
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        getattr(gathering, kind)([str(path)], {})
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "delete the file and run again" in str(error.value)


@pytest.mark.parametrize(
    ("begun", "first"),
    [
        ({"alpha": ("2026-01-01", "ok"), "beta": ("2026-02-01", "ok")}, "beta"),
        ({"alpha": ("2026-03-01", "ok"), "beta": ("2026-02-01", "ok")}, "alpha"),
        ({"alpha": ("2026-01-01", "ok"), "beta": ("2026-02-01", "unsupported")}, "alpha"),
        ({"alpha": ("2026-02-01", "ok"), "here": ("2026-01-01", "ok")}, "here"),
    ],
)
def test_of_several_machines_the_one_measured_last_stands_first(
    tmp_path, monkeypatch, begun, first
):
    monkeypatch.setattr(records, "read", documents.read_json)
    paths = {}
    for machine, (day, status) in begun.items():
        paths[machine] = tmp_path / machine / "cells" / "app" / "http" / "one.json"
        paths[machine].parent.mkdir(parents=True)
        record = {
            "started_at": f"{day}T12:00:00+00:00",
            "status": status,
            "reason": None,
            "cell": {"id": "one", "factors": {}},
        }
        paths[machine].write_text(json.dumps(record))
    here = [str(path) for machine, path in paths.items() if machine == "here"]
    found = gathering.app_records(
        "http", here, {name: tmp_path / name for name in begun if name != "here"}
    )
    table = tables.app_table({}, found, lambda record: [])
    assert set(selection.one_machine(table)["machine"]) == {first}
