"""Bringing together what the later stages read: this run's records and those of recorded machines."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import documents, records
from kvbench.errors import InputError, one_of
from kvbench.layout import HERE
from kvbench.physics import Ceilings

if TYPE_CHECKING:
    import pandas as pd


def list_machines(folder: Path, names: Sequence[str], source: str = "") -> list[Path]:
    """Folders of the recorded machines that the configuration asks for; only names are looked at.

    Parameters
    ----------
    source:
        The configuration's file, for messages.

    Raises
    ------
    InputError
        A machine that is not there, or two whose names differ in case only.
    """
    # A name with a dot in front is a copy that was cut short.
    found = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    by_name: dict[str, Path] = {}
    for path in found:
        other = by_name.setdefault(path.name.lower(), path)
        if other is not path:
            raise InputError(f"{path}: the same name as {other}; rename one of the two folders")
    if "all" in names:
        return found
    for name in names:
        where = f"{source}: recorded" if source else "recorded"
        one_of("machine", name, sorted(by_name), where, f"or put its records into {folder}/{name}")
    return [by_name[name] for name in names]


def files_of(machine: Path) -> list[Path]:
    """Every file of a recorded machine."""
    return sorted(path for path in machine.rglob("*") if path.is_file())


def studies_of(machines: Iterable[Path]) -> list[str]:
    """Studies that any of the machines has records of."""
    return sorted({path.name for machine in machines for path in machine.glob("cells/app/*")})


def machines(folders: Iterable[str]) -> dict[str, Path]:
    """Machine to folder; that its files are as they were recorded is checked by a rule of its own."""
    return {folder.name: folder for folder in map(Path, folders)}


def kv_records(
    here: Iterable[str], recorded: Mapping[str, Path]
) -> dict[str, list[dict[str, Any]]]:
    """Machine to its kv records; this run is ``here`` and left out when it measured nothing."""
    found = {}
    for machine, paths in {
        HERE: [Path(path) for path in here],
        **{name: sorted(folder.glob("cells/kv/**/*.json")) for name, folder in recorded.items()},
    }.items():
        if paths:
            found[machine] = records.read_kv(paths)
    return found


def app_records(
    study: str, here: Iterable[str], recorded: Mapping[str, Path]
) -> dict[str, list[dict[str, Any]]]:
    """Machine to its records of one study: this run first, then by date, what was measured last first.

    The first is shown where one stands for all (:func:`kvbench.analysis.selection.one_machine`); a
    machine that could run nothing of the study comes last.
    """
    found = _read_each(here, recorded, f"cells/app/{study}/*.json")

    def standing(machine: str) -> tuple[bool, bool, datetime]:
        begun = [datetime.fromisoformat(record["started_at"]) for record in found[machine]]
        able = any(record["status"] == "ok" for record in found[machine])
        return machine == HERE, able, max(begun)

    return {machine: found[machine] for machine in sorted(found, key=standing, reverse=True)}


def aa_records(
    here: Iterable[str], recorded: Mapping[str, Path]
) -> dict[str, list[dict[str, Any]]]:
    """Machine to the records of the instrument's own test."""
    return _read_each(here, recorded, "cells/aa/**/*.json")


def _read_each(
    here: Iterable[str], recorded: Mapping[str, Path], pattern: str
) -> dict[str, list[dict[str, Any]]]:
    found = {
        HERE: [records.read(Path(path)) for path in sorted(here)],
        **{
            name: [records.read(path) for path in sorted(folder.glob(pattern))]
            for name, folder in recorded.items()
        },
    }
    return {machine: read for machine, read in found.items() if read}


def ceilings(
    here: Iterable[str], recorded: Mapping[str, Path]
) -> dict[tuple[str, str, str], Ceilings]:
    """(machine, device, dtype) to what that machine can do at best."""
    found = {}
    for machine, paths in _files(here, recorded, "ceilings").items():
        for path in paths:
            document = documents.read_json(path, "ceilings")
            key = (machine, document["device"], document["dtype"])
            found[key] = Ceilings.from_record(document)
    return found


def environments(here: Iterable[str], recorded: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Machine to its facts; where it was measured on CPU and GPU, the GPU's file tells more."""
    # Sorted by name, cpu comes before cuda, so a GPU's facts stay.
    return {
        machine: documents.read_json(sorted(paths)[-1], "environment")
        for machine, paths in _files(here, recorded, "environment").items()
    }


def _files(here: Iterable[str], recorded: Mapping[str, Path], folder: str) -> dict[str, list[Path]]:
    found = {HERE: sorted(map(Path, here))}
    found |= {name: sorted(path.glob(f"{folder}/*.json")) for name, path in recorded.items()}
    return {machine: paths for machine, paths in found.items() if paths}


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table atomically; the same table gives the same bytes."""
    text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    documents.write_text_atomic(path, text)


def rows_of(path: str | Path) -> list[dict[str, str]]:
    """Rows of a table as words, without pandas: what a closing line needs; empty if there is none."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))
    except OSError:
        return []


def read_csv(path: Path) -> pd.DataFrame:
    """Read a table; only empty cells are missing values, so that the strategy ``none`` is kept."""
    import pandas as pd

    # A digest of digits alone is still a name.
    texts = {"code_digest": str, "token_digest": str}
    return pd.read_csv(
        path,
        keep_default_na=False,
        na_values=[""],
        dtype=texts,
        # The default reads faster, and many numbers wrong in their last digit.
        float_precision="round_trip",
    )
