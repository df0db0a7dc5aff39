"""Reading ``config/claims.yaml``: every mistake in it is one line that names file, claim and key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.analysis.claims import kinds
from kvbench.analysis.claims.measured import SCENARIO_WORDS
from kvbench.analysis.claims.verdict import Bound, with_unit
from kvbench.errors import InputError, one_of

#: The kind of a sentence that is a goal rather than a fact.
TARGET = "target"


@dataclass(frozen=True)
class Claim:
    """One sentence of a source document, and how it is put to the test."""

    id: str
    #: How the document is cited, with the place in it.
    source: str
    statement: Mapping[str, str]
    figure: str | None
    figure_value: float | None
    unit: str
    measure: Mapping[str, Any]
    bound: Bound
    expected: str | None = None
    #: S1 to S4, other or ours; and stated, printed, target, code, derived or hypothesis.
    document: str | None = None
    kind: str | None = None
    #: A few words that stand for the claim in a figure or a list, in each language.
    label: Mapping[str, str] | None = None
    #: Where in the document.
    place: str = ""

    def named(self, language: str) -> str:
        """The label, or the id in words where there is none."""
        return self.label[language] if self.label else self.id.replace("_", " ")


def load(path: Path, scenarios: Iterable[str] | None = None) -> list[Claim]:
    """Read and check ``config/claims.yaml``.

    Parameters
    ----------
    scenarios:
        Ids a claim may name; by default the files of the folder ``scenarios`` beside ``path``.
        Models are those of the folder ``models`` beside it.

    Raises
    ------
    InputError
        The file is malformed, holds no claim or a number that is none, or a claim names an unknown
        document, metric, column, strategy, scenario, model, study or value.
    """
    document = documents.read_yaml(path)
    documents.check(document, "claims", str(path))
    document = documents.fill_defaults(document, documents.schema("claims"))
    if scenarios is None:
        scenarios = [file.stem for file in documents.yaml_files(path.parent / "scenarios")]
    known = {
        "scenario": sorted({*scenarios, *SCENARIO_WORDS}),
        "model": sorted(file.stem for file in documents.yaml_files(path.parent / "models")),
    }
    claims: list[Claim] = []
    for number, entry in enumerate(document["claims"]):
        where = f"{path}: claims[{number}] ({entry['id']})"
        if any(entry["id"] == claim.id for claim in claims):
            raise InputError(f"{where}: the id is already taken; choose another one")
        claims.append(_claim(entry, document["documents"], known, where, path.parent))
    return claims


def _claim(
    entry: Mapping[str, Any],
    sources: Mapping[str, str],
    known: Mapping[str, Sequence[str]],
    where: str,
    folder: Path,
) -> Claim:
    figure = entry["figure"] or {}
    value = figure.get("value")
    text = figure.get("text")
    if text is None and value is not None:
        # Decimal keeps 0.000022 from becoming 2.2e-05.
        text = with_unit(f"{Decimal(str(value)):f}", entry["unit"])
    return Claim(
        id=entry["id"],
        source=_source(entry, sources, where),
        statement=entry["statement"],
        figure=text,
        figure_value=value,
        unit=entry["unit"],
        measure=kinds.checked(entry["measure"], known, f"{where}: measure", folder),
        bound=_bound(entry["holds_if"], value, where),
        expected=entry.get("expected"),
        document=entry["document"],
        kind=entry["kind"],
        label=entry.get("label"),
        place=entry.get("place") or "",
    )


def _source(entry: Mapping[str, Any], sources: Mapping[str, str], where: str) -> str:
    """How the claim's document is cited, with the place in it."""
    name, place = entry["document"], entry.get("place")
    if name == "other":
        if missing := [key for key in ("author", "title", "url", "date") if key not in entry]:
            raise InputError(f"{where}: document other needs {', '.join(missing)}")
        cited = f"{entry['author']}, {entry['title']}, {entry['date']}, {entry['url']}"
    elif name == "ours":
        cited = sources.get(name, "this artifact")
    else:
        one_of("document", name, sources, f"{where}: document")
        cited = sources[name]
    return f"{cited}, {place}" if place else cited


def _bound(holds_if: Mapping[str, Any], figure: float | None, where: str) -> Bound:
    for key in ("within_percent", "within_factor"):
        if key in holds_if and (figure is None or figure <= 0):
            raise InputError(f"{where}: holds_if.{key} needs a positive figure.value; give one")
    low, high, low_open, high_open = -math.inf, math.inf, False, False
    for key, given in holds_if.items():
        if key in ("at_least", "above"):
            low, low_open = given, key == "above"
        elif key in ("at_most", "below"):
            high, high_open = given, key == "below"
        elif key == "equals":
            low = high = given
        elif key == "between":
            low, high = given
        elif key == "within_percent":
            low, high = figure * (1 - given / 100), figure * (1 + given / 100)
        else:
            low, high = figure / given, figure * given
    clear = len(holds_if) == 1 or (
        len(holds_if) == 2
        and len({"at_least", "above"} & set(holds_if)) == 1
        and len({"at_most", "below"} & set(holds_if)) == 1
    )
    if not clear or low > high:
        raise InputError(
            f"{where}: holds_if {dict(holds_if)} is not one interval; give one bound, or one from "
            "below and a higher one from above"
        )
    return Bound(float(low), float(high), low_open, high_open)
