"""Records: checked on write and on read, whole or absent, and never of two thread counts."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
from kvbench import records
from kvbench.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def refused(action, *arguments: object) -> str:
    with pytest.raises(InputError) as error:
        action(*arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def stored(tmp_path, make_record):
    def stored(name: str = "r1.json", **fields: object) -> Path:
        path = tmp_path / name
        records.write(path, make_record(**fields))
        return path

    return stored


def test_what_was_written_is_read(tmp_path, make_record):
    record = make_record("none", [[1.0, 2.0], [3.0, 4.0]])
    records.write(tmp_path / "r1.json", record)
    assert records.read(tmp_path / "r1.json") == record


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"status": "great"}, "status is 'great'"),
        ({"extra": 1}, "'extra'"),
        ({"started_at": "yesterday"}, "started_at"),
        ({"wall_s": -1.0}, "wall_s is -1.0"),
        ({"turns": [{"turn": 1}]}, "turns[0]"),
    ],
)
def test_a_record_against_its_schema_is_never_written(tmp_path, make_record, change, word):
    path = tmp_path / "r1.json"
    text = refused(records.write, path, make_record() | change)
    assert text.startswith(f"{path}: ")
    assert word in text
    assert not path.exists()


def test_one_sample_that_stands_twice_in_a_record_is_refused(tmp_path, make_record):
    path, record = tmp_path / "r1.json", make_record()
    samples = record["turns"][0]["samples"]
    samples.append(dict(samples[-1]))
    text = refused(records.write, path, record)
    assert f"{path}: turns[0].samples: iteration {samples[-1]['iteration']} stands twice" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "ok", "reason": "It broke."}, "status is ok with the reason 'It broke.'"),
        ({"status": "failed", "reason": None}, "status is failed with no reason"),
    ],
)
def test_a_cell_of_a_study_has_a_reason_if_and_only_if_it_is_not_ok(tmp_path, change, words):
    example = next((ROOT / "results" / "recorded").glob("*/cells/app/expiry/*.json"))
    path = tmp_path / "cell.json"
    path.write_text(json.dumps(records.read(example) | change), encoding="utf-8")
    told = refused(records.read, path)
    assert words in told
    assert "delete the file and run again" in told


def test_a_time_that_is_no_number_is_never_written(tmp_path, make_record):
    path = tmp_path / "r1.json"
    with pytest.raises((InputError, ValueError)):
        records.write(path, make_record(e2e=[[float("nan")]]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "change", "words"),
    [
        ({}, {"e2e_s": 1e308}, "e2e_s is 1e+308"),
        ({}, {"ttft_s": 1e-300}, "ttft_s 1e-300"),
        ({}, {"ttft_s": 2.0}, "the first token comes before the last"),
        ({}, {"itl_s": []}, "itl_s is empty for 11 tokens"),
        ({"reason": "It broke."}, {}, "status is ok with the reason 'It broke.'"),
        ({"status": "failed"}, {}, "status is failed with no reason"),
    ],
)
def test_a_record_that_no_measurement_gives_names_the_file_and_the_remedy(
    tmp_path, make_record, fields, change, words
):
    path = tmp_path / "r1.json"
    record = make_record(**fields)
    for turn in record["turns"]:
        turn["samples"][-1] |= change
    text = json.dumps(record)
    path.write_text(text, encoding="utf-8")
    told = refused(records.read, path)
    assert str(path) in told
    assert words in told
    assert "delete the file and run again" in told


def test_a_full_disk_keeps_the_record_that_was_there(stored, make_record, monkeypatch):
    path = stored()
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((OSError, InputError)):
        records.write(path, make_record("none"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 1, 100, -10])
def test_a_truncated_record_names_the_file_and_the_remedy(stored, keep):
    path = stored()
    path.write_bytes(path.read_bytes()[:keep])
    text = refused(records.read, path)
    assert text.startswith(f"{path}: ")
    assert "delete the file and run again" in text


@pytest.mark.parametrize("document", [{}, [], None, 3, {"schema": "kvbench/kv-cell/2"}])
def test_a_file_of_another_schema_is_refused_with_the_known_ones(tmp_path, document):
    path = tmp_path / "r1.json"
    path.write_text(json.dumps(document))
    text = refused(records.read, path)
    assert text.startswith(f"{path}: schema is ")
    assert "kvbench/kv-cell/1" in text


def test_an_altered_record_names_file_and_key(stored):
    path = stored()
    document = json.loads(path.read_text())
    document["turns"][0]["samples"][1]["e2e_s"] = 0
    path.write_text(json.dumps(document))
    assert f"{path}: turns[0].samples[1].e2e_s is 0" in refused(records.read, path)


def test_an_app_record_is_no_kv_record(tmp_path):
    record = {
        "schema": records.APP_SCHEMA,
        "cell": {
            "suite": "app",
            "study": "eviction",
            "id": "lru",
            "factors": {},
            "timed": False,
            "seed": 1,
            "threads": 1,
        },
        "status": "ok",
        "reason": None,
        "rows": [],
        "samples": {},
        "noise": {},
        "environment": {"digest": "0"},
        "code_digest": "0",
        "started_at": "2025-10-01T12:00:00+00:00",
        "wall_s": 1.0,
    }
    records.write(tmp_path / "lru.json", record)
    assert "expected kvbench/kv-cell/1" in refused(records.read_kv, [tmp_path / "lru.json"])


# Threads --------------------------------------------------------------------------------------


def test_records_of_two_thread_counts_are_not_mixed(stored):
    paths = [stored("r1.json", threads=2), stored("r2.json", threads=4, replicate=2)]
    text = refused(records.read_kv, paths)
    assert f"{paths[1]}: cell.threads is 4 but {paths[0]} has 2" in text
    assert "--cores" in text


def test_threads_of_the_host_do_not_matter_on_a_gpu(stored):
    gpu = {"device": "cuda", "dtype": "bfloat16"}
    paths = [stored("r1.json", threads=2, **gpu), stored("r2.json", threads=4, replicate=2, **gpu)]
    assert len(records.read_kv(paths)) == 2


def test_a_cell_that_measured_nothing_may_have_any_thread_count(stored):
    paths = [
        stored("r1.json", threads=2),
        stored("r2.json", threads=4, status="unsupported", reason="It cannot."),
    ]
    assert len(records.read_kv(paths)) == 2


# Digests --------------------------------------------------------------------------------------


def test_equal_tokens_have_equal_digests_and_borders_matter():
    assert records.token_digest([1, 23]) == records.token_digest((1, 23))
    assert records.token_digest([1, 23]) != records.token_digest([12, 3])
    assert re.fullmatch("[0-9a-f]{64}", records.token_digest([]))


def test_the_present_moment_is_utc_in_the_records_form(make_record, tmp_path):
    records.write(tmp_path / "r1.json", make_record() | {"started_at": records.now()})
