"""Records: one JSON file per cell, checked against its schema on write and on read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.errors import InputError

KV_SCHEMA = "kvbench/kv-cell/1"
APP_SCHEMA = "kvbench/app-cell/1"
_FILES = {KV_SCHEMA: "kv-cell", APP_SCHEMA: "app-cell"}

#: Parts of the library behind each kind of job; a digest of them is a parameter of its rule. Those
#: of ``kv`` and ``app`` can change a measurement, and their digest is part of every record.
SOURCES = {
    "kv": ("strategies", "measurement", "inputs/models.py", "inputs/scenarios.py"),
    "app": ("caching", "studies/__init__.py", "measurement/startup.py"),
    "models": ("inputs/models.py",),
    "tables": ("analysis", "physics", "records"),
    "figures": ("figures", "analysis", "physics"),
    "paper": ("paper", "analysis", "studies"),
}


def now() -> str:
    """Present moment as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def code_digest(kind: str, *more: str) -> str:
    """Digest of the library's files that can change what a kind of job gives.

    Snakemake sees edits to a rule's script but not to the modules it imports; as a parameter of
    the rules this digest makes it work again then, and only then: editing a figure never measures
    anything again.

    Parameters
    ----------
    kind:
        A key of :data:`SOURCES`.
    more:
        Further files below the library that this job depends on, such as a study's module.
    """
    root = Path(__file__).resolve().parents[1]
    files: list[Path] = []
    for name in (*SOURCES[kind], *more):
        path = root / name
        files += path.rglob("*.py") if path.is_dir() else [path]
    state = hashlib.sha256()
    for path in sorted(files):
        state.update(path.relative_to(root).as_posix().encode())
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def token_digest(tokens: Iterable[int]) -> str:
    """SHA-256 of a token sequence; equal digests mean equal tokens."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Check a record against its schema and write it atomically.

    Raises
    ------
    InputError
        The record breaks its contract (a defect of the caller).
    """
    _check(record, path)
    documents.write_json(path, record)


def _check(record: Any, path: Path) -> None:
    name = record.get("schema") if isinstance(record, Mapping) else None
    if name not in _FILES:
        raise InputError(
            f"{path}: schema is {name!r}; known: {', '.join(_FILES)}; "
            "the file is not a record of this version"
        )
    documents.check(record, _FILES[name], str(path))


def read(path: Path) -> dict[str, Any]:
    """Read one record.

    Raises
    ------
    InputError
        The file is missing, corrupt, or of another schema.
    """
    record = documents.read_json(path)
    _check(record, path)
    return record


def read_kv(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the kv records of one machine and refuse to mix numbers of CPU threads.

    Raises
    ------
    InputError
        A record is wrong, or CPU records of one model were measured with different thread counts:
        their times cannot be compared.
    """
    found = []
    threads: dict[tuple[str, str], tuple[int, Path]] = {}
    for path in paths:
        record = read(path)
        if record["schema"] != KV_SCHEMA:
            raise InputError(f"{path}: schema is {record['schema']!r}; expected {KV_SCHEMA}")
        cell = record["cell"]
        if record["status"] == "ok":
            identity = (cell["device"], cell["model"])
            seen, first = threads.setdefault(identity, (cell["threads"], path))
            if seen != cell["threads"] and cell["device"] == "cpu":
                raise InputError(
                    f"{path}: cell.threads is {cell['threads']} but {first} has {seen}; "
                    "times of different thread counts cannot be compared: delete one set and "
                    "measure again with the same --cores"
                )
        found.append(record)
    return found
