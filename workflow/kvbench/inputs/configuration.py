"""From the configuration to the list of cells: defaults, checks across files, one cell a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvbench import documents, strategies, studies
from kvbench.analysis import statistics
from kvbench.errors import InputError, one_of
from kvbench.inputs import scenarios
from kvbench.inputs.scenarios import Scenario

#: Number format used where the configuration says ``auto``.
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


@dataclass(frozen=True)
class KvCell:
    """One measuring job of the ``kv`` suite; its fields are its identity and its effort."""

    experiment: str
    model: str
    scenario: str
    strategy: str
    replicate: int
    device: str
    dtype: str
    turns: int | None
    max_new_tokens: int
    max_prompt_tokens: int | None
    warmup: int
    iterations: int
    budget_s: float
    quiet_wait_s: float
    memory: str
    seed: int
    slowdown: float = 0.0
    quality: bool = False

    @property
    def place(self) -> str:
        """Folder name of device and dtype: the device alone when the dtype is its usual one."""
        return place(self.device, self.dtype)

    @property
    def key(self) -> str:
        """Path of the record below ``cells/kv``, without the suffix."""
        return f"{self.place}/{self.model}/{self.scenario}/{self.strategy}/r{self.replicate}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, so that Snakemake can compare parameters between runs."""
        return asdict(self)


def place(device: str, dtype: str) -> str:
    """Name of a device and dtype in paths: ``cpu``, ``cuda``, ``cuda-float32``."""
    return device if dtype == DEFAULT_DTYPE[device] else f"{device}-{dtype}"


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
    documents.check(dict(config), rules, source)
    filled = documents.fill_defaults(dict(config), rules)
    if "kv" in filled["suites"] and config.get("kv", {}).get("experiments") == []:
        raise InputError(
            f"{source}: kv.experiments is empty; name an experiment, or take kv out of suites"
        )
    # The command line gives words: --config claims_must_hold=true.
    filled["claims_must_hold"] = str(filled["claims_must_hold"]).lower() == "true"
    return filled


def resolve_device(device: str) -> str:
    """Turn ``auto`` into ``cuda`` when an NVIDIA driver is loaded, else ``cpu``; no torch needed."""
    if device != "auto":
        return device
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def _known(kind: str, name: str, known: Any, where: str, source: str, folder: str = "") -> None:
    remedy = f"or add {folder}/{name}.yaml" if folder else ""
    one_of(kind, name, sorted(known), f"{source}: {where}", remedy)


def _longest_context(scenario: Scenario, block: Mapping[str, Any]) -> int:
    """Tokens that a fixed scenario needs at most; a conversation's are known after tokenising."""
    limit = block["max_prompt_tokens"]
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
) -> dict[str, KvCell]:
    """Cells of the ``kv`` suite by key, checked against scenarios, models and strategies.

    Raises
    ------
    InputError
        An unknown name, a context longer than the model allows, or two experiments that would
        write the same record with different settings.
    """
    section = config["kv"]
    cells: dict[str, KvCell] = {}
    for number, block in enumerate(section["experiments"]):
        where = f"kv.experiments[{number}]"
        for position, name in enumerate(block["models"]):
            _known("model", name, models, f"{where}.models[{position}]", source, "config/models")
        for position, name in enumerate(block["scenarios"]):
            spot = f"{where}.scenarios[{position}]"
            _known("scenario", name, all_scenarios, spot, source, "config/scenarios")
        for position, name in enumerate(block["strategies"]):
            spot = f"{where}.strategies[{position}]"
            _known("strategy", name, strategies.names(), spot, source)
        device = resolve_device(block.get("device", section["device"]))
        dtype = block.get("dtype", section["dtype"])
        dtype = DEFAULT_DTYPE[device] if dtype == "auto" else dtype
        for scenario_id in block["scenarios"]:
            scenario = all_scenarios[scenario_id]
            turns = None
            if scenario.kind == "conversation":
                turns = block["turns"] or scenario.length
                if turns > scenario.length:
                    raise InputError(
                        f"{source}: {where}.turns is {turns} but scenario {scenario_id} has "
                        f"{scenario.length}; ask for at most that many"
                    )
            needed = _longest_context(scenario, block)
            if scenario.kind == "fixed" and needed == 0:
                raise InputError(
                    f"{source}: {where}.max_prompt_tokens is {block['max_prompt_tokens']} but every "
                    f"step of scenario {scenario_id} is longer; raise it"
                )
            for model in block["models"]:
                allowed = models[model].get("architecture", {}).get("max_position_embeddings")
                if allowed and needed > allowed:
                    raise InputError(
                        f"{source}: {where}: scenario {scenario_id} needs {needed} tokens of context "
                        f"but model {model} allows {allowed}; set max_prompt_tokens or take another model"
                    )
                for strategy in block["strategies"]:
                    for replicate in range(1, block.get("replicates", section["replicates"]) + 1):
                        cell = KvCell(
                            experiment=block["name"],
                            model=model,
                            scenario=scenario_id,
                            strategy=strategy,
                            replicate=replicate,
                            device=device,
                            dtype=dtype,
                            turns=turns,
                            max_new_tokens=block["max_new_tokens"],
                            max_prompt_tokens=block["max_prompt_tokens"],
                            warmup=block.get("warmup", section["warmup"]),
                            iterations=block.get("iterations", section["iterations"]),
                            budget_s=block.get("budget_s", section["budget_s"]),
                            quiet_wait_s=section["quiet_wait_s"],
                            memory=block["memory"],
                            seed=section["seed"],
                        )
                        other = cells.setdefault(cell.key, cell)
                        if replace(other, experiment=cell.experiment) != cell:
                            raise InputError(
                                f"{source}: {where} ({block['name']}) and experiment "
                                f"{other.experiment} both measure {cell.key} with different settings; "
                                "keep one of them"
                            )
    return _with_quality(cells)


def _with_quality(cells: Mapping[str, KvCell]) -> dict[str, KvCell]:
    """Have the quality of lossy caches scored, in their first process, and the reference's beside it.

    The reference shows what nothing costs; where no lossy cache is measured, it is not asked.
    """

    def group(cell: KvCell) -> tuple[str, str, str]:
        return cell.place, cell.model, cell.scenario

    lossy = {key for key, cell in cells.items() if not strategies.get(cell.strategy).exact}
    compared = {group(cells[key]) for key in lossy}
    return {
        key: replace(
            cell,
            quality=cell.replicate == 1
            and (
                key in lossy or (cell.strategy == strategies.REFERENCE and group(cell) in compared)
            ),
        )
        for key, cell in cells.items()
    }


def plan_aa(
    config: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], source: str
) -> dict[str, KvCell]:
    """Cells of the instrument's test by ``<arm>/p<n>``: one strategy, half of them slowed.

    Raises
    ------
    InputError
        An unknown model or strategy.
    """
    section, kv = config["aa_test"], config["kv"]
    _known("model", section["model"], models, "aa_test.model", source, "config/models")
    _known("strategy", section["strategy"], strategies.names(), "aa_test.strategy", source)
    device = resolve_device(kv["device"])
    return {
        f"{arm}/p{number}": KvCell(
            experiment="aa_test",
            model=section["model"],
            scenario="insurance_claim_auto",
            strategy=section["strategy"],
            replicate=number,
            device=device,
            dtype=DEFAULT_DTYPE[device] if kv["dtype"] == "auto" else kv["dtype"],
            turns=1,
            max_new_tokens=32,
            max_prompt_tokens=None,
            warmup=1,
            iterations=section["iterations"],
            budget_s=60,
            quiet_wait_s=kv["quiet_wait_s"],
            memory="timed",
            seed=kv["seed"],
            slowdown=slowdown,
        )
        for arm, slowdown in (("same", 0.0), ("slowed", section["slowdown"]))
        for number in range(1, section["processes"] + 1)
    }


def measuring_order(cells: Mapping[str, KvCell], seed: int) -> dict[str, int]:
    """Rank of every cell in a seeded random order, replicate by replicate; rank 0 runs first."""
    ordered = statistics.interleave(sorted(cells), seed, replicate=lambda key: cells[key].replicate)
    return {key: rank for rank, key in enumerate(ordered)}


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
    for key in ("studies", "exclude"):
        for name in section[key]:
            _known("study", name, studies.names(), f"app.{key}", source)
    planned = {}
    for name in studies.names():
        if name in section["exclude"]:
            continue
        study = studies.get(name)
        options = section["studies"].get(name) or {}
        documents.check(options, study.options, f"{source}: app.studies.{name}")
        planned[name] = study.plan(documents.fill_defaults(options, study.options))
    return planned


def load_scenarios_and_models(
    folder: Path,
) -> tuple[dict[str, Scenario], dict[str, dict[str, Any]]]:
    """Read ``scenarios/`` and ``models/`` below the configuration folder."""
    return scenarios.load_all(folder / "scenarios"), read_models(folder / "models")
