"""Planning and aggregating many records: 2,500, 5,000 and 10,000, to see that both grow linearly.

Records are copies of one hand-made record under other names, in a copy of the repository, four to a block.
At most 20 s to plan and 15 s to aggregate are asked for 10,000; each is one run, without an interval.

    PYTHONPATH=workflow python tests/benchmarks/scale.py [--sizes 2500 5000 10000]
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bounds
import yaml

ROOT = Path(__file__).resolve().parents[2]
#: What is asked for: seconds to plan and to aggregate so many records.
ASKED_PLANNING_S, ASKED_AGGREGATING_S, ASKED_SIZE = 20.0, 15.0, 10_000
REPLICATES = 5
#: Blocks in one job of a cluster.
GROUPED = 25
TURNS = 3
ITERATIONS = 3


def record(identity: dict, number: int) -> dict:
    """A record with plausible, varied times; ``identity`` goes into its cell."""
    import random

    from kvbench import physics, records

    generator = random.Random(number)
    turns = []
    for turn in range(1, TURNS + 1):
        samples = []
        for iteration in range(ITERATIONS):
            gaps = [0.004 * generator.lognormvariate(0, 0.05) for _ in range(31)]
            samples.append(
                {
                    "iteration": iteration,
                    "round": iteration,
                    "slot": iteration * TURNS + turn - 1,
                    "ttft_s": 0.03,
                    "itl_s": gaps,
                    "e2e_s": 0.03 + sum(gaps),
                    "disturbed": False,
                }
            )
        turns.append(
            {
                "turn": turn,
                "prompt_tokens": 150 + 50 * turn,
                "new_tokens": 32,
                "reused_tokens": 0,
                "kv_bytes": 800_000,
                "kv_bytes_predicted": 800_000,
                "peak_memory_bytes": 5_000_000,
                "token_digest": records.token_digest([turn]),
                "response": "Certainly.",
                "cold": samples[:1],
                "samples": samples,
            }
        )
    shape = physics.Architecture.from_config(
        {
            "num_hidden_layers": 4,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 640,
            "vocab_size": 2560,
            "max_position_embeddings": 65536,
        }
    )
    return {
        "schema": records.KV_SCHEMA,
        "cell": {
            "suite": "kv",
            "device": "cpu",
            "dtype": "float32",
            "threads": 2,
            "max_new_tokens": 32,
            "turns": TURNS,
            "seed": 1,
            "kind": "conversation",
            **identity,
        },
        "status": "ok",
        "reason": None,
        "turns": turns,
        "strategy_info": {
            "exact": True,
            "compiled": False,
            "options": {},
            "traffic": {"kind": "dynamic"},
        },
        "model": {"parameter_bytes": 16_000_000, "architecture": shape.as_dict()},
        "compile": {"seconds": 0.0, "graphs": 0, "recompiles": 0},
        "noise": {},
        "environment": {"digest": "bench"},
        "code_digest": "bench",
        "started_at": records.now(),
        "wall_s": 5.0,
        "block": {
            "id": f"scale/cpu/embedded/{identity['scenario']}/r{identity['replicate']}",
            "members": ["none", "dynamic", "static", "control"],
            "reference": "dynamic",
            "control": True,
            "rounds": ITERATIONS,
            "stopped": "rounds",
            "precision": 0.03,
            "budget_s": 60,
            "processes": "forked",
            "probe_s": [0.01] * ITERATIONS,
            "order": [["none", "dynamic", "static", "control"]] * ITERATIONS,
        },
    }


def write_case(folder: Path, size: int) -> None:
    """Scenarios, configuration and records for ``size`` cells."""
    strategies = ("none", "dynamic", "static", "control")
    count = size // (len(strategies) * REPLICATES)
    original = yaml.safe_load((ROOT / "config/scenarios/banking_open_account.yaml").read_text())
    names = []
    number = 0
    for index in range(count):
        name = f"case_{index:05d}"
        names.append(name)
        scenario = copy.deepcopy(original) | {"id": name}
        scenario["turns"] = scenario["turns"][:TURNS]
        path = folder / "config/scenarios" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(scenario, sort_keys=False))
        for strategy in strategies:
            place = folder / "results/cells/kv/cpu/embedded" / name / strategy
            place.mkdir(parents=True)
            for replicate in range(1, REPLICATES + 1):
                number += 1
                identity = {
                    "model": "embedded",
                    "scenario": name,
                    "strategy": strategy,
                    "replicate": replicate,
                }
                (place / f"r{replicate}.json").write_text(json.dumps(record(identity, number)))
    block = {
        "name": "scale",
        "models": ["embedded"],
        "scenarios": names,
        "strategies": [name for name in strategies if name != "control"],
        "turns": TURNS,
        "replicates": REPLICATES,
    }
    config = {"suites": ["kv"], "recorded": [], "kv": {"experiments": [block]}}
    (folder / "config/scale.yaml").write_text(yaml.safe_dump(config))


def plan(folder: Path, *more: str) -> tuple[float, str]:
    """Plan the cells; return the seconds that it took, and what was said."""
    begin = time.perf_counter()
    planned = subprocess.run(
        [
            sys.executable,
            *("-m", "snakemake", "--cores", "2", "--dry-run"),
            *("--configfile", "config/scale.yaml", *more, "--", "cells"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if planned.returncode:
        sys.exit(planned.stdout + planned.stderr)
    return time.perf_counter() - begin, planned.stdout + planned.stderr


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2500, 5000, 10000])
    sizes = parser.parse_args().sizes
    least = 4 * REPLICATES
    if min(sizes) < least:
        parser.error(f"--sizes have to be at least {least}: four cells of {REPLICATES} replicates")
    from kvbench.analysis import tables
    from kvbench.records import gathering

    verdict = bounds.line(
        bounds.CANNOT_TELL, _asked(), f"no run of {ASKED_SIZE:,} records; pass --sizes {ASKED_SIZE}"
    )
    for size in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "repository"
            shutil.copytree(
                ROOT,
                folder,
                ignore=shutil.ignore_patterns(".venv", ".git", "results", ".snakemake", "logs"),
            )
            write_case(folder, size)
            planning, _ = plan(folder, "--quiet", "all")
            # As on a cluster: every block is to be measured, and many go into one job.
            grouping, told = plan(
                folder,
                *("--forcerun", "measure_kv_scale", "--groups", "measure_kv_scale=blocks"),
                *("--group-components", f"blocks={GROUPED}"),
            )
            blocks, jobs = told.count("Measuring a block"), told.count("Group job blocks")
            paths = sorted(map(str, folder.glob("results/cells/kv/**/*.json")))
            begin = time.perf_counter()
            samples, summary = tables.kv_tables(gathering.kv_records(paths, {}))
            gathering.write_csv(samples, folder / "samples.csv")
            gathering.write_csv(summary, folder / "summary.csv")
            aggregating = time.perf_counter() - begin
            print(
                f"{len(paths):6d} records: planned in {planning:5.1f} s, "
                f"aggregated in {aggregating:5.1f} s ({len(samples)} sample rows); "
                f"{blocks} blocks planned as {jobs} job groups in {grouping:5.1f} s",
                flush=True,
            )
            if size >= ASKED_SIZE:
                within = planning <= ASKED_PLANNING_S and aggregating <= ASKED_AGGREGATING_S
                if within or size == ASKED_SIZE:
                    verdict = bounds.line(
                        bounds.MET if within else bounds.NOT_MET,
                        _asked(),
                        f"{planning:.1f} s and {aggregating:.1f} s for {len(paths):,}",
                    )
    print(verdict)


def _asked() -> str:
    return (
        f"at most {ASKED_PLANNING_S:.0f} s to plan and {ASKED_AGGREGATING_S:.0f} s to aggregate "
        f"{ASKED_SIZE:,} records"
    )


if __name__ == "__main__":
    main()
