"""A block: cells that are compared live side by side and take turns until their ratios are known.

Cells that run one after the other stand in different weather: a shared machine's speed wanders by a
tenth and more within seconds. So the strategies of a block are processes that are alive together,
one of them works at a time, slots alternate turn by turn, and every round has an order of its own
("randomised multiple interleaved trials", Abedi and Brecht, ICPE 2017, doi 10.1145/3030207.3030229).
What two of them took in one round is compared with each other and with nothing else.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench import documents, records, strategies
from kvbench.analysis import paired
from kvbench.inputs import models
from kvbench.layout import workload
from kvbench.measurement import (
    fitting,
    limits,
    lock,
    noise,
    processes,
    rounds,
    startup,
    stopping,
)
from kvbench.measurement.cell import Failure, Job, failure
from kvbench.measurement.conversation import Script, script
from kvbench.measurement.journal import Journal
from kvbench.measurement.processes import FORKED, FRESH, Ended, Worker

logger = logging.getLogger(__name__)

#: Settings of a block that say how long it goes on, not what is measured: they may differ between
#: the start of a block and its resumption.
_EFFORT = ("precision", "budget_s", "min_rounds", "max_rounds", "rounds", "quiet_wait_s")


@dataclass(frozen=True)
class Files:
    """What the inputs stage made for a block, and where its rounds are kept until it is whole."""

    model: Path
    prompts: Path
    environment: Path
    journal: Path


@dataclass
class _Block:
    """A block at work: what was planned, what is known so far, and who fell out."""

    plan: Mapping[str, Any]
    files: Files
    threads: int
    turns: Script
    progress: Callable[[str], None]
    journal: Journal
    rounds: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    closed: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    noise: dict[str, Any] = field(default_factory=dict)
    warning: str | None = None

    @property
    def cells(self) -> Mapping[str, Mapping[str, Any]]:
        return self.plan["cells"]

    @property
    def effort(self) -> dict[str, Any]:
        """What decides when enough is known."""
        return {key: self.plan[key] for key in _EFFORT if key != "quiet_wait_s"}

    def take_up(self, piece: Mapping[str, Any]) -> None:
        """Take in a piece of finished work, just done or kept by the journal."""
        if "round" in piece:
            self.rounds.append(dict(piece))
        elif "finished" in piece:
            self.finished[piece["finished"]] = dict(piece)
        else:
            self.closed[piece["part"]] = dict(piece)
            # Who fell out of a part that is closed is not asked again; by now nobody else knows why.
            for name, (status, reason) in piece.get("failed", {}).items():
                self.failures.setdefault(name, Failure(status, reason))

    def of(self, part: int) -> list[dict[str, Any]]:
        """The rounds so far of one part."""
        return [entry for entry in self.rounds if entry["part"] == part]

    def keep(self, piece: Mapping[str, Any]) -> None:
        self.journal.append(piece)
        self.take_up(piece)

    def fall_out(self, name: str, found: Failure) -> None:
        self.failures[name] = found
        self.progress(f"{name}: {found.status}: {found.reason}")


def measure(
    plan: Mapping[str, Any],
    files: Files,
    digests: Mapping[str, str],
    threads: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Measure a block and return the record of each of its cells. What fails inside a cell is data.

    Parameters
    ----------
    plan:
        :meth:`kvbench.inputs.configuration.KvBlock.as_dict`.
    files:
        Its inputs, and its journal. Rounds in a journal of the same conditions are taken up; the
        caller removes it (:meth:`kvbench.measurement.journal.Journal.remove`) when the records lie.
    digests:
        Cell to the digest of the code that can change its measurement.
    threads:
        Threads for torch's operations; part of a record's identity.
    progress:
        Receives one line whenever something is done.

    Raises
    ------
    InputError
        The inputs are wrong; no record is made then.
    """
    started = records.now()
    document = documents.read_json(files.prompts, "prompts")
    facts = documents.read_json(files.environment, "environment")
    turns = script(document, next(iter(plan["cells"].values())))
    journal = Journal(files.journal, _conditions(plan, files, facts, digests, threads))
    block = _Block(plan, files, threads, turns, progress, journal)
    if journal.differs:
        progress(f"rounds of an earlier start are left out: other {', '.join(journal.differs)}")
    for piece in journal.kept:
        # What was enough for another precision or budget may not be enough now.
        if "stopped" not in piece or piece.get("effort") == block.effort:
            block.take_up(piece)
    if block.rounds:
        block.resumed.append(len(block.rounds))
        progress(f"taking up after {len(block.rounds)} rounds of an earlier start")
    on_cpu = next(iter(block.cells.values()))["device"] == "cpu"
    if on_cpu and (excess := limits.of_this_process().excess(threads)):
        logger.warning(excess)
        block.warning = excess
    kinds = {name: _kind(cell) for name, cell in block.cells.items()}
    for name, cell in block.cells.items():
        if reason := strategies.get(cell["measured"]).available(None, cell["device"]):
            block.fall_out(name, Failure("unsupported", reason))
    if _left(block):
        _measure_left(block, kinds)
    return {
        name: _record(block, name, kinds[name], digests[name], facts, started)
        for name in block.cells
    }


def _conditions(
    plan: Mapping[str, Any],
    files: Files,
    facts: Mapping[str, Any],
    digests: Mapping[str, str],
    threads: int,
) -> dict[str, Any]:
    """What must be equal for rounds of two starts to stand side by side."""
    weights = {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(files.model.iterdir())
        if path.is_file()
    }
    return {
        "code": dict(digests),
        "machine": facts["digest"],
        "model": documents.digest(weights),
        "prompts": documents.sha256_of_file(files.prompts),
        "settings": {key: value for key, value in plan.items() if key not in _EFFORT},
        "threads": threads,
    }


def _kind(cell: Mapping[str, Any]) -> str:
    """How a cell's process comes about.

    CUDA does not survive a fork, macOS's libraries do not promise to, and a package that
    transformers looks for once, when it is imported, has to be there from the start.
    """
    alone = set(strategies.get(cell["measured"]).needs()) & startup.UNUSED
    forks = cell["device"] == "cpu" and sys.platform == "linux" and not alone
    return FORKED if forks else FRESH


def _left(block: _Block) -> list[str]:
    """The cells that are still to be measured: neither fallen out nor of a part that is closed."""
    had = {name for part in block.closed.values() for name in part["members"]}
    return [name for name in block.cells if name not in block.failures and name not in had]


def _parts(block: _Block, kinds: Mapping[str, str]) -> list[list[str]]:
    """The cells that live side by side, of those that are left; all, unless memory forbids it.

    Each part has the cells that all are compared with, whether or not they had a part before.
    """
    left = _left(block)
    always = (block.plan["reference"], block.plan["control"])
    able = [
        name
        for name in block.cells
        if name in left or (name in always and name not in block.failures)
    ]
    found = {
        name: fitting.needs(block.cells[name], block.files.model, block.turns, kinds[name])
        for name in able
    }
    shared = max(
        (weights for name, (_, weights) in found.items() if kinds[name] == FORKED), default=0
    )
    compared = [name for name in always if name in able]
    own = {name: size for name, (size, _) in found.items()}
    free = fitting.free_bytes(block.cells[able[0]]["device"])
    if block.turns.batch > 1:
        # A batch is a number that somebody wrote: it is not tried where it cannot fit.
        for name, numbers in fitting.too_large(own, compared, shared, free).items():
            told = f"a batch of {block.turns.batch} needs {numbers}; lower batch"
            block.fall_out(name, Failure("out_of_memory", told))
        own = {name: size for name, size in own.items() if name not in block.failures}
        compared = [name for name in compared if name in own]
        if not own:
            return []
    parts = fitting.parts(own, compared, shared, free)
    if len(parts) > 1:
        block.progress(
            f"the {len(able)} cells do not fit into {(free or 0) / 2**30:.1f} GiB together: measured "
            f"in {len(parts)} parts, {'; '.join(', '.join(part) for part in parts)}"
        )
    return parts


def _measure_left(block: _Block, kinds: Mapping[str, str]) -> None:
    cells = block.cells
    # Under the lock from the start: whoever has the machine has its memory too, until it is done, and
    # is not to be disturbed by a model that is loaded.
    with processes.terminable(), lock.machine() as waited:
        block.noise["waited_for_lock_s"] = round(waited, 3)
        # Memory may be another than at an earlier start: what that has closed stays as it is.
        first, parts = len(block.closed), _parts(block, kinds)
        forked = [name for part in parts for name in part if kinds[name] == FORKED]
        model = None
        if forked:
            block.progress("loading the model")
            try:
                model = _warm_parent(block.files.model, cells[forked[0]]["dtype"])
            except Exception as error:
                found = failure(error)
                for name in set(forked):
                    block.fall_out(name, found)
        probe = rounds.Probe()
        for number, part in enumerate(parts, first):
            able = [name for name in part if name not in block.failures]
            with _alive(block, able, kinds, model) as workers:
                _measure_part(block, number, workers, probe, first + len(parts))


def _warm_parent(folder: Path, dtype: str) -> models.LoadedModel:
    """Load the model without a parallel region, whose threads no forked process would have."""
    with startup.collector_paused():
        import torch

        torch.set_num_threads(1)
        return models.load(folder, "cpu", dtype)


@contextmanager
def _alive(
    block: _Block, names: Sequence[str], kinds: Mapping[str, str], model: Any
) -> Iterator[dict[str, Worker]]:
    """The processes of some cells, opened; all of them are gone at the end, whatever happens."""
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            job = Job(block.cells[name], block.files.model, block.files.prompts, block.threads)
            if kinds[name] == FORKED:
                workers[name] = processes.fork(job, model, list(workers.values()))
            else:
                workers[name] = processes.start(job)
        for worker in workers.values():
            worker.send("open")
        yield workers
    finally:
        for worker in workers.values():
            worker.end()


def _measure_part(
    block: _Block, part: int, workers: Mapping[str, Worker], probe: rounds.Probe, parts: int
) -> None:
    """Warm up, play rounds until enough is known, and let every cell finish."""
    live = dict(workers)
    spent: dict[str, float] = dict.fromkeys(workers, 0.0)

    def each(step: Callable[[str, Worker], Any], names: Sequence[str]) -> dict[str, Any]:
        """Take a step with some cells; those that end in it fall out."""
        found = {}
        for name in names:
            begin = time.perf_counter()
            try:
                found[name] = step(name, live[name])
            except Ended as ended:
                block.fall_out(name, ended.failure)
                del live[name]
            spent[name] += time.perf_counter() - begin
        return found

    each(lambda _, worker: worker.receive(), list(live))
    quiet = noise.wait_for_quiet(block.plan["quiet_wait_s"])
    block.noise["waited_for_quiet_s"] = round(quiet, 3)
    cold = each(lambda _, worker: worker.ask("warm_up"), list(live))
    each(lambda _, worker: worker.ask("settle"), list(live))
    block.progress(f"warm: {', '.join(live)}")

    def lost(name: str, ended: Ended, turn: int) -> None:
        where = f"in round {len(block.rounds) + 1}, turn {turn + 1}"
        block.fall_out(name, Failure(ended.failure.status, f"{ended.failure.reason} {where}"))
        del live[name]

    watch = rounds.Watch(list(workers.values()))
    rules = stopping.Rules.of(block.plan, len(block.turns.requests), parts)
    resting: set[str] = set()
    while True:
        members, stop = stopping.next_round(rules, block.of(part), list(live))
        if stop:
            break
        number = len(block.rounds)
        order = rounds.drawn(members, block.plan["seed"], block.plan["id"], number)
        begin, probe_s = time.perf_counter(), probe.seconds()
        slot = block.rounds[-1]["slots"][-1]["slot"] + 1 if block.rounds else 0
        slots = rounds.play(live, order, rules.turns, watch, slot, lost)
        if not slots:
            continue
        wall = time.perf_counter() - begin
        wall -= sum(entry["e2e_s"] for entry in slots if entry["strategy"] in rules.once)
        block.keep(
            {
                "round": number,
                "part": part,
                "order": order,
                "probe_s": probe_s,
                "wall_s": wall,
                "slots": slots,
            }
        )
        block.progress(f"round {number + 1} of {', '.join(members)}: {wall:.2f} s")
        if new := stopping.settled(rules, block.of(part), list(live)) - resting:
            resting |= new
            block.progress(f"known well enough, and resting: {', '.join(sorted(new))}")
    found = _disturbance(watch.first, watch.read())
    block.noise |= found
    block.progress(f"measuring memory and quality ({stop})")
    for name, result in each(lambda _, worker: worker.ask("finish"), list(live)).items():
        block.keep(
            {
                "finished": name,
                "cold": cold[name],
                "wall_s": round(spent[name], 3),
                **result,
            }
        )
    failed = {
        name: (block.failures[name].status, block.failures[name].reason)
        for name in workers
        if name in block.failures
    }
    block.keep(
        {
            "part": part,
            "stopped": stop,
            "members": list(workers),
            "failed": failed,
            "effort": block.effort,
        }
    )


def _disturbance(start: noise.Reading, end: noise.Reading) -> dict[str, Any]:
    """What others did while a part was measured."""
    wall = max(end.wall_s - start.wall_s, 1e-9)
    return {
        "others_cores": round(start.others_s(end) / wall, 4),
        "steal_s": round(end.steal_s - start.steal_s, 3),
        "involuntary_switches": end.involuntary - start.involuntary,
        "measured_s": round(wall, 3),
    }


# --------------------------------------------------------------------------------------- records


def _record(
    block: _Block,
    name: str,
    kind: str,
    digest: str,
    facts: Mapping[str, Any],
    started: str,
) -> dict[str, Any]:
    """The record of one cell."""
    cell, turns = block.cells[name], block.turns
    strategy = strategies.get(cell["measured"])
    options = strategy.options()
    if cell["strategy"] != cell["measured"]:
        options = {**options, "of": cell["measured"]}
    found = block.finished.get(name)
    failed = block.failures.get(name)
    if failed is None and found is None:
        failed = Failure("failed", "the cell's process gave no result")
    record: dict[str, Any] = {
        "schema": records.KV_SCHEMA,
        "cell": {
            "suite": "kv",
            **{key: cell[key] for key in _IDENTITY},
            "scenario": workload(cell["scenario"], turns.batch, turns.lengths),
            "batch": turns.batch,
            "lengths": turns.lengths if turns.batch > 1 else None,
            "threads": block.threads,
            "max_new_tokens": max(request.new_tokens for request in turns.requests),
            "turns": len(turns.requests),
            "kind": turns.kind,
            "block": block.plan["id"],
        },
        "status": failed.status if failed else "ok",
        "reason": failed.reason if failed else None,
        "turns": [],
        "strategy_info": {
            "exact": strategy.exact,
            "compiled": strategy.compiled(cell["device"]),
            "options": options,
            "traffic": strategy.traffic(turns.max_length).as_dict(),
        },
        "model": {},
        "compile": {"seconds": 0.0, "graphs": 0, "recompiles": 0},
        "noise": dict(block.noise),
        "environment": {**_environment_facts(facts), "warning": block.warning},
        "code_digest": digest,
        "started_at": started,
        "wall_s": 0.0,
        "block": _described(block, name, kind),
    }
    if failed or found is None:
        return record
    samples = _samples(block, name)
    record["turns"] = [
        {**turn, "cold": found["cold"][index], "samples": samples[index]}
        for index, turn in enumerate(found["turns"])
    ]
    record["model"] = found["model"]
    seconds = 0.0
    if strategy.compiled(cell["device"]) or strategy.needs():
        seconds = _compile_seconds(found["cold"], samples)
    if engine := found.get("engine"):
        record["engine"] = engine
        seconds += engine.get("compile_s", 0.0)
    record["compile"] = {**found["compile"], "seconds": seconds}
    for part in ("quality", "profile"):
        if part in found:
            record[part] = found[part]
    taken = [sample for turn in samples for sample in turn]
    record["noise"] |= {
        "samples": len(taken),
        "disturbed_samples": sum(sample["disturbed"] for sample in taken),
    }
    record["wall_s"] = round(found["wall_s"] + sum(sample["e2e_s"] for sample in taken), 3)
    return record


#: What of a planned cell says which cell it is.
_IDENTITY = (
    *("model", "scenario", "strategy", "replicate", "device", "dtype", "seed"),
    *("experiment", "warmup", "memory", "slowdown", "arm"),
)


#: What of a slot is kept in a sample; ``injected_s`` is only there where a cell was slowed, ``slices``
#: where the turn rested.
_SAMPLE = ("slot", "slices", "e2e_s", "ttft_s", "itl_s", "injected_s", "disturbed")


def _samples(block: _Block, name: str) -> list[list[dict[str, Any]]]:
    """For each turn the samples of one cell, round by round."""
    found: list[list[dict[str, Any]]] = [[] for _ in block.turns.requests]
    for entry in block.rounds:
        for slot in entry["slots"]:
            if slot["strategy"] == name:
                kept = {key: slot[key] for key in _SAMPLE if key in slot}
                number = entry["round"]
                found[slot["turn"]].append({"iteration": number, "round": number, **kept})
    return found


def _described(block: _Block, name: str, kind: str) -> dict[str, Any]:
    """What a record says of its block."""
    plan = block.plan
    rules = stopping.Rules.of(plan, len(block.turns.requests), len(block.closed) or 1)
    reference, control = plan["reference"], plan["control"]
    # A cell that had no process had no part in how the rounds ended.
    mine = [part for part in block.closed.values() if name in part["members"]]
    rested: dict[str, int] = {}
    for number, part in block.closed.items():
        able = [one for one in part["members"] if one not in block.failures]
        rested |= stopping.rested(rules, block.of(number), able)
    logs = stopping.log_ratios(rules, block.rounds, {reference, name, control} - {None})
    width = paired.half_width(logs.get(name, []))
    of_control = logs.get(control, [])
    return {
        "id": plan["id"],
        "members": list(block.cells),
        "reference": plan["reference"],
        "control": control is not None and control not in block.failures,
        "rounds": len(block.rounds),
        "stopped": mine[0]["stopped"] if mine else None,
        "precision": plan["precision"],
        "budget_s": plan["budget_s"],
        "processes": kind,
        "main_cpu": block.finished.get(name, {}).get("main_cpu"),
        "probe_s": [entry["probe_s"] for entry in block.rounds],
        "order": [entry["order"] for entry in block.rounds],
        "rested": rested,
        "parts": [part["members"] for _, part in sorted(block.closed.items())],
        "resumed": block.resumed,
        "half_width": width if math.isfinite(width) else None,
        "control_ratio": paired.ratio([of_control]).value if of_control else None,
    }


def _compile_seconds(cold: Sequence[Sequence[Mapping]], warm: Sequence[Sequence[Mapping]]) -> float:
    """Seconds that cold conversations took beyond warm ones."""
    seconds = 0.0
    for before, after in zip(cold, warm, strict=True):
        best = min(sample["e2e_s"] for sample in after)
        seconds += sum(max(0.0, sample["e2e_s"] - best) for sample in before)
    return round(seconds, 4)


def _environment_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: facts[key] for key in ("digest", "cpu", "cores", "commit")}
    kept["gpu"] = (facts.get("gpu") or {}).get("name")
    kept["torch"] = facts["packages"].get("torch")
    kept["transformers"] = facts["packages"].get("transformers")
    return kept
