"""Records: one JSON file per cell, checked against its schema on write and on read."""

from __future__ import annotations

import hashlib
from collections import Counter
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
            _check_sense(record, path)
        case "kvbench/app-cell/1":
            documents.check_record(record, "app-cell", str(path))
            _check_status(record, path)
        case other:
            raise InputError(
                f"{path}: schema is {other!r}; known: {KV_SCHEMA}, {APP_SCHEMA}; "
                "the file is not a record of this version"
            )


#: No turn of any model takes less or more than this (s).
_TIMES = (1e-9, 1e7)
_REMEDY = "delete the file and run again to measure it anew"


def _check_status(record: Mapping[str, Any], path: Path) -> None:
    status, reason = record["status"], record["reason"]
    if (status == "ok") != (reason is None):
        told = f"the reason {reason!r}" if reason else "no reason"
        raise InputError(f"{path}: status is {status} with {told}; {_REMEDY}")


def _check_sense(record: Mapping[str, Any], path: Path) -> None:
    """Refuse what a schema lets through and no measurement gives."""
    _check_status(record, path)
    for place, turn in enumerate(record["turns"]):
        iterations = Counter(sample["iteration"] for sample in turn["samples"])
        if twice := [number for number, count in iterations.items() if count > 1]:
            raise InputError(
                f"{path}: turns[{place}].samples: iteration {twice[0]} stands twice; one sample an "
                f"iteration; {_REMEDY}"
            )
        for number, sample in enumerate(turn["samples"]):
            e2e, ttft = sample["e2e_s"], sample["ttft_s"]
            spot = f"{path}: turns[{place}].samples[{number}]"
            # Of a single token the first is the last, but for the clock's rounding.
            if not _TIMES[0] <= ttft <= e2e * (1 + 1e-9) <= _TIMES[1]:
                raise InputError(
                    f"{spot}: e2e_s is {e2e} and ttft_s {ttft}; a time is at least a nanosecond and at "
                    f"most 116 days, and the first token comes before the last; {_REMEDY}"
                )
            if turn["new_tokens"] > 1 and not sample["itl_s"]:
                raise InputError(
                    f"{spot}: itl_s is empty for {turn['new_tokens']} tokens; {_REMEDY}"
                )


def read(path: Path) -> dict[str, Any]:
    """Read one record.

    Raises
    ------
    InputError
        The file is missing, corrupt, or of another schema.
    """
    record = documents.read_json(path)
    try:
        _check(record, path)
    except InputError as error:
        told = str(error)
        raise InputError(told if told.endswith(_REMEDY) else f"{told}; {_REMEDY}") from None
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
