"""What a cell costs beside the generation it measures: interpreter, imports, model, fork, record.

Runs small blocks of growing size, each in a fresh process as its rule's script would, and subtracts the
time of all their turns (cold, timed, and those of the pass for memory) and of waiting for the machine. What
is left is shared by the cells of a block, so that it falls with their number; the bound is 0.3 s a cell
beside what a block costs once.

    PYTHONPATH=workflow python tests/benchmarks/cell_cost.py [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Strategies of the blocks; the reference brings its control.
BLOCKS = (("static",), ("none", "static"), ("none", "dynamic", "static"))

CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, {workflow!r})
from kvbench import records
from kvbench.measurement import blocks
folder = Path({folder!r})
plan = json.loads((folder / "plan.json").read_text())
files = blocks.Files(
    folder / "model", folder / "prompts.json", folder / "environment.json", folder / "journal.jsonl"
)
for name, record in blocks.measure(plan, files, dict.fromkeys(plan["cells"], "bench"), {threads}).items():
    records.write(folder / "records" / (name + ".json"), record)
files.journal.unlink()
"""


def generation_s(record: dict) -> float:
    """Seconds that one cell generated: its cold and timed turns, and once more for memory."""
    total = 0.0
    for turn in record["turns"]:
        timed = [sample["e2e_s"] for sample in turn["samples"]]
        total += sum(timed) + sum(sample["e2e_s"] for sample in turn["cold"])
        total += statistics.median(timed)
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    from kvbench import documents
    from kvbench.inputs import configuration, models, tokens
    from kvbench.measurement import environment

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenarios, known = configuration.load_scenarios_and_models(ROOT / "config")
        models.prepare(known["embedded"], folder / "model", ROOT)
        scenario = scenarios["banking_open_account"]
        documents.write_json(folder / "prompts.json", tokens.prompts(folder / "model", scenario))
        documents.write_json(folder / "environment.json", environment.describe("cpu", ROOT))
        code = CHILD.format(
            workflow=str(ROOT / "workflow"), folder=str(folder), threads=os.cpu_count()
        )
        costs: list[tuple[int, float]] = []
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
            documents.write_json(folder / "plan.json", block.as_dict())
            found = []
            for number in range(runs + 1):
                begin = time.perf_counter()
                subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
                wall = time.perf_counter() - begin
                names = [cell.member for cell in block.cells]
                records = [
                    json.loads((folder / "records" / f"{name}.json").read_text()) for name in names
                ]
                # The first process fills the page cache and is left out.
                if number:
                    waited = records[0]["noise"]["waited_for_lock_s"]
                    found.append(wall - waited - sum(map(generation_s, records)))
            costs.append((len(block.cells), statistics.median(found)))
            count, cost = costs[-1]
            print(
                f"a block of {count}: {cost:.2f} s beside its generation, {cost / count:.2f} s a cell "
                f"(from {min(found):.2f} to {max(found):.2f} s over {runs} fresh processes)"
            )
    (few, less), (many, more) = costs[0], costs[-1]
    each = (more - less) / (many - few)
    print(
        f"of that {each:.2f} s for each cell (bound 0.30 s) and {less - few * each:.2f} s for the block "
        "(Snakemake itself adds its start of a script, about 0.4 s)"
    )


if __name__ == "__main__":
    main()
