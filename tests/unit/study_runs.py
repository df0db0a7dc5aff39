"""Studies as the workflow runs them, in one process: options, cells, records, table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
from kvbench import studies


def options(name: str, **changed: Any) -> dict[str, Any]:
    """The defaults of a study with some of them changed, checked against its schema."""
    schema = studies.get(name).options
    filled = {key: rules["default"] for key, rules in schema["properties"].items()} | changed
    jsonschema.validate(filled, schema)
    return filled


def records(
    name: str,
    folder: Path,
    *,
    seed: int = 3,
    only: Callable[[str, studies.Cell], bool] = lambda cell_id, cell: True,
    model_dir: Path | None = None,
    **changed: Any,
) -> dict[str, dict[str, Any]]:
    """What the cells of a study found, as the part of a record that tables are made of."""
    study = studies.get(name)
    found = {}
    for cell_id, cell in study.plan(options(name, **changed)).items():
        if only(cell_id, cell):
            scratch = folder / cell_id
            scratch.mkdir()
            context = studies.Context(scratch, seed, model_dir=model_dir)
            found[cell_id] = record(study.measure(cell.factors, context), cell_id, cell.factors)
    return found


def record(outcome: studies.Outcome, cell_id: str = "cell", factors: Mapping = {}) -> dict:
    """The part of a record that a table is made of."""
    return {
        "cell": {"id": cell_id, "factors": dict(factors)},
        "status": "ok",
        "reason": None,
        "rows": outcome.rows,
        "samples": dict(outcome.samples),
    }


def table(name: str, folder: Path, **how: Any) -> pd.DataFrame:
    """The table of a study, written and read as CSV the way the workflow does."""
    study = studies.get(name)
    folder.mkdir(exist_ok=True)
    rows = [row for one in records(name, folder, **how).values() for row in study.aggregate(one)]
    unknown = {key for row in rows for key in row} - set(study.columns)
    assert not unknown, f"columns without a meaning: {unknown}"
    file = folder / "table.csv"
    pd.DataFrame(rows, columns=list(study.columns)).to_csv(file, index=False)
    return pd.read_csv(file)
