"""Claims for a reader: grouped, one entry a claim with the machines that tested it, in each language.

The tables hold a row for every claim and machine; most machines test only some of the claims. Here each
claim stands once, with what was measured where, and what no machine tested is listed at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.analysis.claims.verdict import (
    INCONCLUSIVE,
    MET,
    NOT_ENOUGH,
    NOT_MET,
    NOT_TESTED,
    OPEN,
    REFUTED,
    REPRODUCED,
    VERDICTS,
    number_text,
    with_unit,
)
from kvbench.phrases import Phrases
from kvbench.records.identity import HERE

_FOLDER = Path(__file__).parent
#: How :func:`kvbench.analysis.metrics.why_not_judged` says that there are too few rounds.
_ROUNDS = re.compile(r"not enough rounds: (\d+) of (\d+)")
#: In the order of the page: the documents, other publications, ours.
DOCUMENTS = ("S1", "S2", "S3", "S4", "other", "ours")
#: Verdict to a sign that can be told apart without colour.
SIGNS = {
    REPRODUCED: "✓",
    MET: "✓",
    REFUTED: "✗",
    NOT_MET: "✗",
    INCONCLUSIVE: "?",
    NOT_ENOUGH: "–",
    NOT_TESTED: "–",
}


@dataclass(frozen=True)
class Entry:
    """One claim with its rows: those of the machines that tested it, and the others."""

    claim: Mapping[str, Any]
    tested: tuple[Mapping[str, Any], ...]
    untested: tuple[Mapping[str, Any], ...]

    @property
    def nowhere(self) -> tuple[Mapping[str, Any], ...]:
        """The rows of a claim that no machine tested, for their reasons; none if one did."""
        return () if self.tested else self.untested

    def outcome(self) -> str:
        """``held``, ``failed``, ``mixed`` or ``open``: the verdicts of all machines together."""
        judged = {row["verdict"] for row in self.tested} - set(OPEN)
        if not judged:
            return "open"
        if judged <= {REPRODUCED, MET}:
            return "held"
        return "failed" if judged <= {REFUTED, NOT_MET} else "mixed"


def entries(rows: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The claims in their order, each once with its rows."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["id"], []).append(row)
    return [
        Entry(
            own[0],
            tuple(row for row in own if row["verdict"] != NOT_TESTED),
            tuple(row for row in own if row["verdict"] == NOT_TESTED),
        )
        for own in grouped.values()
    ]


def outcomes(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many claims held, failed, are mixed or open (:meth:`Entry.outcome`)."""
    found = [entry.outcome() for entry in entries(rows)]
    return {name: found.count(name) for name in ("held", "failed", "mixed", "open")}


@cache
def _book(language: str) -> Phrases | None:
    if language == "en":
        return None
    return Phrases(documents.read_yaml(_FOLDER / f"phrases.{language}.yaml"))


def say(text: str | None, language: str) -> str:
    """A reason, a place or what was measured, which the program composes in English, in a language."""
    if not text:
        return ""
    book = _book(language)
    return text if book is None else book.say(text)


def measured_text(row: Mapping[str, Any]) -> str:
    """The measured value with its interval: ``5.41x [5.30, 5.52]``; a single run says so."""
    if row["value"] is None:
        return "-"
    text = with_unit(number_text(row["value"]), row["unit"] or "")
    low, high = row["ci_low"], row["ci_high"]
    if low is None or high is None:
        return f"{text} (one run)" if row.get("rounds") == 1 else f"{text} (no interval)"
    return text if low == high else f"{text} [{number_text(low)}, {number_text(high)}]"


def seen_text(row: Mapping[str, Any]) -> str:
    """The smallest difference that a comparison would have found: ``3.1 %``."""
    smallest = row.get("smallest_difference")
    return "-" if smallest is None else f"{number_text(100 * smallest)} %"


def machine_text(name: str, facts: Mapping[str, Any] | None, language: str) -> str:
    """A machine in a list: its name, and what it is where that is known."""
    words = _words(language)
    if not name:
        return words["computed"]
    called = words["here"] if name == HERE else f"`{name}`"
    if not facts:
        return called
    gpu = facts.get("gpu")
    gpu = gpu.get("name") if isinstance(gpu, Mapping) else gpu
    told = [say(str(gpu or facts.get("cpu")), language), words["cores"].format(facts.get("cores"))]
    return f"{called} ({', '.join(told)})"


@cache
def _words(language: str) -> Mapping[str, Any]:
    return documents.read_yaml(_FOLDER / f"words.{language}.yaml")


def page(
    rows: Sequence[Mapping[str, Any]],
    language: str,
    machines: Mapping[str, Mapping[str, Any]],
    untested: Sequence[Mapping[str, Any]] = (),
) -> str:
    """All claims as a Markdown page.

    Parameters
    ----------
    machines:
        Machine to its facts, as its environment tells them.
    untested:
        What the documents say that no number can judge: ``not_tested`` of ``claims.yaml``.
    """
    words = _words(language)
    found = entries(rows)
    judged = [entry for entry in found if entry.tested]
    lines = [f"# {words['title']}", "", *words["legend"].strip().splitlines(), ""]
    lines += [words["outcome"].format(total=len(found), **outcomes(rows)), ""]
    lines += _summary(rows, language, machines)
    for document in DOCUMENTS:
        own = [entry for entry in judged if (entry.claim["document"] or "ours") == document]
        if own:
            lines += ["", f"## {words['documents'][document]}"]
            lines += [line for entry in own for line in ("", *_entry(entry, language))]
    absent = [entry for entry in found if not entry.tested]
    if absent:
        lines += ["", f"## {words['nowhere']}", ""]
        for entry in absent:
            reasons = dict.fromkeys(say(row["reason"], language) for row in entry.untested)
            lines.append(f"- {entry.claim[f'statement_{language}']} *{'; '.join(reasons)}.*")
    if untested:
        lines += ["", f"## {words['not_judged']}", ""]
        lines += [
            f"- {_place(row, language)}: {row['statement'][language]} *{row['reason'][language]}.*"
            for row in untested
        ]
    return "\n".join(lines) + "\n"


def _summary(
    rows: Sequence[Mapping[str, Any]], language: str, machines: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """A table: machine and verdict to the number of claims."""
    words = _words(language)
    used = [one for one in VERDICTS if any(row["verdict"] == one for row in rows)]
    head = [words["machine"], *(words["verdicts"][one] for one in used)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * len(used)}"]
    for name in dict.fromkeys(row["machine"] for row in rows):
        own = [row["verdict"] for row in rows if row["machine"] == name]
        cells = [machine_text(name, machines.get(name), language), *(own.count(v) for v in used)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def source_text(row: Mapping[str, Any], language: str) -> str:
    """Whose statement a claim is, and where it stands there; other authors are cited as they are."""
    place = row["place"] or ""
    if row["document"] == "other":
        cited = row["source"].removesuffix(f", {place}")
    else:
        cited = _words(language)["documents"][row["document"] or "ours"]
    return ", ".join(filter(None, [cited, say(place, language)]))


def _place(row: Mapping[str, Any], language: str) -> str:
    """Document and place in it; another publication names itself in its place."""
    place = say(row["place"], language)
    return place if row["document"] == "other" else f"**{row['document']}**, {place}"


def _entry(entry: Entry, language: str) -> list[str]:
    """A claim, and a line for each machine that tested it."""
    words, claim = _words(language), entry.claim
    where = claim["source"] if claim["document"] == "other" else claim["place"]
    told = [words["kinds"].get(claim["kind"], claim["kind"] or ""), say(where, language)]
    if claim["figure"]:
        says = words["expects" if claim["document"] == "ours" else "says"]
        told.append(says.format(say(claim["figure"], language)))
    told.append(words["holds"].format(say(claim["bound"], language)))
    lines = [
        f"**{claim[f'statement_{language}']}**  ",
        f"{'; '.join(filter(None, told))}. `{claim['id']}`",
        "",
    ]
    for row in entry.tested:
        parts = [value_text(row, language)]
        if row.get("smallest_difference") is not None:
            parts.append(words["sees"].format(say(seen_text(row), language)))
        parts += [reason_text(row, language), say(row["measured_on"], language)]
        name = {HERE: words["here"], "": words["computed"]}.get(row["machine"], row["machine"])
        verdict = words["verdicts"][row["verdict"]]
        told = "; ".join(filter(None, parts))
        lines.append(f"- {SIGNS[row['verdict']]} **{verdict}**, {name}: {told}")
    return lines


def value_text(row: Mapping[str, Any], language: str) -> str:
    """The measured value, with its interval where it has one, in the notation of a language."""
    if row["value"] is None:
        return ""
    text = with_unit(number_text(row["value"]), row["unit"] or "")
    ends = [row["ci_low"], row["ci_high"]]
    if None in ends or ends[0] == ends[1]:
        return say(text, language)
    between = {"en": ", "}.get(language, "; ")
    low, high = (say(number_text(end), language) for end in ends)
    return f"{say(text, language)} [{low}{between}{high}]"


def reason_text(row: Mapping[str, Any], language: str) -> str:
    """Why a row has no verdict, in a language; empty where it has one."""
    words = _words(language)
    found = _ROUNDS.fullmatch(row["reason"] or "")
    if not found:
        return say(row["reason"], language)
    had, needed = found.groups()
    return words["in_turn"] if had == "0" else words["rounds"].format(had=had, needed=needed)
