"""The DAG as a newcomer meets it: entry points, fresh clones, lint, and mistakes in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.end_to_end

MEASURING = ("measure_kv_cell", "measure_app_cell", "measure_ceilings", "prepare_model")


def jobs(output: str) -> dict[str, int]:
    """Rule to number of jobs, from the table of a dry run."""
    table = output.partition("Job stats:")[2]
    return {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)$", table, re.MULTILINE)}


def test_a_fresh_clone_plans_every_stage(clone, snakemake):
    planned = jobs(snakemake(clone, "--dry-run").stdout)
    assert planned["measure_kv_cell"] == 42
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
    assert not set(jobs(done.stdout)) & set(MEASURING)


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


def test_every_rule_says_what_it_does_logs_and_has_an_environment():
    for path in Path("workflow/rules").glob("*.smk"):
        for rule in path.read_text().split("\nrule ")[1:]:
            name = rule.partition(":")[0]
            for directive in ("message:", "log:", "conda:"):
                assert directive in rule, f"{path.name}: rule {name} lacks {directive}"
