"""What binding the main threads removes: equal cells while one processor of two is slowed from outside.

    sudo PYTHONPATH=workflow python tests/benchmarks/placement.py [--generations 8] [--rounds 60]

A neighbour on the host slows one virtual processor and not the other; a program of real-time priority
that takes a share of one processor every two milliseconds, on for seconds and off for seconds, does the
same from inside (Linux, as root). Three equal cells live side by side, once as the kernel places them and
once bound (``kvbench.measurement.placement``). Printed are the standard deviation of one turn's paired
deviation, and what a turn took longer or shorter by where its main thread was on the slowed processor.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CELLS = ("a", "b", "c")

#: Takes a share of the last processor, in stretches of 2 to 8 s with as long pauses.
NEIGHBOUR = """
import os, random, sys, time
share, processor = float(sys.argv[1]), int(sys.argv[2])
os.sched_setaffinity(0, {processor})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
while True:
    end = time.perf_counter() + random.uniform(2, 8)
    while (now := time.perf_counter()) < end:
        while time.perf_counter() - now < share * 0.002:
            pass
        time.sleep((1 - share) * 0.002)
    time.sleep(random.uniform(2, 8))
"""


def inputs(folder: Path) -> tuple[Path, Path]:
    """The embedded model and a conversation's prompts, made as the inputs stage makes them."""
    from kvbench import documents
    from kvbench.inputs import configuration, models, scenarios, tokens

    model = folder / "model"
    models.prepare(configuration.read_models(ROOT / "config/models")["embedded"], model, ROOT)
    scenario = scenarios.load(ROOT / "config/scenarios/insurance_claim_auto.yaml")
    prompts = folder / "prompts.json"
    documents.write_json(prompts, tokens.prompts(model, scenario))
    return model, prompts


def main() -> None:
    """Measure both arms and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--share", type=float, default=0.2)
    args = parser.parse_args()
    if not hasattr(os, "sched_setscheduler") or os.geteuid() != 0:
        print("placement: needs Linux and root, for a program of real-time priority; not run")
        return
    from kvbench.measurement import placement, processes, rounds
    from kvbench.measurement.blocks import _warm_parent
    from kvbench.measurement.cell import Job

    allowed = placement.processors()
    if len(allowed) < 2:
        print("placement: needs two processors; not run")
        return
    with tempfile.TemporaryDirectory() as folder:
        model_folder, prompts = inputs(Path(folder))
        cell = {
            **{"measured": "dynamic", "device": "cpu", "dtype": "float32", "memory": "separate"},
            **{"turns": 1, "max_new_tokens": 24, "max_prompt_tokens": None, "warmup": 1},
            **{"slowdown": 0.0, "profile": False, "quality": False},
        }
        job = Job(cell, model_folder, prompts, len(allowed))
        parent = _warm_parent(model_folder, "float32")
        command = [sys.executable, "-c", NEIGHBOUR, str(args.share), str(allowed[-1])]
        with subprocess.Popen(command) as neighbour:
            try:
                for bound in (False, True):
                    print(_arm(bound, args, job, parent, processes, rounds, allowed[-1]))
            finally:
                neighbour.kill()


def _arm(bound, args, job, parent, processes, rounds, slowed) -> str:
    deviations, places = [], []
    for _ in range(args.generations):
        workers = {}
        try:
            for name in CELLS:
                workers[name] = processes.fork(job, parent, list(workers.values()))
            for worker in workers.values():
                worker.ask("open")
                worker.ask("warm_up")
                if bound:
                    worker.ask("settle")
            watch = rounds.Watch(list(workers.values()))
            for _ in range(args.rounds):
                order = random.sample(CELLS, len(CELLS))
                slots = rounds.play(workers, order, 1, watch)
                took = {slot["strategy"]: np.log(slot["e2e_s"]) for slot in slots}
                middle = np.median(list(took.values()))
                deviations.append([took[name] - middle for name in CELLS])
                places.append([_processor(workers[name].pid) == slowed for name in CELLS])
        finally:
            for worker in workers.values():
                worker.end()
    found, there = np.array(deviations), np.array(places)
    mixed = there.any(axis=1) & ~there.all(axis=1)
    text = (
        f"{'bound' if bound else 'as placed':10s} deviation of a turn {100 * found.std():.1f} %, "
        f"rounds with main threads on both processors {100 * mixed.mean():.0f} %"
    )
    if mixed.any():
        apart = found[mixed][there[mixed]].mean() - found[mixed][~there[mixed]].mean()
        text += f"; there, the slowed one against the other {100 * np.expm1(apart):+.1f} %"
    return text


def _processor(pid: int) -> int:
    """The processor that a process's main thread ran on last: proc(5), field 39."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[36])


if __name__ == "__main__":
    main()
