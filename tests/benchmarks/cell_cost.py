"""What a cell costs beside the generation it measures: interpreter, imports, model, fork, record.

    PYTHONPATH=workflow python tests/benchmarks/cell_cost.py [--runs 6]

Runs small blocks of growing size as their rule's script does, each as a fresh job of a run, and subtracts
the seconds of all their turns (cold, timed, and those of the pass for memory) and of waiting for the
machine. What is left is shared by the cells of a block: some of it a block costs once, some each cell
costs by itself. The first block of a run also starts the process that imports the libraries for all, which
is printed beside, and shared by all cells in what a cell of the default configuration costs on average.
What is asked is at most 0.3 s for a cell in a block of three or more, its share of the block's in it. The
blocks take turns, and a value is the median of the runs with its distribution-free 95 % interval, which
takes six of them. At the end it is printed what a cell of an application study costs that measures next to
nothing: from the process that waits for such cells, and in a process that starts afresh.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
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

#: In place of Snakemake: does one job after the other, and says how long each took and how it ended.
RUN = """
import json, subprocess, sys, time
sys.path.insert(0, {workflow!r})
from kvbench import checkout
checkout.lead()
for line in sys.stdin:
    begin = time.perf_counter()
    done = subprocess.run(json.loads(line), capture_output=True, text=True)
    print(json.dumps([time.perf_counter() - begin, done.returncode, done.stderr]), flush=True)
"""
#: A rule's script: what Snakemake puts before it, and its work.
JOB = """
import json, logging, sys
from snakemake.logging import logger
from snakemake.iocontainers import Snakemake
sys.path.insert(0, {workflow!r})
logging.basicConfig(filename={log!r}, filemode="w", level=logging.INFO, force=True)
from kvbench.measurement import warm
warm.call({module!r}, "measure", *json.loads({work!r}), libraries={libraries!r}, alone={alone})
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


class Run:
    """One run: the process that its jobs belong to, as they would to Snakemake."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = len(placement.processors()) or 1
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUN.format(workflow=str(ROOT / "workflow"))],
            # As Snakemake sets them for its jobs.
            env=os.environ | dict.fromkeys(names, str(self._threads)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def beside_s(self, plan: Mapping[str, Any]) -> float:
        """Run a block as a job of this run; its seconds without generation and waiting."""
        folder, members = self._folder, list(plan["cells"])
        outputs = [folder / "records" / f"{name}.json" for name in members]
        files = {
            "model": str(folder / "model"),
            "prompts": str(folder / "prompts.json"),
            "environment": str(folder / "environment.json"),
            "journal": str(folder / "journal.jsonl"),
        }
        code = dict.fromkeys(members, "bench")
        work = [plan, files, code, self._threads, list(map(str, outputs))]
        wall = self._job_s("kvbench.measurement.job", work, "models")
        Path(files["journal"]).unlink(missing_ok=True)
        records = [documents.read_json(path) for path in outputs]
        for record in records:
            if record["status"] != "ok":
                sys.exit(f"cell_cost: {record['cell']['strategy']} is {record['reason']}")
        noise = records[0]["noise"]
        waited = noise["waited_for_lock_s"] + noise["waited_for_quiet_s"]
        return wall - waited - sum(map(generation_s, records))

    def study_s(self, alone: bool) -> float:
        """Run a cell of a study that measures next to nothing as a job of this run; its seconds."""
        folder = self._folder
        cell = {
            **{"study": "eviction", "cell": "anomaly", "timed": True, "seed": 1},
            "factors": {"kind": "anomaly"},
            **{"server_url": None, "code_digest": "bench", "threads": self._threads},
            **{"quiet_wait_s": 0, "libraries": "caches"},
        }
        record = folder / "records" / "study.json"
        files = {"environment_file": str(folder / "environment.json")}
        work = [str(record), files, cell]
        wall = self._job_s("kvbench.studies.measuring._cell", work, "caches", alone)
        written = documents.read_json(record)
        if written["status"] != "ok":
            sys.exit(f"cell_cost: the cell of a study is {written['reason']}")
        return wall - written["noise"]["waited_for_lock_s"]

    def _job_s(self, module: str, work: list[Any], libraries: str, alone: bool = False) -> float:
        """Have ``measure`` of a module called as a rule's script does it; the seconds of the job."""
        program = JOB.format(
            workflow=str(ROOT / "workflow"),
            log=str(self._folder / "job.log"),
            module=module,
            work=json.dumps(work),
            libraries=libraries,
            alone=alone,
        )
        print(json.dumps([sys.executable, "-c", program]), file=self._process.stdin, flush=True)
        wall, status, said = json.loads(self._process.stdout.readline())
        if status:
            sys.exit(f"cell_cost: a job of {module} failed: {said[-2000:]}")
        return wall


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
        plans: dict[int, dict[str, Any]] = {}
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
            plans[len(block.cells)] = block.as_dict()
        default = configuration.fill(documents.read_yaml(ROOT / "config" / "config.yaml"), "config")
        planned = configuration.plan_kv(default, scenarios, known, "config").values()
        found: dict[int, list[float]] = {count: [] for count in plans}
        first: list[float] = []
        studies: dict[str, list[float]] = {"forked": [], "afresh": []}
        for number in range(runs + 1):
            with Run(folder) as run:
                begun = run.beside_s(plans[max(plans)])
                seconds = {count: run.beside_s(plan) for count, plan in plans.items()}
                # The first one starts the process that waits for cells of studies.
                run.study_s(alone=False)
                ways = {"forked": run.study_s(alone=False), "afresh": run.study_s(alone=True)}
            # The first run fills the page cache and is left out.
            if number:
                first.append(begun)
                for count, one in seconds.items():
                    found[count].append(one)
                for way, one in ways.items():
                    studies[way].append(one)
    report(found, first, [len(block.cells) for block in planned])
    print(
        f"a cell of a study: {shown(studies['forked'])[0]} from the waiting process, "
        f"{shown(studies['afresh'])[0]} in a process that starts afresh"
    )


def report(
    found: Mapping[int, Sequence[float]], first: Sequence[float], planned: Sequence[int]
) -> None:
    """Print what blocks took beside their generation, and the verdicts.

    Parameters
    ----------
    found:
        Cells of a block to what such a block took, run by run, when the libraries were imported.
    first:
        What the first block of each run took, one of the largest.
    planned:
        Cells of every block of the default configuration.
    """
    asked = f"at most {ASKED_S:.1f} s a cell beside its turns"
    bounds_met: list[tuple[str, str]] = []
    for count, seconds in found.items():
        share, low, high = shown([one / count for one in seconds])
        print(
            f"a block of {count}: {shown(seconds)[0]} beside its generation, {share} a cell "
            f"({len(seconds)} jobs of as many runs)"
        )
        if count >= FEWEST_CELLS:
            bounds_met.append(
                (f"{share} in a block of {count}", bounds.judge(low, high, most=ASKED_S))
            )
    few, many = min(found), max(found)
    each = [
        (more - less) / (many - few) for less, more in zip(found[few], found[many], strict=True)
    ]
    once = [less - few * one for less, one in zip(found[few], each, strict=True)]
    print(
        f"of that {shown(each)[0]} for each further cell and {shown(once)[0]} for the block "
        "(Snakemake's own work between two jobs comes on top)"
    )
    imports = [begun - later for begun, later in zip(first, found[many], strict=True)]
    print(
        f"the first block of a run, of {many}: {shown(first)[0]}, {shown(imports)[0]} more than a later one"
    )
    verdicts = {verdict for _, verdict in bounds_met}
    order = (bounds.NOT_MET, bounds.CANNOT_TELL, bounds.MET)
    print(
        bounds.line(
            next(one for one in order if one in verdicts),
            f"{asked} in a block of {FEWEST_CELLS} or more, but for the first of a run",
            "; ".join(share for share, _ in bounds_met),
        )
    )
    cells = sum(planned)
    averages = [
        (more + len(planned) * block + cells * cell) / cells
        for more, block, cell in zip(imports, once, each, strict=True)
    ]
    share, low, high = shown(averages)
    print(
        bounds.line(
            bounds.judge(low, high, most=ASKED_S),
            f"{asked}, on average over a run of the default configuration",
            f"{share} with its {cells} cells in {len(planned)} blocks, the first one's start included",
        )
    )


if __name__ == "__main__":
    main()
