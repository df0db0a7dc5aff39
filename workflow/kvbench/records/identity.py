"""What a row of a table is of: the columns that name a cell, and the records that lie behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvbench import layout
from kvbench.layout import HERE as HERE

if TYPE_CHECKING:
    import pandas as pd


#: Columns that name a cell of the ``kv`` suite, replicates aside.
IDENTITY = ("machine", "model", "device", "dtype", "scenario", "strategy")

#: The reference strategy measured a second time in every block: an always-on A/A test, no strategy.
CONTROL = "control"


def replicates_of(samples: pd.DataFrame) -> dict[tuple[str, ...], list[int]]:
    """Replicate numbers by cell identity, from ``kv_samples``."""
    known = samples[[*IDENTITY, "replicate"]].dropna().drop_duplicates()
    found: dict[tuple[str, ...], list[int]] = {}
    for *key, replicate in known.itertuples(index=False):
        found.setdefault(tuple(map(str, key)), []).append(int(replicate))
    return {key: sorted(numbers) for key, numbers in found.items()}


def record_paths(
    replicates: Mapping[tuple[str, ...], Sequence[int]], row: Mapping[str, Any]
) -> tuple[str, ...]:
    """Records behind one summary row, from the repository's root, by the layout of the cells folder.

    ``replicates`` is the answer of :func:`replicates_of`; a cell without samples is taken to have
    the replicates its row counts, one at least.
    """
    place = layout.place(str(row["device"]), str(row["dtype"]))
    numbers: Iterable[int] | None = replicates.get(tuple(str(row[name]) for name in IDENTITY))
    if not numbers:
        counted = row.get("replicates")
        numbers = range(1, 1 + max(1, int(counted) if counted and counted == counted else 1))
    cell = f"{place}/{row['model']}/{row['scenario']}/{row['strategy']}"
    machine = str(row["machine"])
    return tuple(layout.kv_record(f"{cell}/r{number}", machine) for number in numbers)


def study_paths(machine: str, study: str, cells: Iterable[str]) -> tuple[str, ...]:
    """Records of some cells of a study on one machine, from the repository's root."""
    return tuple(layout.app_record(study, cell, machine) for cell in cells)
