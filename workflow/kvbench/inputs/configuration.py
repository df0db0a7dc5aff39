"""From the configuration to blocks of cells: defaults, checks across files, one block a job."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvbench import documents, physics, strategies, studies
from kvbench.analysis import statistics
from kvbench.errors import InputError, one_of
from kvbench.inputs import scenarios
from kvbench.inputs.scenarios import Scenario
from kvbench.layout import DEFAULT_DTYPE, EQUAL, place, workload

#: Name of the second run of the reference in every block: the instrument against itself.
CONTROL = "control"
#: What may be the name of a file, and is not one with folder or suffix already.
_FILE_NAME = re.compile(r"(?!.*\.yaml$)[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class KvCell:
    """One process of the ``kv`` suite and the record it leaves; its fields are its identity.

    Attributes
    ----------
    strategy:
        What the record is filed under: a strategy, or :data:`CONTROL`.
    measured:
        The strategy that runs.
    batch, lengths:
        Requests that are generated for at once, with prompts of ``equal`` or ``mixed`` lengths.
    slowdown, arm, copy:
        In the test of the instrument: the injected slowdown, ``same`` or ``slowed``, and the number
        of this cell among its equals.
    """

    experiment: str
    model: str
    scenario: str
    strategy: str
    measured: str
    replicate: int
    device: str
    dtype: str
    turns: int | None
    max_new_tokens: int
    max_prompt_tokens: int | None
    warmup: int
    memory: str
    seed: int
    quality: bool = False
    profile: bool = False
    batch: int = 1
    lengths: str = EQUAL
    slowdown: float = 0.0
    arm: str | None = None
    copy: int = 1

    @property
    def place(self) -> str:
        """Folder name of device and dtype: the device alone when the dtype is its usual one."""
        return place(self.device, self.dtype)

    @property
    def workload(self) -> str:
        """Scenario and batch, as paths and tables name them."""
        return workload(self.scenario, self.batch, self.lengths)

    @property
    def key(self) -> str:
        """Path of the record below ``cells/kv`` (in the instrument's test ``cells/aa``), without suffix."""
        if self.arm is not None:
            return f"{self.arm}/b{self.replicate}-{self.copy}"
        return f"{self.place}/{self.model}/{self.workload}/{self.strategy}/r{self.replicate}"

    @property
    def member(self) -> str:
        """Name of this cell in its block."""
        return self.strategy if self.arm is None else f"{self.arm}-{self.copy}"


@dataclass(frozen=True)
class KvBlock:
    """One measuring job of the ``kv`` suite: cells that live side by side and take turns.

    Attributes
    ----------
    cells:
        The cells, the reference's control among them.
    reference, control:
        The cell that all others are compared with, and its second run; None where it is not planned.
    once:
        Cells that take part in the first round only.
    rounds:
        Cells that take part in so many rounds, spread over the block's time.
    precision:
        Half-width of the interval of a ratio, as a share, at which rounds end.
    budget_s:
        Seconds of rounds after which no further one begins.
    min_rounds, max_rounds:
        Fewest rounds, unless the budget ends before, and most.
    quiet_wait_s:
        Longest wait for a quiet machine.
    """

    cells: tuple[KvCell, ...]
    reference: str | None
    control: str | None
    once: tuple[str, ...]
    rounds: Mapping[str, int]
    precision: float
    budget_s: float
    min_rounds: int
    max_rounds: int
    quiet_wait_s: float

    @property
    def first(self) -> KvCell:
        """Any cell of the block, for what all have in common."""
        return self.cells[0]

    @property
    def id(self) -> str:
        """Name of the block in records: experiment, place, model, scenario with batch, and replicate."""
        cell = self.first
        return f"{cell.experiment}/{cell.place}/{cell.model}/{cell.workload}/r{cell.replicate}"

    @property
    def seed(self) -> int:
        """Seed of the orders of its rounds."""
        return self.first.seed

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, so that Snakemake can compare parameters between runs."""
        effort = {
            name: getattr(self, name)
            for name in ("precision", "budget_s", "min_rounds", "max_rounds", "quiet_wait_s")
        }
        return {
            "id": self.id,
            "seed": self.seed,
            "reference": self.reference,
            "control": self.control,
            "once": list(self.once),
            "rounds": dict(self.rounds),
            **effort,
            "cells": {cell.member: asdict(cell) for cell in self.cells},
        }


def cells_of(blocks: Iterable[KvBlock]) -> dict[str, KvCell]:
    """The cells of some blocks by key."""
    return {cell.key: cell for block in blocks for cell in block.cells}


def read_models(folder: Path) -> dict[str, dict[str, Any]]:
    """Read and check every model file of a folder; name to document.

    Raises
    ------
    InputError
        A file is malformed, against the schema, or named unlike its ``name``.
    """
    found = {}
    for path in documents.yaml_files(folder):
        document = documents.read_yaml(path)
        documents.check(document, "model", str(path))
        if document["name"] != path.stem:
            raise InputError(
                f"{path}: name is {document['name']!r} but the file is called {path.name}; "
                "make them equal"
            )
        if "architecture" in document:
            # Of a family that nothing is known of, the library knows the sizes.
            with suppress(physics.UnknownFamily):
                physics.Architecture.from_config(document["architecture"], f"{path}: architecture")
        found[document["name"]] = document
    return found


def fill(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check a configuration and fill in the defaults of its schema.

    Parameters
    ----------
    config:
        What the YAML files and the command line gave.
    source:
        File name for error messages.

    Raises
    ------
    InputError
        An unknown key, a wrong type, a count below its minimum: one line naming it.
    """
    rules = documents.schema("config")
    documents.check_finite(config, source)
    documents.check(config, rules, source)
    filled = documents.fill_defaults(dict(config), rules)
    if "kv" in filled["suites"] and config.get("kv", {}).get("experiments") == []:
        raise InputError(
            f"{source}: kv.experiments is empty; name an experiment, or take kv out of suites"
        )
    for number, experiment in enumerate([filled["kv"], *filled["kv"]["experiments"]]):
        given = config.get("kv", {}) if number == 0 else experiment
        fewest, most = given.get("min_rounds"), given.get("max_rounds")
        if fewest is not None and most is not None and fewest > most:
            where = f"kv.experiments[{number - 1}]" if number else "kv"
            raise InputError(
                f"{source}: {where}.min_rounds is {fewest} but {where}.max_rounds is {most}; "
                "make it at most that many"
            )
    for number, experiment in enumerate(filled["kv"]["experiments"]):
        _expand_strategies(experiment, f"{source}: kv.experiments[{number}]")
        _expand_batches(experiment, f"{source}: kv.experiments[{number}]")
    # The command line gives words: --config claims_must_hold=true.
    filled["claims_must_hold"] = str(filled["claims_must_hold"]).lower() == "true"
    return filled


def _expand_strategies(experiment: dict[str, Any], where: str) -> None:
    """Put the ids of strategies where the configuration has names, options, sweeps or ``all``."""
    given = experiment["strategies"]
    if given == "all":
        engines = {"transformers", experiment["engine"]}
        experiment["strategies"] = [
            name for name in strategies.names() if strategies.get(name).engine in engines
        ]
    else:
        found: dict[str, str] = {}
        for position, entry in enumerate(given):
            spot = f"{where}.strategies[{position}]"
            for strategy in strategies.variants(entry, spot):
                if strategy.id in found:
                    raise InputError(
                        f"{spot} names {strategy.id}, as does {found[strategy.id]}; keep one of them"
                    )
                found[strategy.id] = f"strategies[{position}]"
        experiment["strategies"] = list(found)
    experiment["once"] = [
        strategy.id
        for position, name in enumerate(experiment["once"])
        for strategy in strategies.variants(name, f"{where}.once[{position}]")
    ]
    experiment["rounds"] = {
        strategy.id: count
        for name, count in experiment["rounds"].items()
        for strategy in strategies.variants(name, f"{where}.rounds")
    }


def _expand_batches(experiment: dict[str, Any], where: str) -> None:
    """Make a list of what is a batch or a list of them, and hold it against the lengths."""
    given = experiment["batch"]
    batches = experiment["batch"] = given if isinstance(given, list) else [given]
    if 1 in batches and experiment["lengths"] != EQUAL:
        raise InputError(
            f"{where}.lengths is {experiment['lengths']} but batch has a 1, and one request has one "
            "length; take the 1 out of batch, or leave lengths out"
        )


def resolve_device(device: str) -> str:
    """Turn ``auto`` into ``cuda`` when an NVIDIA driver is loaded, else ``cpu``; no torch needed."""
    if device != "auto":
        return device
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def _known(kind: str, name: str, known: Any, where: str, source: str, folder: str = "") -> None:
    remedy = f"or add {folder}/{name}.yaml" if folder and _FILE_NAME.fullmatch(name) else ""
    one_of(kind, name, sorted(known), f"{source}: {where}", remedy)


def _longest_context(scenario: Scenario, experiment: Mapping[str, Any]) -> int:
    """Tokens that a fixed scenario needs at most; of a conversation, what is generated alone.

    A conversation's prompts are known after tokenising only.
    """
    if scenario.kind == "conversation":
        return (experiment["turns"] or scenario.length) * experiment["max_new_tokens"]
    limit = experiment["max_prompt_tokens"]
    lengths = [
        step.prompt_tokens + step.new_tokens
        for step in scenario.steps
        if limit is None or step.prompt_tokens <= limit
    ]
    return max(lengths, default=0)


def plan_kv(
    config: Mapping[str, Any],
    all_scenarios: Mapping[str, Scenario],
    models: Mapping[str, Mapping[str, Any]],
    source: str,
) -> dict[str, KvBlock]:
    """Blocks of the ``kv`` suite by id, checked against scenarios, models and strategies.

    Raises
    ------
    InputError
        An unknown name, a context longer than the model allows, or two experiments that would
        write the same record.
    """
    section = config["kv"]
    blocks: dict[str, KvBlock] = {}
    owners: dict[str, str] = {}
    for number, experiment in enumerate(section["experiments"]):
        where = f"kv.experiments[{number}]"
        _check_experiment(experiment, all_scenarios, models, where, source)
        if _rule(experiment["name"]) in {_rule(name) for name in owners.values()}:
            raise InputError(
                f"{source}: {where}.name is {experiment['name']!r}, as is that of an earlier "
                "experiment; give it a name of its own"
            )
        for block in _blocks(experiment, section, all_scenarios, models, where, source):
            for cell in block.cells:
                other = owners.setdefault(cell.key, experiment["name"])
                if other != experiment["name"]:
                    raise InputError(
                        f"{source}: {where} ({experiment['name']}) and experiment {other} both "
                        f"measure {cell.key}; keep one of them, or put the strategies of both into "
                        "one experiment: only cells of one block are compared"
                    )
            blocks[block.id] = block
    return blocks


def _rule(experiment: str) -> str:
    """An experiment's name as far as its rule shows it."""
    return experiment.replace("-", "_")


def _check_experiment(
    experiment: Mapping[str, Any],
    all_scenarios: Mapping[str, Scenario],
    models: Mapping[str, Mapping[str, Any]],
    where: str,
    source: str,
) -> None:
    for position, name in enumerate(experiment["models"]):
        _known("model", name, models, f"{where}.models[{position}]", source, "config/models")
    for position, name in enumerate(experiment["scenarios"]):
        spot = f"{where}.scenarios[{position}]"
        _known("scenario", name, all_scenarios, spot, source, "config/scenarios")
    for position, name in enumerate(experiment["strategies"]):
        spot = f"{where}.strategies[{position}]"
        engine = strategies.get(name).engine
        if engine not in (experiment["engine"], "transformers"):
            raise InputError(
                f"{source}: {spot} is {name}, which runs in {engine}; set {where}.engine to {engine}"
            )
    spots = {f"once[{position}]": name for position, name in enumerate(experiment["once"])}
    spots |= {f"rounds.{name}": name for name in experiment["rounds"]}
    for key, name in spots.items():
        spot = f"{where}.{key}"
        _known("strategy of this experiment", name, experiment["strategies"], spot, source)
        if name == strategies.REFERENCE:
            raise InputError(
                f"{source}: {spot} is {name}, which every other strategy is compared with round by "
                f"round; leave it out of {key.partition('[')[0].partition('.')[0]}"
            )
    for name in set(experiment["once"]) & set(experiment["rounds"]):
        raise InputError(
            f"{source}: {where}.rounds.{name}: {name} stands in once too; keep one of them"
        )


def _blocks(
    experiment: Mapping[str, Any],
    section: Mapping[str, Any],
    all_scenarios: Mapping[str, Scenario],
    models: Mapping[str, Mapping[str, Any]],
    where: str,
    source: str,
) -> Iterator[KvBlock]:
    """The blocks of one experiment: one per scenario, model, batch and replicate."""

    def setting(key: str) -> Any:
        return experiment.get(key, section[key])

    device = resolve_device(setting("device"))
    dtype = DEFAULT_DTYPE[device] if setting("dtype") == "auto" else setting("dtype")
    names = experiment["strategies"]
    compared = strategies.REFERENCE in names
    lossy = any(not strategies.get(name).exact for name in names)
    for scenario in (all_scenarios[name] for name in experiment["scenarios"]):
        turns = _turns(experiment, scenario, where, source)
        for model, batch in itertools.product(experiment["models"], experiment["batch"]):
            _check_context(experiment, scenario, model, models[model], where, source)
            for replicate in range(1, setting("replicates") + 1):
                runs = [(name, name) for name in names]
                if compared:
                    runs.append((CONTROL, strategies.REFERENCE))
                cells = tuple(
                    KvCell(
                        experiment=experiment["name"],
                        model=model,
                        scenario=scenario.id,
                        strategy=strategy,
                        measured=measured,
                        replicate=replicate,
                        device=device,
                        dtype=dtype,
                        turns=turns,
                        max_new_tokens=experiment["max_new_tokens"],
                        max_prompt_tokens=experiment["max_prompt_tokens"],
                        warmup=setting("warmup"),
                        memory=experiment["memory"],
                        seed=section["seed"],
                        batch=batch,
                        lengths=experiment["lengths"],
                        # The reference beside a lossy cache shows what nothing costs. What one request
                        # loses, each of a batch does.
                        quality=replicate == 1
                        and batch == 1
                        and (
                            not strategies.get(measured).exact
                            or (lossy and strategy == strategies.REFERENCE)
                        ),
                        profile=experiment["profile"]
                        and replicate == 1
                        and batch == 1
                        and strategy != CONTROL,
                    )
                    for strategy, measured in runs
                )
                yield KvBlock(
                    cells=cells,
                    reference=strategies.REFERENCE if compared else None,
                    control=CONTROL if compared else None,
                    once=tuple(experiment["once"]),
                    rounds=dict(experiment["rounds"]),
                    precision=setting("precision"),
                    budget_s=setting("budget_s"),
                    min_rounds=setting("min_rounds"),
                    max_rounds=setting("max_rounds"),
                    quiet_wait_s=section["quiet_wait_s"],
                )


def _turns(
    experiment: Mapping[str, Any], scenario: Scenario, where: str, source: str
) -> int | None:
    """Turns of a conversation; None for fixed lengths."""
    if scenario.kind != "conversation":
        return None
    turns = experiment["turns"] or scenario.length
    if turns > scenario.length:
        raise InputError(
            f"{source}: {where}.turns is {turns} but scenario {scenario.id} has "
            f"{scenario.length}; ask for at most that many"
        )
    return turns


def _check_context(
    experiment: Mapping[str, Any],
    scenario: Scenario,
    model: str,
    document: Mapping[str, Any],
    where: str,
    source: str,
) -> None:
    """Refuse fixed lengths that the model does not reach, or of which nothing is left."""
    needed = _longest_context(scenario, experiment)
    if scenario.kind == "fixed" and needed == 0:
        raise InputError(
            f"{source}: {where}.max_prompt_tokens is {experiment['max_prompt_tokens']} but every "
            f"step of scenario {scenario.id} is longer; raise it"
        )
    allowed = document.get("architecture", {}).get("max_position_embeddings")
    if allowed and needed > allowed:
        fixed = scenario.kind == "fixed"
        what = f"needs {needed} tokens" if fixed else f"needs more than {needed} tokens"
        remedy = "set max_prompt_tokens" if fixed else "lower turns or max_new_tokens"
        raise InputError(
            f"{source}: {where}: scenario {scenario.id} {what} of context "
            f"but model {model} allows {allowed}; {remedy} or take another model"
        )


def plan_aa(
    config: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], source: str
) -> dict[str, KvBlock]:
    """Blocks of the instrument's test by id: one strategy many times over, some copies slowed.

    Precision, budget and rounds are those of the ``kv`` section unless the test has its own, so that
    it is one of the settings that the comparisons were made with.

    Raises
    ------
    InputError
        An unknown model or strategy.
    """
    section, kv = config["aa_test"], config["kv"]
    _known("model", section["model"], models, "aa_test.model", source, "config/models")
    (strategy,) = strategies.variants(section["strategy"], f"{source}: aa_test.strategy")
    device = resolve_device(kv["device"])
    copies = [("same", 0.0, number + 1) for number in range(section["same"])]
    copies += [("slowed", section["slowdown"], number + 1) for number in range(section["slowed"])]
    blocks = {}
    for replicate in range(1, section["blocks"] + 1):
        cells = tuple(
            KvCell(
                experiment="aa_test",
                model=section["model"],
                scenario="insurance_claim_auto",
                strategy=strategy.id,
                measured=strategy.id,
                replicate=replicate,
                device=device,
                dtype=DEFAULT_DTYPE[device] if kv["dtype"] == "auto" else kv["dtype"],
                turns=1,
                max_new_tokens=section["max_new_tokens"],
                max_prompt_tokens=None,
                warmup=kv["warmup"],
                memory="separate",
                seed=kv["seed"],
                slowdown=slowdown,
                arm=arm,
                copy=number,
            )
            for arm, slowdown, number in copies
        )
        block = KvBlock(
            cells=cells,
            reference=cells[0].member,
            control=cells[1].member,
            once=(),
            rounds={},
            precision=section["precision"] or kv["precision"],
            budget_s=section["budget_s"] or kv["budget_s"],
            min_rounds=kv["min_rounds"],
            max_rounds=kv["max_rounds"],
            quiet_wait_s=kv["quiet_wait_s"],
        )
        blocks[block.id] = block
    return blocks


def measuring_order(blocks: Mapping[str, KvBlock], seed: int) -> dict[str, int]:
    """Rank of every block in a seeded random order, replicate by replicate; rank 0 runs first."""
    ordered = statistics.interleave(
        sorted(blocks), seed, replicate=lambda name: blocks[name].first.replicate
    )
    return {name: rank for rank, name in enumerate(ordered)}


def plan_app(
    config: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], source: str
) -> dict[str, dict[str, studies.Cell]]:
    """Cells of the ``app`` suite by study and cell id, with the options of each study checked.

    Raises
    ------
    InputError
        An unknown study or model, or options that the study's schema refuses.
    """
    section = config["app"]
    _known("model", section["model"], models, "app.model", source, "config/models")
    for key in ("studies", "exclude", "only"):
        for name in section[key]:
            _known("study", name, studies.names(), f"app.{key}", source)
    left_out = set(section["exclude"])
    if section["only"]:
        left_out = set(studies.names()) - set(section["only"])
    planned = {}
    for name in studies.names():
        study = studies.get(name)
        options = section["studies"].get(name) or {}
        # Also of a study that is left out: who wrote its options may not know that it is.
        documents.check(options, study.options, source, ("app", "studies", name))
        if name not in left_out:
            planned[name] = study.plan(documents.fill_defaults(options, study.options))
    return planned


def load_scenarios_and_models(
    folder: Path,
) -> tuple[dict[str, Scenario], dict[str, dict[str, Any]]]:
    """Read ``scenarios/`` and ``models/`` below the configuration folder."""
    return scenarios.load_all(folder / "scenarios"), read_models(folder / "models")
