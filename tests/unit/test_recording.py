from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from kvbench import records
from kvbench.errors import InputError
from kvbench.records import machines


def kv_record(strategy="dynamic", replicate=1, **more):
    turn = {
        "turn": 1,
        "prompt_tokens": 152,
        "new_tokens": 150,
        "reused_tokens": 0,
        "kv_bytes": 1000,
        "kv_bytes_predicted": 1000,
        "peak_memory_bytes": 2000,
        "token_digest": "0" * 64,
        "response": "Olá, tudo bem?",
        "samples": [
            {"iteration": 0, "e2e_s": 2.5, "ttft_s": 0.5, "itl_s": [0.1], "disturbed": False}
        ],
    }
    return {
        "schema": records.KV_SCHEMA,
        "cell": {
            "suite": "kv",
            "model": "embedded",
            "scenario": "symposium_turn",
            "strategy": strategy,
            "replicate": replicate,
            "device": "cpu",
            "dtype": "float32",
            "threads": 2,
            "max_new_tokens": 150,
            "turns": 1,
            "seed": 1,
        },
        "status": "ok",
        "reason": None,
        "turns": [turn],
        "strategy_info": {"exact": True, "compiled": False, "options": {}, "traffic": {}},
        "model": {},
        "compile": {"seconds": 0, "graphs": 0, "recompiles": 0},
        "noise": {},
        "environment": {"digest": "e"},
        "code_digest": "aaaa",
        "started_at": f"2026-01-0{replicate}T10:00:00+00:00",
        "wall_s": 90.0,
    } | more


def app_record(cell="one"):
    return {
        "schema": records.APP_SCHEMA,
        "cell": {
            "suite": "app",
            "study": "stampede",
            "id": cell,
            "factors": {},
            "timed": True,
            "seed": 1,
            "threads": 2,
        },
        "status": "unsupported",
        "reason": "no server",
        "rows": [],
        "samples": {},
        "noise": {},
        "environment": {"digest": "e"},
        "code_digest": "cccc",
        "started_at": "2026-01-03T10:00:00+00:00",
        "wall_s": 30.0,
    }


ENVIRONMENT = {
    "cpu": "A processor",
    "cores": 2,
    "memory_bytes": 24 * 2**30,
    "gpu": {"name": "A GPU", "memory_bytes": 8 * 2**30},
    "python": "3.11.0",
    "packages": {"torch": "2.13.0"},
    "digest": "e",
    "commit": "abc123",
}
KV = "cells/kv/cpu/embedded/symposium_turn"


def put(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "results"
    for number in (1, 2):
        record = kv_record(replicate=number)
        put(folder / KV / f"dynamic/r{number}.json", record)
    put(folder / "cells/app/stampede/one.json", app_record())
    put(folder / "cells/aa/same/r1.json", kv_record())
    put(folder / "inputs/environment/cpu.json", ENVIRONMENT)
    put(folder / "inputs/ceilings/cpu.json", {"schema": machines.CEILINGS_SCHEMA, "ceilings": {}})
    return folder


@pytest.fixture
def recorded(run):
    return machines.record(run, run / "recorded", "box")


def resum(folder: Path):
    """Write checksums that fit the files as they are."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (machines.README, machines.SUMS)
    )
    text = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True).stdout
    (folder / machines.SUMS).write_text(text)


def refused(folder, *parts):
    with pytest.raises(InputError) as caught:
        machines.verify(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# ---------------------------------------------------------------------------- writing


def test_a_recorded_machine_has_the_layout_of_the_run(recorded):
    found = {path.relative_to(recorded).as_posix() for path in recorded.rglob("*.json")}
    assert found == {
        f"{KV}/dynamic/r1.json",
        f"{KV}/dynamic/r2.json",
        "cells/app/stampede/one.json",
        "cells/aa/same/r1.json",
        "environment/cpu.json",
        "ceilings/cpu.json",
    }


def test_recorded_cells_say_the_same_in_fewer_bytes(run, recorded):
    before, after = run / KV / "dynamic/r1.json", recorded / KV / "dynamic/r1.json"
    assert records.read(before) == records.read(after)
    assert after.stat().st_size < before.stat().st_size
    assert after.read_text().count("\n") == 1


def test_sha256sum_accepts_the_checksums(recorded):
    done = subprocess.run(["sha256sum", "--check", "--strict", machines.SUMS], cwd=recorded)
    assert done.returncode == 0


def test_readme_says_what_when_and_how_long(recorded):
    text = (recorded / machines.README).read_text()
    for part in (
        "- processor: A processor",
        "- memory: 24.0 GiB",
        "- GPU: A GPU",
        "- torch: 2.13.0",
        "from 2026-01-01T10:00:00+00:00 to 2026-01-03T10:00:00+00:00",
        "5 min of measuring in 4 cells",
        "suite kv: 2 ok",
        "suite app: 1 unsupported",
        "A/A test: 1 ok",
        "- commit: abc123",
        "- kv/dynamic: `aaaa`",
        "- app/stampede: `cccc`",
    ):
        assert part in text


def test_recording_the_same_run_again_changes_nothing(run, recorded):
    before = (recorded / machines.README).stat().st_mtime_ns
    assert machines.record(run, run / "recorded", "box") == recorded
    assert (recorded / machines.README).stat().st_mtime_ns == before


def test_another_run_does_not_overwrite_a_machine(run, recorded):
    put(run / KV / "dynamic/r1.json", kv_record(wall_s=1.0))
    with pytest.raises(InputError, match="remove the folder, or choose another name"):
        machines.record(run, run / "recorded", "box")
    assert records.read(recorded / KV / "dynamic/r1.json")["wall_s"] == 90.0


def test_only_the_files_asked_for_are_kept(run):
    only = [run / KV / "dynamic/r2.json", run / "inputs/environment/cpu.json"]
    folder = machines.record(run, run / "recorded", "box", files=only)
    assert len(list(folder.rglob("*.json"))) == 2


@pytest.mark.parametrize("slug", ["", None, "Box", "a b", "../x", "here", "all", "-x"])
def test_a_bad_name_is_refused(run, slug):
    with pytest.raises(InputError, match=r"^machine: "):
        machines.record(run, run / "recorded", slug)


def test_an_empty_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no record with status ok"):
        machines.record(tmp_path / "results", tmp_path / "recorded", "box")
    assert not (tmp_path / "recorded").exists()


def test_a_run_of_failures_is_refused(run):
    shutil.rmtree(run / "cells/kv")
    shutil.rmtree(run / "cells/aa")
    with pytest.raises(InputError, match="no record with status ok"):
        machines.record(run, run / "recorded", "box")


def test_an_invalid_record_stops_the_copy_and_leaves_nothing(run):
    put(run / KV / "dynamic/r1.json", kv_record(status="fine"))
    with pytest.raises(InputError, match=r"r1\.json: status is 'fine'"):
        machines.record(run, run / "recorded", "box")
    assert not (run / "recorded").exists()


def test_a_record_at_another_place_than_its_cell_is_refused(run):
    put(run / KV / "static/r1.json", kv_record())
    with pytest.raises(InputError, match=r"static/r1\.json: its cell belongs to .*dynamic/r1"):
        machines.record(run, run / "recorded", "box")


def test_an_interrupted_copy_leaves_nothing(run, monkeypatch):
    def full(*_args):
        raise OSError("no space left on device")

    monkeypatch.setattr(machines, "readme", full)
    with pytest.raises(OSError, match="no space"):
        machines.record(run, run / "recorded", "box")
    assert list((run / "recorded").iterdir()) == []


# ---------------------------------------------------------------------------- reading


def test_a_machine_as_it_was_recorded_is_in_order(recorded):
    machines.verify(recorded)


def test_notes_in_the_readme_are_allowed(recorded):
    (recorded / machines.README).write_text("The fan was loud.")
    machines.verify(recorded)


def test_an_altered_file_is_noticed(recorded):
    path = recorded / KV / "dynamic/r1.json"
    path.write_text(path.read_text().replace("2.5", "1.5"))
    refused(recorded, str(path), "altered")


def test_a_missing_file_is_noticed(recorded):
    path = recorded / KV / "dynamic/r1.json"
    path.unlink()
    refused(recorded, str(path), "missing")


def test_an_extra_file_is_noticed(recorded):
    path = recorded / KV / "dynamic/r9.json"
    path.write_text("{}")
    refused(recorded, str(path), "does not list it")


def test_missing_checksums_are_noticed(recorded):
    (recorded / machines.SUMS).unlink()
    refused(recorded, str(recorded / machines.SUMS), "no such file")


@pytest.mark.parametrize("text", ["", "hello\n", f"{'0' * 64}  ../secret\n", f"{'0' * 64}  /x\n"])
def test_malformed_checksums_are_noticed(recorded, text):
    (recorded / machines.SUMS).write_text(text)
    refused(recorded, machines.SUMS)


@pytest.mark.parametrize(
    "name", [f"{KV}/dynamic/r1.json", "cells/app/stampede/one.json", "ceilings/cpu.json"]
)
def test_a_foreign_schema_is_noticed_though_the_checksum_fits(recorded, name):
    document = json.loads((recorded / name).read_text()) | {"schema": "kvbench/other/9"}
    put(recorded / name, document)
    resum(recorded)
    refused(recorded, name, "kvbench/other/9")


def test_a_file_without_a_place_is_noticed(recorded):
    put(recorded / "cells/kv/stray.json", kv_record())
    resum(recorded)
    refused(recorded, "stray.json")


def test_a_folder_that_cannot_name_a_machine_is_refused(recorded):
    refused(recorded.rename(recorded.parent / "my box"), "cannot name a machine")


def test_mixed_digests_are_allowed_and_listed(run):
    put(run / KV / "dynamic/r2.json", kv_record(replicate=2, code_digest="bbbb"))
    folder = machines.record(run, run / "recorded", "box")
    machines.verify(folder)
    readme = (folder / machines.README).read_text()
    assert "mixed" in readme
    assert all(digest in readme for digest in ("aaaa", "bbbb", "cccc"))
