"""Claims with their verdicts as CSV, JSON, pages and text for the terminal, and back."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kvbench import documents
from kvbench.analysis.claims.pages import entries, measured_text, page, seen_text
from kvbench.analysis.claims.verdict import OPEN, VERDICTS
from kvbench.errors import InputError

#: Column of ``claims.csv`` to its meaning, in the table's order.
COLUMNS: Mapping[str, str] = {
    "id": "name of the claim in config/claims.yaml",
    "machine": "`here`, or a recorded machine; empty for arithmetic, which needs none",
    "document": "S1 to S4, other or ours: whose sentence it is",
    "kind": "stated, printed, target, code, derived or hypothesis",
    "source": "document and place",
    "place": "where in the document",
    "label_en": "the claim in a few words",
    "label_pt": "the same in Portuguese",
    "statement_en": "what is claimed",
    "statement_pt": "the same in Portuguese",
    "figure": "the source's number as it is printed; empty when it gives none",
    "figure_value": "the same as a number, in `unit`",
    "unit": "unit of figure, value, interval and bound; x is a ratio",
    "value": "the measured value",
    "ci_low": "lower end of its 95 % interval; empty for one run",
    "ci_high": "upper end of its 95 % interval; empty for one run",
    "bound": "where the value must lie for the claim to hold",
    "bound_low": "lower end of the bound; empty when there is none",
    "bound_high": "upper end of the bound; empty when there is none",
    "verdict": "reproduced, refuted, inconclusive; met, not met (targets); not enough rounds, not tested",
    "expected": "the verdict that claims.yaml expects, if it does",
    "reason": "why the claim has no verdict",
    "rounds": "rounds behind a comparison of times; 0: one after the other, not paired",
    "blocks": "blocks that these rounds are of",
    "smallest_difference": "what the comparison would have shown nine times out of ten, as a share",
    "measured_on": "model, precision, device, scenario and lengths",
    "cells": "records behind the value, from the repository's root",
}


def unexpected(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows whose verdict differs from the expected one; one that judges nothing does not."""
    return [
        row for row in rows if row["expected"] and row["verdict"] not in (row["expected"], *OPEN)
    ]


def hold(rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse verdicts other than expected: what ``claims_must_hold`` asks for.

    Raises
    ------
    InputError
        One line that names every such claim.
    """
    wrong = [
        f"{row['id']} ({row['machine'] or 'formula'}) is {row['verdict']}, expected {row['expected']}"
        for row in unexpected(rows)
    ]
    if wrong:
        raise InputError(
            f"config/claims.yaml: verdicts other than expected: {'; '.join(wrong)}; correct what is "
            "expected, or run without claims_must_hold"
        )


def claims_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text for the terminal: the measured interval beside the source's figure.

    A claim has one line for each machine that tested it; what no machine tested stands below, with
    the reason.
    """
    head = (
        *("verdict", "claim", "machine", "source says", "measured [95 % interval]", "sees"),
        "holds if",
    )
    lines = [head]
    found = entries(rows)
    for entry in found:
        for row in entry.tested:
            flag = "!" if unexpected([row]) else ""
            lines.append(
                (
                    f"{row['verdict']}{flag}",
                    row["id"],
                    row["machine"] or "-",
                    row["figure"] or "-",
                    measured_text(row),
                    seen_text(row),
                    row["bound"],
                )
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    text += ["", f"{len(found)} claims; verdicts by machine:"]
    for machine in dict.fromkeys(row["machine"] for row in rows):
        own = [row["verdict"] for row in rows if row["machine"] == machine]
        counts = ", ".join(f"{own.count(one)} {one}" for one in VERDICTS if one in own)
        text += [f"  {machine or 'computed'}: {counts}"]
    text += ["sees: the smallest difference that would have been found nine times out of ten"]
    for title, reasons in (
        ("not enough rounds:", _reasons(row for one in found for row in one.tested)),
        ("tested on no machine:", _reasons(row for one in found for row in one.nowhere)),
    ):
        if reasons:
            text += [title, *(f"  {why}: {', '.join(ids)}" for why, ids in reasons.items())]
    if unexpected(rows):
        text += ["! differs from the verdict that claims.yaml expects"]
    return "\n".join(line.rstrip() for line in text) + "\n"


def _reasons(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Reason to the claims that it leaves without a verdict, each once."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] in OPEN and row["reason"]:
            ids = found.setdefault(row["reason"], [])
            if row["id"] not in ids:
                ids.append(row["id"])
    return found


def write(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    machines: Mapping[str, Mapping[str, Any]] | None = None,
    sources: Path | None = None,
) -> None:
    """Write ``claims.csv``, ``claims.json``, ``claims.md`` and ``claims.pt.md`` into ``folder``.

    Parameters
    ----------
    machines:
        Machine to its facts; the pages name what each machine is.
    sources:
        The file of claims; what it lists as not tested closes the pages.
    """
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["cells"] = table["cells"].map(" ".join)
    text = io.StringIO()
    table.to_csv(text, index=False, lineterminator="\n")
    documents.write_text_atomic(folder / "claims.csv", text.getvalue())
    documents.write_json(folder / "claims.json", [dict(row) for row in rows])
    untested = documents.read_yaml(sources).get("not_tested", []) if sources else []
    for language, name in (("en", "claims.md"), ("pt", "claims.pt.md")):
        text = page(rows, language, machines or {}, untested)
        documents.write_text_atomic(folder / name, text)


def plain(claims: pd.DataFrame | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Rows of the table as dictionaries, what is missing as None, in the order given."""
    if claims is None:
        return []
    rows = claims.to_dict("records") if isinstance(claims, pd.DataFrame) else claims
    return [
        {
            str(key): None if isinstance(entry, float) and math.isnan(entry) else entry
            for key, entry in row.items()
        }
        for row in rows
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows from ``claims.csv`` or ``claims.json``.

    Raises
    ------
    InputError
        The file is missing, or not the claims of this version.
    """
    if path.suffix == ".json":
        rows = documents.read_json(path)
    else:
        try:
            table = pd.read_csv(path, keep_default_na=False, na_values=[""])
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError):
            rows = None
        else:
            rows = plain(table)
    if not isinstance(rows, list) or any(set(COLUMNS) - set(row) for row in rows):
        raise InputError(f"{path}: not the claims of this version; delete the file and run again")
    for row in rows:
        for column in ("machine", "measured_on", "unit", "place"):
            row[column] = row[column] or ""
        for column in ("rounds", "blocks"):
            row[column] = None if row[column] is None else int(row[column])
        if not isinstance(row["cells"], list):
            row["cells"] = (row["cells"] or "").split()
    return rows
