"""Tables for other tools: a Data Package that describes every column, Parquet, a spreadsheet's CSV.

The descriptor is that of Frictionless Data (specs.frictionlessdata.io/data-package): whoever reads a
table with a library that knows it gets types, meanings and missing values without guessing.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import documents
from kvbench.errors import InputError
from kvbench.records import gathering

if TYPE_CHECKING:
    import pandas as pd

#: Types of pandas and what the Table Schema calls them.
_TYPES = {"i": "integer", "u": "integer", "f": "number", "b": "boolean"}


def describe(tables: Mapping[str, Mapping[str, str]], folder: Path) -> dict[str, Any]:
    """Return the descriptor of the tables in a folder.

    Parameters
    ----------
    tables:
        File name to what each of its columns means, in their order.
    folder:
        Where the files are.

    Raises
    ------
    InputError
        A table has a column that nothing describes, or lacks one.
    """
    return {
        "$schema": "https://datapackage.org/profiles/1.0/datapackage.json",
        "profile": "tabular-data-package",
        "name": "kvbench-tables",
        "title": "Measurements of caches for language-model applications",
        "licenses": [{"name": "MIT", "path": "https://opensource.org/license/mit"}],
        "resources": [_resource(folder / name, columns) for name, columns in tables.items()],
    }


def _resource(path: Path, columns: Mapping[str, str]) -> dict[str, Any]:
    table = gathering.read_csv(path)
    if list(table.columns) != list(columns):
        odd = sorted(set(table.columns) ^ set(columns)) or ["the order"]
        raise InputError(
            f"{path}: its columns and their descriptions differ in {', '.join(odd)}; "
            "delete the table and run again"
        )
    return {
        "profile": "tabular-data-resource",
        "name": path.stem.lower(),
        "path": path.name,
        "format": "csv",
        "mediatype": "text/csv",
        "encoding": "utf-8",
        "bytes": path.stat().st_size,
        "hash": f"sha256:{documents.sha256_of_file(path)}",
        "schema": {
            "fields": [
                {
                    "name": name,
                    "type": _type(table[name]),
                    "description": meaning,
                }
                for name, meaning in columns.items()
            ],
            "missingValues": [""],
        },
    }


def _type(column: pd.Series) -> str:
    """A column's type, whatever its gaps make of it in memory; without a single value it fits text."""
    held = column.dropna()
    if held.empty:
        return "string"
    if all(isinstance(value, bool) for value in held):
        return "boolean"
    return _TYPES.get(column.dtype.kind, "string")


def check(descriptor: Path) -> None:
    """Validate a data package and all its tables with the frictionless library.

    Raises
    ------
    InputError
        The first thing that is wrong, in one line.
    """
    import frictionless

    report = frictionless.Package(str(descriptor)).validate()
    if report.valid:
        return
    errors = report.flatten(["title", "fieldName", "rowNumber", "note"])
    first = next(iter(errors), ["", "", "", "; ".join(report.errors and [str(report.errors[0])])])
    said = ", ".join(
        f"{name} {value}"
        for name, value in zip(("", "column", "row", ""), first, strict=True)
        if value
    )
    raise InputError(f"{descriptor}: not a valid data package:{said}")


def write_parquet(table: Path, target: Path) -> None:
    """Write a CSV table as Parquet too."""
    buffer = io.BytesIO()
    gathering.read_csv(table).to_parquet(buffer, index=False)
    documents.write_bytes_atomic(target, buffer.getvalue())


def write_spreadsheet(table: Path, target: Path) -> None:
    """Write a CSV table as a Portuguese spreadsheet opens it: semicolons, decimal commas, a mark.

    The mark (a byte order mark) is what tells the program that the text is UTF-8.
    """
    text = gathering.read_csv(table).to_csv(
        index=False, sep=";", decimal=",", lineterminator="\r\n"
    )
    documents.write_text_atomic(target, "\ufeff" + text)
