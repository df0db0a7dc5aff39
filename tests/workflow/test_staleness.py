"""What is planned again after an edit: all that it can change, and nothing else.

A finished run is pretended: empty outputs, marked as made by ``snakemake --touch``.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from workflow_helpers import copy_repository, run_snakemake

pytestmark = pytest.mark.end_to_end

CONFIG = ("--configfile", "config/stale.yaml")
#: The record of a block of one strategy, which has nothing of the others'.
APART = "results/cells/kv/cpu/mine/symposium_turn/offloaded/r1.json"
KV = "results/cells/kv/cpu/{model}/banking_open_account/{strategy}/r1.json"
#: The members of a block, with the reference measured a second time.
MEMBERS = ("attention_sink", "dynamic", "control")
SETTINGS = {
    "suites": ["kv", "app"],
    "languages": ["en"],
    "recorded": [],
    "kv": {
        "experiments": [
            {
                "name": "conversation",
                "models": ["embedded", "mine"],
                "scenarios": ["banking_open_account"],
                "strategies": ["attention_sink", "dynamic"],
                "turns": 2,
                "max_new_tokens": 4,
            },
            {
                "name": "apart",
                "models": ["mine"],
                "scenarios": ["symposium_turn"],
                "strategies": ["offloaded"],
            },
        ]
    },
    "app": {
        "model": "mine",
        "exclude": [
            "endpoint",
            "http",
            "layered",
            "llm_api",
            "resilience",
            "stampede",
            "write_policy",
        ],
        "studies": {"semantic": {"paraphrases": "mine.jsonl"}},
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A checkout in which everything is made, with a model and paraphrases of its user."""
    folder = tmp_path_factory.mktemp("stale") / "clone"
    copy_repository(folder)
    (folder / "config/stale.yaml").write_text(yaml.safe_dump(SETTINGS))
    shutil.copytree(folder / "resources/embedded-llama", folder / "own")
    (folder / "config/models/mine.yaml").write_text(
        "name: mine\ntitle: Mine\nsource: local\npath: own\n"
    )
    shutil.copy(folder / "resources/paraphrases/intents.jsonl", folder / "mine.jsonl")
    listed = run_snakemake(folder, *CONFIG, "--summary").stdout
    for name in re.findall(r"^(results/\S+)\t", listed, re.MULTILINE):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.startswith("results/inputs/models/") else path.write_text("{}")
    done = run_snakemake(folder, *CONFIG, "--touch", "--forceall", "--quiet", "all")
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def edit(finished) -> Iterator[Callable]:
    """Change files of the checkout; afterwards they are as before, also in time."""
    before = {}

    def edit(name: str, change: Callable[[str], str]) -> None:
        path = finished / name
        before[path] = (path.read_bytes(), path.stat())
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    yield edit
    for path, (content, status) in before.items():
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def planned(finished) -> Callable[..., set[str]]:
    """The files that Snakemake would make again."""

    def planned(*arguments: str) -> set[str]:
        done = run_snakemake(finished, *CONFIG, "--summary", *arguments)
        assert done.returncode == 0, done.stdout
        rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
        assert rows[0][0] == "output_file"
        return {row[0] for row in rows[1:] if row[-1] != "no update"}

    return planned


def cells(files: set[str]) -> set[str]:
    return {name for name in files if name.startswith("results/cells/")}


def all_cells(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in (folder / "results/cells").rglob("*.json")}


def kv_cells(models=("embedded", "mine"), strategies=MEMBERS) -> set[str]:
    return {KV.format(model=m, strategy=s) for m in models for s in strategies}


def studies_of(files: set[str]) -> set[str]:
    return {name.split("/")[3] for name in files if name.startswith("results/cells/app/")}


def code(text: str) -> str:
    return f"{text}\nEDITED = 1\n"


def test_words_waiting_and_what_serves_others_redo_nothing(edit, planned):
    edit("config/scenarios/banking_open_account.yaml", lambda text: f"# Words.\n{text}")
    edit("config/models/mine.yaml", lambda text: text.replace("Mine", "Ours"))
    edit("workflow/kvbench/strategies/dynamic.py", lambda text: f"{text}\n# Words.\n")
    edit("workflow/kvbench/caching/proxy/__init__.py", code)
    edit("config/stale.yaml", lambda text: text.replace("kv:", "kv:\n  quiet_wait_s: 3"))
    assert planned() == set()


def test_one_strategy_and_a_file_of_paraphrases_redo_their_cells(edit, planned):
    edit("workflow/kvbench/strategies/window.py", code)
    edit("mine.jsonl", lambda text: f"{text}\n")
    found = cells(planned())
    assert studies_of(found) == {"semantic"}
    kv = {name for name in found if "/kv/" in name}
    # Cells of a block are compared, so a block is measured as a whole.
    assert kv == kv_cells()


def test_other_weights_in_a_local_folder_redo_that_model(edit, planned, finished):
    # Not even a newer file: other weights are often copied with their old times.
    edit("own/config.json", lambda text: text.replace("{", '{"x": 1,', 1))
    os.utime(finished / "own/config.json", ns=(0, 0))
    found = planned()
    assert "results/inputs/models/mine" in found
    assert "results/inputs/models/embedded" not in found
    assert {name for name in cells(found) if "/kv/" in name} == {*kv_cells(models=["mine"]), APART}


def test_shipped_weights_or_tokenizer_redo_the_shipped_model(edit, planned):
    edit("resources/embedded-llama/tokenizer.json", lambda text: f"{text}\n")
    found = planned()
    assert "results/inputs/models/embedded" in found
    assert cells(found) == kv_cells(models=["embedded"])


def test_other_threads_redo_all_that_is_timed(planned, finished):
    found = cells(planned("--cores", "1"))
    assert kv_cells() <= found
    assert "memoization" in studies_of(found)
    # Hit ratios are counted on one thread, whatever --cores says.
    kept = all_cells(finished) - found
    assert "eviction" in studies_of(kept)


@pytest.mark.parametrize(
    "name",
    ["workflow/kvbench/documents.py", "workflow/kvbench/records/__init__.py"],
)
def test_the_ground_floor_redoes_every_cell(edit, planned, finished, name):
    edit(name, code)
    assert cells(planned()) == all_cells(finished)


def test_another_version_of_a_package_that_matters_redoes_every_cell(edit, planned, finished):
    edit("envs/requirements.lock", lambda text: re.sub("(?m)^torch==.*$", "torch==9.9", text))
    assert cells(planned()) == all_cells(finished)


def test_a_package_that_measures_nothing_redoes_nothing(edit, planned):
    edit("envs/requirements.lock", lambda text: re.sub("(?m)^ruff==.*$", "ruff==9.9", text))
    assert planned() == set()


def test_a_study_s_words_redo_its_table_and_what_is_read_from_it(edit, planned):
    edit("workflow/kvbench/studies/eviction.py", code)
    found = planned()
    assert cells(found) == set()
    assert {"results/tables/app_eviction.csv", "results/tables/README.md"} <= found
    assert "results/tables/app_expiry.csv" not in found


def test_reading_records_otherwise_redoes_tables_and_measures_nothing(edit, planned):
    edit("workflow/kvbench/records/gathering.py", code)
    found = planned()
    assert cells(found) == set()
    assert "results/tables/kv_summary.csv" in found


def test_a_contract_redoes_what_is_checked_against_it(edit, planned):
    edit("workflow/schemas/app-cell.schema.json", lambda text: f"{text} ")
    assert planned() == set()
    edit(
        "workflow/schemas/kv-cell.schema.json",
        lambda text: text.replace('"minimum": 2', '"minimum": 1', 1),
    )
    found = cells(planned())
    assert kv_cells() <= found
    assert studies_of(found) == set()


def test_the_physics_redo_tables_and_the_studies_that_compute_with_them(edit, planned):
    edit("workflow/kvbench/physics/roofline.py", code)
    found = planned()
    assert "results/tables/kv_summary.csv" in found
    # These two say what a cache could save at most, by that arithmetic.
    assert studies_of(cells(found)) == {"one_stream", "prefix"}


def test_the_sections_redo_the_paper_and_no_table(edit, planned):
    edit("workflow/kvbench/paper/sections.py", code)
    found = planned()
    assert {"results/paper/values.json", "results/paper/section.en.tex"} <= found
    assert not any(name.startswith(("results/tables/", "results/cells/")) for name in found)


def test_another_cache_server_redoes_the_studies_that_use_one(planned, monkeypatch, finished):
    monkeypatch.setenv("REDIS_URL", "redis://:secret@localhost:6399/3")
    found = studies_of(cells(planned()))
    assert {"expiry", "response_cache", "one_stream"} <= found
    assert not {"memoization", "semantic", "prefix"} & found
    stored = (finished / ".snakemake/metadata").iterdir()
    assert not any("secret" in path.read_text() for path in stored if path.is_file())
