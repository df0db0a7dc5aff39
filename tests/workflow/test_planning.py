"""The DAG as a newcomer meets it: entry points, fresh clones, lint, and mistakes in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from kvbench import documents
from kvbench.inputs import configuration

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).resolve().parents[2]
RULES = sorted((ROOT / "workflow" / "rules").glob("*.smk"))
MEASURING = ("measure_kv", "measure_app_cell", "measure_ceilings", "prepare_model")


def jobs(output: str) -> dict[str, int]:
    """Rule to number of jobs, from the table of a dry run; the kv suite has a rule per experiment."""
    table = output.partition("Job stats:")[2]
    return {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", table, re.MULTILINE)}


def shipped_blocks() -> dict[str, configuration.KvBlock]:
    """The blocks of config/config.yaml."""
    document = documents.read_yaml(ROOT / "config" / "config.yaml")
    known = configuration.load_scenarios_and_models(ROOT / "config")
    return configuration.plan_kv(configuration.fill(document, "config"), *known, "config")


def test_a_fresh_clone_plans_every_stage(clone, snakemake):
    planned = jobs(snakemake(clone, "--dry-run").stdout)
    measuring = [count for name, count in planned.items() if name.startswith("measure_kv_")]
    assert sum(measuring) == len(shipped_blocks())
    assert planned["write_manifest"] == 1
    assert planned["all"] == 1


def test_both_entry_points_plan_the_same_jobs(clone, snakemake):
    root = jobs(snakemake(clone, "--dry-run").stdout)
    alias = jobs(snakemake(clone, "--dry-run", "-s", "workflow/Snakefile").stdout)
    assert root == alias
    assert root


def test_the_recorded_configuration_measures_nothing(clone, snakemake):
    done = snakemake(clone, "--dry-run", "--configfile", "config/recorded.yaml")
    assert done.returncode == 0, done.stdout
    assert not [name for name in jobs(done.stdout) if name.startswith(MEASURING)]


@pytest.mark.parametrize("name", ["paper", "cpu-record", "recorded"])
def test_every_shipped_configuration_can_be_planned(clone, snakemake, name):
    done = snakemake(clone, "--dry-run", "--quiet", "all", "--configfile", f"config/{name}.yaml")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"strategies": ["dynmic"]}, "kv.experiments[0].strategies[0]: unknown strategy 'dynmic'"),
        ({"scenarios": ["bank"]}, "kv.experiments[0].scenarios[0]: unknown scenario 'bank'"),
        ({"models": ["gpt"]}, "kv.experiments[0].models[0]: unknown model 'gpt'"),
        ({"turns": 0}, "kv.experiments[0].turns is 0; it must be at least 1"),
        ({"turns": 16}, "has 15; ask for at most that many"),
        ({"device": "tpu"}, "kv.experiments[0].device is 'tpu'; use one of cpu, cuda, auto"),
        ({"iteration": 3}, "kv.experiments[0]: unknown key 'iteration'"),
        ({"max_new_tokens": "many"}, "kv.experiments[0].max_new_tokens is 'many'"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line_before_anything_runs(
    clone, snakemake, change, told
):
    path = clone / "config" / "mistaken.yaml"
    block = {
        "name": "x",
        "models": ["embedded"],
        "scenarios": ["banking_open_account"],
        "strategies": ["none"],
    }
    path.write_text(yaml.safe_dump({"kv": {"experiments": [block | change]}}))
    done = snakemake(clone, "--configfile", str(path))
    assert done.returncode != 0
    assert "Traceback (most recent call last)" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if told in line]
    assert lines, done.stdout
    assert "mistaken.yaml" in lines[0]
    assert not (clone / "results" / "cells").exists()


@pytest.mark.parametrize(
    ("file", "added", "message"),
    [
        ("config/claims.yaml", "\nclaims: []\n", "the key 'claims' stands twice"),
        ("resources/paraphrases/intents.jsonl", "{}\n", "id is missing or empty"),
    ],
)
def test_a_mistake_in_what_is_read_late_is_one_line_before_the_first_job(
    clone, snakemake, file, added, message
):
    with (clone / file).open("a", encoding="utf-8") as stream:
        stream.write(added)
    text = (clone / "tests/workflow/tiny.yaml").read_text(encoding="utf-8")
    (clone / "mine.yaml").write_text(text.replace("    - semantic\n", ""), encoding="utf-8")
    done = snakemake(clone, "--configfile", "mine.yaml", "--", "claims")
    assert done.returncode != 0
    (line,) = [line for line in done.stdout.splitlines() if message in line]
    assert file in line
    assert "Traceback" not in done.stdout
    assert not (clone / "results" / "inputs").exists()


def test_a_configuration_that_cannot_be_read_is_one_line_before_snakemake_reads_it(
    clone, snakemake
):
    path = clone / "config" / "config.yaml"
    path.write_bytes(path.read_text().encode("utf-16"))
    done = snakemake(clone, "--dry-run")
    assert done.returncode != 0
    assert "config/config.yaml: not UTF-8 text" in done.stdout
    assert "Traceback" not in done.stdout


def test_cuda_that_is_absent_stops_before_the_first_cell(clone, snakemake):
    path = clone / "config" / "cuda.yaml"
    block = {
        "name": "x",
        "models": ["embedded"],
        "scenarios": ["symposium_turn"],
        "strategies": ["dynamic"],
    }
    path.write_text(
        yaml.safe_dump({"suites": ["kv"], "kv": {"device": "cuda", "experiments": [block]}})
    )
    done = snakemake(clone, "--configfile", str(path), "--", "cells")
    assert done.returncode != 0
    assert "kv.device is cuda but torch sees no GPU; set kv.device to cpu" in done.stdout
    assert not (clone / "results" / "cells").exists()


def test_one_cell_asked_for_by_name_measures_its_block(clone, snakemake):
    cell = "results/cells/kv/cpu/embedded/banking_open_account/static/r1.json"
    planned = jobs(snakemake(clone, "--dry-run", "--", cell).stdout)
    assert {name: n for name, n in planned.items() if name.startswith("measure_kv")} == {
        "measure_kv_conversations": 1
    }


def test_a_cell_that_nothing_plans_is_one_line_with_the_remedy(clone, snakemake):
    path = "results/cells/kv/cpu/embedded/banking_open_account/dynamic/r77.json"
    done = snakemake(clone, "--dry-run", path)
    assert done.returncode != 0
    assert "Traceback (most recent call last)" not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "is no planned cell" in line]
    assert "kv.experiments" in line


def rule_texts() -> dict[str, str]:
    """Rule to its text, from all files of rules."""
    found = {}
    for path in RULES:
        for rule in re.split(r"\n\s*rule\b", path.read_text())[1:]:
            found[re.search(r"measure_kv_|\w+", rule)[0]] = rule
    return found


def test_every_rule_says_what_it_does_logs_and_has_an_environment():
    assert {"measure_aa_block", "write_manifest"} <= set(rule_texts())
    for name, rule in rule_texts().items():
        for directive in ("message:", "log:", "conda:"):
            assert directive in rule, f"rule {name} lacks {directive}"


def test_every_script_comes_with_the_digest_of_its_code():
    for name, rule in rule_texts().items():
        if "script:" in rule:
            assert "        code=" in rule, f"rule {name} lacks params: code"
