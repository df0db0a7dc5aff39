"""Tables of replayed logs: rows of the records, one CSV a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kvbench.records import gathering
from kvbench.traffic import columns


def frames(records: Sequence[Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """Every table of some replays by name, ``summary`` included, with the same columns always."""
    found: dict[str, pd.DataFrame] = {}
    for name, described in columns.described().items():
        part = name.removeprefix("traffic_")
        rows = []
        for record in records:
            identity = {
                "log": record["log"]["name"],
                "model": record["setting"]["model"],
                "memory_bytes": record["setting"]["memory_bytes"],
            }
            own = [record["summary"]] if part == "summary" else record["tables"][part]
            rows += [{**identity, **row} for row in own]
        found[name] = pd.DataFrame(rows, columns=list(described))
    return found


def write(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write every table of some replays as CSV; returns the paths."""
    written = []
    for name, table in frames(records).items():
        written.append(folder / f"{name}.csv")
        gathering.write_csv(table, written[-1])
    return written
