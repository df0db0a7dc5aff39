"""What a cell costs beside the generation it measures: interpreter, imports, model, fork, record.

    PYTHONPATH=workflow python tests/benchmarks/cell_cost.py [--runs 6]

Runs small blocks of growing size, each in a fresh process as its rule's script would, and subtracts the
seconds of all their turns (cold, timed, and those of the pass for memory) and of waiting for the machine.
What is left is shared by the cells of a block: some of it a block costs once, some each cell costs by
itself. Both are printed; what is asked of a cell in a block of three or more is at most 0.3 s, its share
of the block's in it. The blocks take turns, and a value is the median of the runs with its
distribution-free 95 % interval, which takes six of them.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bounds
from kvbench import documents
from kvbench.analysis import intervals
from kvbench.inputs import configuration, models, tokens
from kvbench.measurement import environment, placement

ROOT = Path(__file__).resolve().parents[2]
#: Strategies of the blocks; the reference brings its control.
BLOCKS = (("static",), ("none", "static"), ("none", "dynamic", "static"))
#: Seconds that are asked of a cell, and the cells of a block from which on they are.
ASKED_S, FEWEST_CELLS = 0.3, 3

CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, {workflow!r})
from kvbench import records
from kvbench.measurement import blocks
folder = Path({folder!r})
plan = json.loads((folder / {plan!r}).read_text())
files = blocks.Files(
    folder / "model", folder / "prompts.json", folder / "environment.json", folder / "journal.jsonl"
)
for name, record in blocks.measure(plan, files, dict.fromkeys(plan["cells"], "bench"), {threads}).items():
    records.write(folder / "records" / (name + ".json"), record)
files.journal.unlink()
"""


def generation_s(record: Mapping[str, Any]) -> float:
    """Seconds that one cell generated: its cold and timed turns, and once more for memory."""
    total = 0.0
    for turn in record["turns"]:
        timed = [sample["e2e_s"] for sample in turn["samples"]]
        total += sum(timed) + sum(sample["e2e_s"] for sample in turn["cold"])
        # The pass for memory is not timed; its turns are taken to be like the others.
        total += statistics.median(timed)
    return total


def beside_s(folder: Path, plan: str, members: Sequence[str]) -> float:
    """Run a block in a fresh process; its seconds without generation and waiting."""
    threads = len(placement.processors()) or 1
    code = CHILD.format(
        workflow=str(ROOT / "workflow"), folder=str(folder), plan=plan, threads=threads
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    wall = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"cell_cost: the block of {', '.join(members)} failed: {done.stderr[-2000:]}")
    records = [documents.read_json(folder / "records" / f"{name}.json") for name in members]
    for record in records:
        if record["status"] != "ok":
            sys.exit(f"cell_cost: {record['cell']['strategy']} is {record['reason']}")
    noise = records[0]["noise"]
    waited = noise["waited_for_lock_s"] + noise["waited_for_quiet_s"]
    return wall - waited - sum(map(generation_s, records))


def shown(seconds: Sequence[float]) -> tuple[str, float, float]:
    """A median with its interval as text, and the interval's ends, NaN with fewer than six."""
    middle, ends = intervals.median(seconds)
    low, high = ends or (math.nan, math.nan)
    text = (
        f"[{low:.2f}, {high:.2f}]" if ends else f"(from {min(seconds):.2f} to {max(seconds):.2f})"
    )
    return f"{middle:.2f} s {text}", low, high


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=6)
    runs = parser.parse_args().runs
    if runs < 1:
        parser.error("--runs has to be at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenarios, known = configuration.load_scenarios_and_models(ROOT / "config")
        models.prepare(known["embedded"], folder / "model", ROOT)
        scenario = scenarios["banking_open_account"]
        documents.write_json(folder / "prompts.json", tokens.prompts(folder / "model", scenario))
        documents.write_json(folder / "environment.json", environment.describe("cpu", ROOT))
        plans: dict[str, list[str]] = {}
        for strategies in BLOCKS:
            experiment = {
                "name": "bench",
                "models": ["embedded"],
                "scenarios": ["banking_open_account"],
                "strategies": list(strategies),
                "turns": 1,
                "max_new_tokens": 8,
                "max_rounds": 3,
            }
            config = configuration.fill(
                {"kv": {"experiments": [experiment], "quiet_wait_s": 0}}, "bench"
            )
            (block,) = configuration.plan_kv(config, scenarios, known, "bench").values()
            name = f"plan{len(block.cells)}.json"
            documents.write_json(folder / name, block.as_dict())
            plans[name] = [cell.member for cell in block.cells]
        found: dict[str, list[float]] = {name: [] for name in plans}
        for number in range(runs + 1):
            for name, members in plans.items():
                seconds = beside_s(folder, name, members)
                # The first of each fills the page cache and is left out.
                if number:
                    found[name].append(seconds)
    report({len(plans[name]): seconds for name, seconds in found.items()})


def report(found: Mapping[int, Sequence[float]]) -> None:
    """Print what blocks of some cells took beside their generation, run by run, and the verdict."""
    shares: list[tuple[int, str, str]] = []
    for count, seconds in found.items():
        share, low, high = shown([one / count for one in seconds])
        print(
            f"a block of {count}: {shown(seconds)[0]} beside its generation, {share} a cell "
            f"({len(seconds)} fresh processes)"
        )
        if count >= FEWEST_CELLS:
            shares.append((count, share, bounds.judge(low, high, most=ASKED_S)))
    few, many = min(found), max(found)
    each = [
        (more - less) / (many - few) for less, more in zip(found[few], found[many], strict=True)
    ]
    once = [less - few * one for less, one in zip(found[few], each, strict=True)]
    print(
        f"of that {shown(each)[0]} for each further cell and {shown(once)[0]} for the block "
        "(Snakemake itself adds its start of a script)"
    )
    verdicts = {verdict for *_, verdict in shares}
    order = (bounds.NOT_MET, bounds.CANNOT_TELL, bounds.MET)
    print(
        bounds.line(
            next(one for one in order if one in verdicts),
            f"at most {ASKED_S:.1f} s a cell beside its turns in a block of {FEWEST_CELLS} or more",
            "; ".join(f"{share} in a block of {count}" for count, share, _ in shares),
        )
    )


if __name__ == "__main__":
    main()
