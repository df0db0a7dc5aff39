"""What a cell costs beside the generation it measures: interpreter, imports, model, record.

Runs one small cell through its rule's script, as Snakemake would, several times in fresh processes, and
subtracts the time of its warm-up, timed and memory conversations. The bound is 3.5 s on an idle machine.

    PYTHONPATH=workflow python tests/benchmarks/cell_cost.py [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, {workflow!r})
from kvbench import records
from kvbench.measurement import conversation
folder = Path({folder!r})
cell = json.loads((folder / "cell.json").read_text())
record = conversation.run_cell(
    cell, folder / "model", folder / "prompts.json", folder / "environment.json", "bench", {threads}
)
records.write(folder / "record.json", record)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    from kvbench import documents
    from kvbench.inputs import configuration, models, scenarios, tokens
    from kvbench.measurement import environment

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models.prepare(
            configuration.read_models(ROOT / "config/models")["embedded"], folder / "model", ROOT
        )
        scenario = scenarios.load(ROOT / "config/scenarios/banking_open_account.yaml")
        documents.write_json(folder / "prompts.json", tokens.prompts(folder / "model", scenario))
        documents.write_json(folder / "environment.json", environment.describe("cpu", ROOT))
        cell = configuration.KvCell(
            experiment="bench",
            model="embedded",
            scenario="banking_open_account",
            strategy="dynamic",
            replicate=1,
            device="cpu",
            dtype="float32",
            turns=1,
            max_new_tokens=8,
            max_prompt_tokens=None,
            warmup=1,
            iterations=1,
            budget_s=60,
            quiet_wait_s=0,
            memory="separate",
            seed=1,
        )
        documents.write_json(folder / "cell.json", cell.as_dict())
        import os

        code = CHILD.format(
            workflow=str(ROOT / "workflow"), folder=str(folder), threads=os.cpu_count()
        )
        costs = []
        for number in range(runs + 1):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            wall = time.perf_counter() - begin
            record = json.loads((folder / "record.json").read_text())
            measured = record["noise"]["warmup_s"] + 2 * record["noise"]["measured_s"]
            # The first process fills the page cache and is left out.
            if number:
                costs.append(wall - measured)
    print(
        f"a cell beside its generation: median {statistics.median(costs):.2f} s, "
        f"from {min(costs):.2f} to {max(costs):.2f} s over {runs} fresh processes "
        "(bound 3.5 s; Snakemake itself adds its start of a script, about 0.4 s)"
    )


if __name__ == "__main__":
    main()
