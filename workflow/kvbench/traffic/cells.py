"""Cells of the suite ``traffic``: log x model x memory, planned from the configuration and replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.analysis import capacity
from kvbench.errors import InputError

#: Name and version of a replay's record.
SCHEMA = "kvbench/traffic-cell/1"


@dataclass(frozen=True)
class TrafficCell:
    """One replay; its fields are its identity and everything that can change its numbers."""

    log: str
    paths: tuple[str, ...]
    model: str
    memory: str
    memory_bytes: int
    dtype: str
    price: str | None
    ceilings: str | None
    tokenizer: str | None
    marks: str | None
    skip_bad: bool
    keep_text: bool
    semantic: bool
    conversations: int

    @property
    def key(self) -> str:
        """Path below ``cells/traffic`` and ``results/traffic``, without a suffix."""
        return f"{self.log}/{self.model}-{self.memory}"

    @property
    def inputs(self) -> list[str]:
        """Files that the replay reads."""
        return [*self.paths, *(path for path in (self.tokenizer, self.marks) if path)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, so that Snakemake can compare parameters between runs."""
        return asdict(self)


def plan(
    config: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    source: str,
    files: bool = True,
) -> dict[str, TrafficCell]:
    """Cells of the suite by key; ``files`` says whether the logs must be there.

    Raises
    ------
    InputError
        An unknown model or one without an architecture, a size that is none, a file that is not
        there, or two logs of one name.
    """
    section = config["traffic"]
    cells: dict[str, TrafficCell] = {}
    seen: set[str] = set()
    for number, entry in enumerate(section["logs"]):
        where = f"{source}: traffic.logs[{number}]"
        if entry["name"] in seen:
            raise InputError(f"{where}.name: {entry['name']!r} is there twice; rename one")
        seen.add(entry["name"])
        for name in entry["models"]:
            if name not in models:
                raise InputError(
                    f"{where}.models: unknown model {name!r}; known: {', '.join(sorted(models))}; "
                    f"or add config/models/{name}.yaml"
                )
            if "architecture" not in models[name] and models[name].get("source") != "embedded":
                raise InputError(f"{where}.models: {name} has no architecture in its file; add it")
        wanted = [*entry["paths"], *(entry[key] for key in ("tokenizer", "marks") if entry[key])]
        for path in wanted if files else ():
            if not Path(path).is_file():
                raise InputError(
                    f"{where}: {path}: no such file; paths are from the folder of the run"
                )
        for model in entry["models"]:
            for memory in entry["memories"]:
                try:
                    size = capacity.parse_bytes(memory)
                except InputError as error:
                    raise InputError(f"{where}.memories: {error}") from None
                cell = TrafficCell(
                    log=entry["name"],
                    paths=tuple(entry["paths"]),
                    model=model,
                    memory=memory.replace(" ", ""),
                    memory_bytes=size,
                    dtype=entry["dtype"],
                    price=entry["price"],
                    ceilings=entry["ceilings"],
                    tokenizer=entry["tokenizer"],
                    marks=entry["marks"],
                    skip_bad=entry["skip_bad"],
                    keep_text=entry["keep_text"],
                    semantic=entry["semantic"],
                    conversations=section["conversations"],
                )
                cells[cell.key] = cell
    return cells


def run(
    cell: Mapping[str, Any], ceilings: Sequence[Path], code: str, root: Path = Path()
) -> dict[str, Any]:
    """Replay one cell; returns its record, which has no times in it: the same log, the same bytes.

    Parameters
    ----------
    cell:
        The fields of a :class:`TrafficCell`.
    ceilings:
        What this run measured of its machine, used where the cell names no other ceilings.
    code:
        Digest of the code.
    root:
        Folder of ``results/recorded``.
    """
    from kvbench.traffic import log as logs
    from kvbench.traffic import replay, semantic, worth

    given = cell["ceilings"] or next(iter(map(str, ceilings)), None)
    setting = replay.Setting(
        name=cell["log"],
        model=cell["model"],
        architecture=capacity.architecture(cell["model"]),
        memory_bytes=cell["memory_bytes"],
        dtype=cell["dtype"],
        ceilings=None if given is None else worth.ceilings(given, root),
        price=None if cell["price"] is None else worth.price(cell["price"]),
        conversations=cell["conversations"],
        keep_text=cell["keep_text"],
    )
    log = logs.read(
        [Path(path) for path in cell["paths"]],
        skip_bad=cell["skip_bad"],
        tokenizer=Path(cell["tokenizer"]) if cell["tokenizer"] else None,
    )
    encoder = replay.sentence_encoder() if cell["semantic"] and log.questions else None
    judged = semantic.judged(Path(cell["marks"]), cell["log"]) if cell["marks"] else None
    return {
        "schema": SCHEMA,
        "cell": {
            "suite": "traffic",
            **{name: cell[name] for name in ("log", "model", "memory_bytes", "dtype")},
        },
        **replay.run(log, setting, encoder, judged),
        "code_digest": code,
    }


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Check a record against its schema and write it atomically."""
    documents.check(record, "traffic-cell", str(path))
    documents.write_json(path, record)


def read(path: Path) -> dict[str, Any]:
    """Read a record that :func:`write` wrote.

    Raises
    ------
    InputError
        The file is missing, corrupt, or of another schema.
    """
    record = documents.read_json(path)
    documents.check(record, "traffic-cell", str(path))
    return record
