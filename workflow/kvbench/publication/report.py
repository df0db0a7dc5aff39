"""The report: one page per language with headline, verdicts, figures, tables and machines.

It is written from the published tables and figures alone, holds its pictures within it, and needs
neither a network nor a script.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup

from kvbench import documents, figures, layout
from kvbench.analysis import published
from kvbench.analysis.claims import Entry, entries, plain
from kvbench.analysis.claims.pages import reason_text, source_text
from kvbench.analysis.claims.verdict import OPEN
from kvbench.figures import _kv, _language
from kvbench.figures._bitmap import bitmap

_TEMPLATES = Path(__file__).parent / "templates"
#: Verdict to how it is shown: a colour's class, and a sign for who sees no colour. In reading order.
_VERDICTS = {
    "refuted": ("no", "✗"),
    "not met": ("no", "✗"),
    "inconclusive": ("open", "?"),
    "reproduced": ("yes", "✓"),
    "met": ("yes", "✓"),
    "not enough rounds": ("none", "–"),
    "not tested": ("none", "–"),
}
#: What all machines together say of a claim, likewise.
_OUTCOMES = {
    "failed": ("no", "✗"),
    "mixed": ("open", "?"),
    "held": ("yes", "✓"),
    "open": ("none", "–"),
}
#: Rows of the headline: the words' key, strategy, column of the summary, what the source gives.
_HEADLINE = (
    *((name, name, "e2e_s_median", printed["e2e_s"]) for name, printed in published.turn().items()),
    *(
        (f"{one}_vs_{base}", one, f"speedup_vs_{base}", published.ratio(one, base))
        for one, base in (("dynamic", "none"), ("static", "none"), ("static", "dynamic"))
    ),
)
_SCENARIO = "symposium_turn"
#: Figures about the numbers themselves; the others are told apart by the beginning of their names.
_TRUST = ("claims", "instrument", "kv_drift", "training_loss")
#: Rows of a table that the page shows; the file has all of them.
MOST_ROWS = 60


class Picture(NamedTuple):
    """A figure of this run: its name, the module that draws it, its scenario or nothing."""

    name: str
    module: str
    scenario: str


def render(
    language: str,
    summary: pd.DataFrame,
    claims: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    meanings: Mapping[str, Mapping[str, str]],
    pictures: Sequence[Picture],
    environments: Mapping[str, Mapping[str, Any]],
    studies: Sequence[str],
    folder: Path,
    languages: Sequence[str] = (),
) -> str:
    """Return the page.

    Parameters
    ----------
    language:
        ``en`` or ``pt``.
    summary, claims:
        ``kv_summary.csv`` and ``claims.csv``.
    tables, meanings:
        Every table by its name, and what its columns mean, by the file's name.
    pictures:
        The figures, in the order in which they are shown.
    environments:
        Machine to its facts.
    studies:
        Studies that have a table: which tables a figure takes follows from them.
    folder:
        ``results``: where the figures are, and the records of the machines.
    languages:
        Languages that the page is written in: it leads to the others.
    """
    words = _words(language)
    page = _Page(words, language, folder, environments)
    rows = [page.claim(entry) for entry in _ranked(claims)]
    drawn = [page.figure(picture, studies) for picture in pictures]
    first = next((one for one in drawn if one["name"] == f"symposium_{_SCENARIO}"), None)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(
        words=words,
        others=[
            {"language": other, "lang": _words(other)["lang"], "name": _words(other)["name"]}
            for other in languages
            if other != language
        ],
        counts=[
            {"kind": _OUTCOMES[name][0], "sign": _OUTCOMES[name][1], "count": number, "word": word}
            for name, word in words["outcomes"].items()
            if (number := sum(row["outcome"] == name for row in rows))
        ],
        by_machine=page.by_machine(claims),
        headline=page.headline(summary),
        symposium=first,
        judged=[row for row in rows if row["outcome"] != "open"],
        unjudged=[row for row in rows if row["outcome"] == "open"],
        gallery=[
            {"title": title, "figures": found}
            for group, title in words["groups"].items()
            if (found := [one for one in drawn if one["group"] == group and one is not first])
        ],
        tables=[
            page.table(name, table, meanings.get(f"{name}.csv", {}))
            for name, table in tables.items()
        ],
        machines=[page.machine(*item, summary) for item in environments.items()],
    )


def _words(language: str) -> dict[str, Any]:
    return documents.read_yaml(_TEMPLATES / f"report.{language}.yaml")


class _Page:
    """What a page says, in the words and numbers of its language."""

    def __init__(
        self,
        words: Mapping[str, Any],
        language: str,
        folder: Path,
        environments: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.words, self.language, self.folder = words, language, folder
        self.environments = environments

    def number(self, value: object, digits: int = 4, zeros: bool = False) -> str:
        """A number with its significant digits, or a dash; powers of ten only for the very small.

        ``zeros`` keeps those at the end: 6.00 was measured to three digits.
        """
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return "–"
        if float(value).is_integer() and abs(value) < 1e15:
            text = f"{int(value):,}" if abs(value) >= 1e4 else str(int(value))
        elif 1e4 <= abs(value) < 1e15:
            text = f"{float(f'{value:.{digits}g}'):,.0f}"
        else:
            text = f"{value:#.{digits}g}".removesuffix(".") if zeros else f"{value:.{digits}g}"
        return text.translate(str.maketrans(",.", self.words["thousands"] + self.words["decimal"]))

    def called(self, name: str) -> str:
        """A machine, model or scenario by the name that the figures give it."""
        return self.say(_kv.called(name)) if name else self.words["computed"]

    def say(self, text: str) -> str:
        """A text of the figures, in the page's language."""
        return text if self.language == "en" else _language.phrases(self.language).say(text)

    def hardware(self, machine: str) -> str:
        """What a machine is made of; nothing where its facts are not there."""
        facts = self.environments.get(machine)
        if facts is None:
            return ""
        gpu = _gpu(facts)
        if gpu:
            return gpu
        return f"{facts['cpu']}, {facts['cores']} {self.words['cores']}"

    def measured(
        self, value: object, low: object, high: object, digits: int = 4, zeros: bool = False
    ) -> dict[str, str]:
        """A value with its interval, if it has one; a count and a formula's result have none."""
        ends = [self.number(end, digits, zeros) for end in (low, high)]
        interval = "" if "–" in ends or low == value == high else self.words["list"].join(ends)
        return {"text": self.number(value, digits, zeros), "interval": interval}

    def verdict(self, name: str) -> dict[str, str]:
        """A verdict's word, sign and colour."""
        kind, sign = _VERDICTS[name]
        return {"name": name, "kind": kind, "sign": sign, "word": self.words["verdicts"][name]}

    def claim(self, entry: Entry) -> dict[str, Any]:
        """One claim with what each machine that tested it says; of one that none tested, why."""
        row = entry.claim
        return {
            "outcome": entry.outcome(),
            "statement": row[f"statement_{self.language}"],
            "source": source_text(row, self.language),
            "figure": self.figures_number(row),
            "found": [
                {
                    "verdict": self.verdict(one["verdict"]),
                    "value": self.measured(*(one[key] for key in ("value", "ci_low", "ci_high"))),
                    "unit": _unit(one["unit"]),
                    "reason": reason_text(one, self.language) if one["verdict"] in OPEN else "",
                    "machine": self.called(_text(one["machine"])),
                }
                for one in entry.tested
            ],
            "reasons": list(
                dict.fromkeys(reason_text(one, self.language) for one in entry.nowhere)
            ),
        }

    def by_machine(self, claims: pd.DataFrame) -> dict[str, Any]:
        """How many claims have each verdict on each machine."""
        rows = plain(claims)
        used = [one for one in _VERDICTS if any(row["verdict"] == one for row in rows)]
        names = dict.fromkeys(row["machine"] for row in rows)
        return {
            "verdicts": [self.verdict(one) for one in used],
            "rows": [
                {
                    "machine": self.called(name),
                    "counts": [
                        sum((row["machine"], row["verdict"]) == (name, one) for row in rows)
                        for one in used
                    ],
                }
                for name in names
            ],
        }

    def figures_number(self, row: Mapping[str, Any]) -> str:
        """The source's number with its unit; empty where it gives none.

        Where the source says more than a number (``< 10 ms``), or says it in another unit than we
        measure in (``2 GB``), its own words stand.
        """
        unit, text = _unit(row["unit"]), _text(row["figure"])
        if any(map(str.isdigit, text)) and not _is_number(text, _text(row["unit"])):
            return text if self.language == "en" else re.sub(r"(?<=\d)\.(?=\d)", ",", text)
        found = self.number(row["figure_value"])
        return (
            "" if found == "–" else f"{found}{unit}" if unit == "x" else f"{found} {unit}".strip()
        )

    def headline(self, summary: pd.DataFrame) -> dict[str, Any]:
        """The published cell: one row per machine and model that measured it, the source's first."""
        ours = summary[
            (summary["scenario"] == _SCENARIO) & summary["strategy"].isin(published.turn())
        ]
        groups = list(ours.groupby(["machine", "model", "device", "dtype"], sort=False))
        return {
            "columns": [self.words[name] for name, *_ in _HEADLINE],
            "printed": [self.number(printed) for *_, printed in _HEADLINE],
            "rows": [
                {
                    "machine": self.called(machine),
                    "hardware": self.hardware(machine),
                    "model": f"{self.called(model)}, {dtype}",
                    "values": [
                        self._headline_value(own, strategy, column)
                        for _, strategy, column, _ in _HEADLINE
                    ],
                }
                for (machine, model, _, dtype), own in groups
            ],
        }

    def _headline_value(self, own: pd.DataFrame, strategy: str, column: str) -> dict[str, str]:
        rows = own[own["strategy"] == strategy]
        if rows.empty:
            return {"text": "–", "interval": ""}
        base = column.removesuffix("_median")
        row = rows.iloc[0]
        # Three digits, as in the figure beside it.
        return self.measured(
            row[column], row[f"{base}_ci_low"], row[f"{base}_ci_high"], 3, zeros=True
        )

    def figure(self, picture: Picture, studies: Sequence[str]) -> dict[str, Any]:
        """One figure with its question, its picture and the tables it is drawn from."""
        file = f"{picture.name}.{self.language}"
        question = self.say(figures.question(picture.module))
        scenario = self.called(picture.scenario) if picture.scenario else ""
        plainly = question.replace("`", "")
        return {
            "name": picture.name,
            "file": file,
            "scenario": scenario,
            "question": _code(question),
            "alternative": f"{plainly} ({scenario})" if scenario else plainly,
            "group": _group(picture.name),
            "data": base64.b64encode(bitmap(self.folder / "figures" / f"{file}.png")).decode(),
            "tables": [
                path.removeprefix("results/")
                for path in map(layout.table, figures.tables_of(picture.module, studies))
                if path.startswith("results/")
            ],
        }

    def table(self, name: str, table: pd.DataFrame, meanings: Mapping[str, str]) -> dict[str, Any]:
        """The beginning of a table, without the columns that are empty throughout."""
        shown = table.head(MOST_ROWS)
        columns = [column for column in table if not _empty(table[column])]
        return {
            "name": name,
            "count": self.number(len(table)),
            "left": len(table) > MOST_ROWS,
            "columns": [
                {"name": column, "meaning": meanings.get(str(column), "").replace("`", "")}
                for column in columns
            ],
            "rows": [
                [self._entry(value) for value in row]
                for row in shown[columns].itertuples(index=False, name=None)
            ],
        }

    def _entry(self, value: object) -> dict[str, str]:
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            text = _text(value)
            return {"text": text, "kind": "words" if len(text) > 40 else ""}
        return {"text": self.number(float(value)).replace("–", ""), "kind": "number"}

    def records(self, machine: str) -> str:
        """Folder of a machine's records, seen from the page; nothing where there is none."""
        name = "cells/" if machine == layout.HERE else f"recorded/{machine}/"
        return name if (self.folder / name).is_dir() else ""

    def machine(
        self, name: str, facts: Mapping[str, Any], summary: pd.DataFrame
    ) -> dict[str, object]:
        """A machine's facts, and how many of its cells ended how."""
        ended = summary.loc[summary["machine"] == name, "status"].value_counts()
        packages = facts["packages"]
        return {
            "name": self.called(name),
            "records": self.records(name),
            "cpu": facts["cpu"],
            "cores": facts["cores"],
            "memory": self.number(round(facts["memory_bytes"] / 2**30, 1)),
            "gpu": _gpu(facts),
            "system": facts["system"],
            "python": facts["python"],
            "torch": packages.get("torch", "–"),
            "transformers": packages.get("transformers", "–"),
            "cells": self.words["list"].join(
                f"{self.words['statuses'].get(status, status)}: {n}" for status, n in ended.items()
            ),
        }


def _gpu(facts: Mapping[str, Any]) -> str:
    """The name of a machine's GPU; nothing where it has none."""
    gpu = facts.get("gpu")
    return _text(gpu.get("name") if isinstance(gpu, Mapping) else gpu)


def _code(text: str) -> Markup:
    """A text whose parts between backticks are code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else part
        for number, part in enumerate(parts)
    )


def _ranked(claims: pd.DataFrame) -> list[Entry]:
    """Claims by outcome, what failed first, otherwise in their order."""
    return sorted(entries(plain(claims)), key=lambda entry: list(_OUTCOMES).index(entry.outcome()))


def _group(name: str) -> str:
    if name in _TRUST:
        return "trust"
    return {"app": "front", "traffic": "traffic"}.get(name.partition("_")[0], "inside")


def _text(value: object) -> str:
    """A text; nothing where an entry is empty."""
    return "" if value is None or value != value else str(value)


def _unit(value: object) -> str:
    """A unit as it is printed."""
    return {"us": "µs"}.get(_text(value), _text(value))


def _is_number(text: str, unit: str) -> bool:
    """Whether a text is a number with this unit, and perhaps the same in brackets."""
    return bool(re.fullmatch(rf"[\d.]+ ?{re.escape(unit)}( \(.*\))?", text))


def _empty(column: pd.Series) -> bool:
    return bool((column.isna() | (column.astype(str) == "")).all())
