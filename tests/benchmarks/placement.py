"""What binding the main threads removes: equal cells while one processor of two is slowed from outside.

    sudo PYTHONPATH=workflow python tests/benchmarks/placement.py [--generations 8] [--rounds 60]

A neighbour on the host slows one virtual processor and not the other; a program of real-time priority
that takes a share of one processor every two milliseconds, on for seconds and off for seconds, does the
same from inside (Linux, as root). Generations of three equal cells live side by side, once as the kernel
places them and once bound (:mod:`kvbench.measurement.placement`); the two arms take turns. Of each arm
are printed the standard deviation of one turn from the middle one of its round, and by how much a turn
took longer where its main thread was on the slowed processor and another's was not. Bound cells should
deviate less: the interval of the ratio of the two deviations lies below 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import bounds
import numpy as np
from kvbench import documents
from kvbench.analysis import paired
from kvbench.inputs import configuration, models, scenarios, tokens
from kvbench.measurement import lock, placement, processes, rounds
from kvbench.measurement.blocks import _warm_parent
from kvbench.measurement.cell import Job

ROOT = Path(__file__).resolve().parents[2]
CELLS = ("a", "b", "c")
AS_PLACED, BOUND = "as placed", "bound"
ASKED = "equal cells deviate less when their main threads are bound"
#: The cells that are measured, as far as they generate.
CELL = {
    "measured": "dynamic",
    "device": "cpu",
    "dtype": "float32",
    "turns": 1,
    "max_new_tokens": 24,
    "max_prompt_tokens": None,
    "warmup": 1,
    "memory": "separate",
    "slowdown": 0.0,
}

#: Takes a share of a processor, in stretches of 2 to 8 s with as long pauses; says when it begins. The
#: kernel ends it with its parent (prctl(2), PR_SET_PDEATHSIG), however that ends.
NEIGHBOUR = """
import ctypes, os, random, signal, sys, time
share, processor, parent = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != parent:
    sys.exit()
os.sched_setaffinity(0, {processor})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
print("ready", flush=True)
while True:
    end = time.perf_counter() + random.uniform(2, 8)
    while (now := time.perf_counter()) < end:
        while time.perf_counter() - now < share * 0.002:
            pass
        time.sleep((1 - share) * 0.002)
    time.sleep(random.uniform(2, 8))
"""


class NotAllowed(Exception):
    """The kernel gives this process no real-time priority."""


@dataclass
class Arm:
    """What was seen of one way to place the threads.

    Attributes
    ----------
    deviations:
        For each round the logarithm of each cell's seconds over those of the round's middle cell.
    slowed:
        For each round and cell whether the main thread was on the slowed processor at its end.
    spreads:
        The standard deviation of each generation's deviations.
    """

    deviations: list[list[float]] = field(default_factory=list)
    slowed: list[list[bool]] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)

    def line(self, name: str) -> str:
        """What is printed of it."""
        found, there = np.array(self.deviations), np.array(self.slowed)
        mixed = there.any(axis=1) & ~there.all(axis=1)
        text = (
            f"{name:10s} a turn deviates by {100 * found.std():.1f} % (standard deviation, "
            f"{len(found)} rounds); main threads were on both processors in "
            f"{100 * mixed.mean():.0f} % of the rounds"
        )
        if mixed.any():
            apart = found[mixed][there[mixed]].mean() - found[mixed][~there[mixed]].mean()
            text += f"; there, the slowed one took {100 * np.expm1(apart):+.1f} % against the other"
        return text


def inputs(folder: Path) -> tuple[Path, Path]:
    """The embedded model and a conversation's prompts, made as the inputs stage makes them."""
    model = folder / "model"
    models.prepare(configuration.read_models(ROOT / "config/models")["embedded"], model, ROOT)
    scenario = scenarios.load(ROOT / "config/scenarios/insurance_claim_auto.yaml")
    prompts = folder / "prompts.json"
    documents.write_json(prompts, tokens.prompts(model, scenario))
    return model, prompts


@contextmanager
def neighbour(share: float, processor: int) -> Iterator[None]:
    """Slow one processor for as long as this lasts, and never longer.

    Raises
    ------
    NotAllowed
        The kernel refuses the priority, as in most containers.
    """
    arguments = [str(share), str(processor), str(os.getpid())]
    with subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            if process.stdout.readline().strip() != "ready":
                raise NotAllowed(process.stderr.read().strip().rpartition("\n")[2])
            yield
        finally:
            process.kill()


def generation(
    arm: Arm, bound: bool, count: int, job: Job, parent: models.LoadedModel, slowed: int
) -> None:
    """Add to an arm the rounds of three fresh cells.

    Parameters
    ----------
    arm:
        Where the rounds go.
    bound:
        Whether the main threads are put on one processor.
    count:
        Rounds.
    job, parent:
        What the cells do, and the warm model that they share.
    slowed:
        The processor that the neighbour is on.
    """
    deviations: list[list[float]] = []
    workers: dict[str, processes.Worker] = {}
    try:
        for name in CELLS:
            workers[name] = processes.fork(job, parent, list(workers.values()))
        for worker in workers.values():
            worker.ask("open")
            worker.ask("warm_up")
            if bound:
                worker.ask("settle")
        watch = rounds.Watch(list(workers.values()))
        for _ in range(count):
            slots = rounds.play(workers, random.sample(CELLS, len(CELLS)), 1, watch)
            took = {slot["strategy"]: np.log(slot["e2e_s"]) for slot in slots}
            middle = float(np.median(list(took.values())))
            deviations.append([float(took[name]) - middle for name in CELLS])
            arm.slowed.append([_processor(workers[name].pid) == slowed for name in CELLS])
    finally:
        for worker in workers.values():
            worker.end()
    arm.deviations += deviations
    arm.spreads.append(float(np.std(deviations)))


def verdict(arms: dict[str, Arm]) -> str:
    """The last line, from the generations of the two arms taken together in the order they came."""
    pairs = zip(arms[BOUND].spreads, arms[AS_PLACED].spreads, strict=True)
    # The spreads are no cells of a block: what processes differ by is all that is looked at here.
    found = paired.ratio(
        [[paired.log_ratio([mine], [other]) for mine, other in pairs]], one_process=True
    ).interval
    told = f"they deviate by {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] of what the others do"
    return bounds.line(bounds.judge(found.low, found.high, most=1.0), ASKED, told)


def main() -> None:
    """Measure both arms and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", type=int, default=8, help="of three cells, in each arm")
    parser.add_argument("--rounds", type=int, default=60, help="of each generation")
    parser.add_argument("--share", type=float, default=0.2, help="that the neighbour takes, 0 to 1")
    given = parser.parse_args()
    if given.generations < 1 or given.rounds < 2 or not 0 < given.share < 1:
        parser.error("needs a generation, two rounds and a share between 0 and 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    allowed = placement.processors()
    missing = None
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        missing = "needs Linux and root, for a neighbour of real-time priority"
    elif len(allowed) < 2:
        missing = "needs two processors"
    if missing:
        print(bounds.line(bounds.CANNOT_TELL, ASKED, f"not run: {missing}"))
        return
    arms = {AS_PLACED: Arm(), BOUND: Arm()}
    with tempfile.TemporaryDirectory() as folder, processes.terminable(), lock.machine():
        job = Job(CELL, *inputs(Path(folder)), len(allowed))
        parent = _warm_parent(job.model_folder, "float32")
        try:
            with neighbour(given.share, allowed[-1]):
                for number in range(given.generations):
                    for name in rounds.drawn(list(arms), number):
                        generation(
                            arms[name], name == BOUND, given.rounds, job, parent, allowed[-1]
                        )
        except NotAllowed as refusal:
            told = f"not run: no real-time priority is to be had here ({refusal})"
            print(bounds.line(bounds.CANNOT_TELL, ASKED, told))
            return
    for name, arm in arms.items():
        print(arm.line(name))
    print(verdict(arms))


def _processor(pid: int) -> int:
    """The processor that a process's main thread ran on last: proc(5), field 39."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[36])


if __name__ == "__main__":
    main()
