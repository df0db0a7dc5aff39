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


def now() -> str:
    """Present moment as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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
    match record.get("schema") if isinstance(record, Mapping) else None:
        case "kvbench/kv-cell/1":
            documents.check_record(record, "kv-cell", str(path))
        case "kvbench/app-cell/1":
            documents.check_record(record, "app-cell", str(path))
        case other:
            raise InputError(
                f"{path}: schema is {other!r}; known: {KV_SCHEMA}, {APP_SCHEMA}; "
                "the file is not a record of this version"
            )


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
