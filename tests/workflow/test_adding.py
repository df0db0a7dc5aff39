"""What adding something costs: the examples of docs/adding.md, put where they say, are all it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from workflow_helpers import ROOT, copy_repository, run_snakemake

#: Kind of addition to the page's examples of it, by the path that they are labelled with.
EXAMPLES = {
    "scenario": ["config/scenarios/parcel_delivery.yaml"],
    "model": ["config/models/my-model.yaml"],
    "claim": ["config/claims.yaml"],
    "figure": ["workflow/kvbench/figures/kv_throughput.py"],
    "strategy": ["workflow/kvbench/strategies/roomy.py"],
    "study": [
        "workflow/kvbench/studies/dict_lookup.py",
        "workflow/kvbench/studies/measuring/dict_lookup.py",
    ],
}
CONFIG = {
    "suites": ["kv", "app"],
    "languages": ["en"],
    "recorded": [],
    "kv": {
        "experiments": [
            {
                "name": "mine",
                "models": ["my-model"],
                "scenarios": ["parcel_delivery"],
                "strategies": ["dynamic", "static_roomy"],
            }
        ]
    },
}


def example(path: str) -> str:
    text = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```\w+ {re.escape(path)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


def table() -> dict[str, tuple[int, str]]:
    """Kind to places and files, from the table of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z][a-z ]*) \| (\d+) \| (.+) \|$", text, re.MULTILINE)
    return {kind: (int(places), which) for kind, places, which in rows}


def test_the_table_names_as_many_files_as_it_counts():
    assert set(EXAMPLES) < set(table())
    for kind, paths in EXAMPLES.items():
        places, which = table()[kind]
        assert places == len(paths) == which.count("`") // 2, kind
        for path, named in zip(paths, re.findall(r"`([^`]+)`", which), strict=True):
            assert Path(named).parent == Path(path).parent, kind


@pytest.mark.end_to_end
def test_the_examples_alone_are_planned_without_a_second_place_to_edit(tmp_path):
    clone = tmp_path / "clone"
    copy_repository(clone)
    for paths in EXAMPLES.values():
        for path in paths:
            with (clone / path).open("a", encoding="utf-8") as stream:
                stream.write("\n" + example(path))
    (clone / "config" / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    done = run_snakemake(clone, "--configfile", "config/mine.yaml", "--summary")
    assert done.returncode == 0, done.stdout[-3000:]
    planned = {line.partition("\t")[0] for line in done.stdout.splitlines()}
    place = "cpu/my-model/parcel_delivery"
    assert "results/inputs/prompts/my-model/parcel_delivery.json" in planned
    assert f"results/cells/kv/{place}/static_roomy/r1.json" in planned
    assert "results/tables/app_dict_lookup.csv" in planned
    assert any(name.startswith("results/figures/kv_throughput") for name in planned)
