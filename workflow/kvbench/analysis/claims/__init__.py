"""Claims of the source documents: what they say, what was measured, and the verdict of its interval.

A claim is one entry of ``config/claims.yaml`` (:mod:`reading`). Each kind of measure is a class that
finds its number in the tables (:mod:`kinds`, :mod:`measured`); the verdict compares the 95 % interval
of that number with the bound of the claim, never a single number (:mod:`verdict`); :mod:`writing`
puts them into tables, :mod:`pages` into a page for a reader of each language.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from kvbench.analysis import selection
from kvbench.analysis.claims.kinds import KINDS
from kvbench.analysis.claims.measured import NO_INTERVAL, Found, Tables
from kvbench.analysis.claims.pages import Entry, entries, outcomes, page, say
from kvbench.analysis.claims.reading import TARGET, Claim, load
from kvbench.analysis.claims.verdict import NOT_ENOUGH, VERDICTS, Bound, judge
from kvbench.analysis.claims.writing import (
    COLUMNS,
    claims_table,
    hold,
    measured_text,
    plain,
    read,
    unexpected,
    write,
)
from kvbench.records.identity import HERE

if TYPE_CHECKING:
    from kvbench.analysis.metrics import Evidence

__all__ = [
    "COLUMNS",
    "VERDICTS",
    "Bound",
    "Claim",
    "Entry",
    "claims_table",
    "entries",
    "evaluate",
    "hold",
    "load",
    "measured_text",
    "outcomes",
    "page",
    "plain",
    "read",
    "say",
    "unexpected",
    "write",
]


def evaluate(
    claims: Sequence[Claim],
    samples: pd.DataFrame,
    summary: pd.DataFrame,
    study_tables: Mapping[str, pd.DataFrame],
    evidence: Mapping[str, Evidence] | None = None,
) -> list[dict[str, Any]]:
    """Judge every claim on every machine.

    Parameters
    ----------
    samples, summary:
        The tables ``kv_samples`` and ``kv_summary``.
    study_tables:
        Name of a study to its table ``app_<study>``; further tables, which claims of kind
        ``table`` name, go by their own name.
    evidence:
        Machine to the rounds and blocks that a verdict on times needs there
        (:func:`kvbench.analysis.instrument.evidence`).

    Returns
    -------
    list of dict
        One row a claim and machine, with the keys of :data:`COLUMNS`, in the order of ``claims``.
        ``cells`` is a list; what is unknown is None. Where nothing at all was measured, the
        machine is ``here``.

    Raises
    ------
    InputError
        A claim names a column that its table does not have.
    """
    tables = Tables.of(samples, summary, study_tables, evidence)
    named = [summary["machine"], *(table["machine"] for table in study_tables.values())]
    together = pd.DataFrame({"machine": pd.concat(named, ignore_index=True)})
    machines = selection.machines(together) or [HERE]
    rows = []
    for claim in claims:
        kind = KINDS[claim.measure["kind"]]
        for machine in machines if kind.per_machine else [""]:
            rows.append(_row(claim, machine, kind.find(tables, machine, claim.measure)))
    return rows


def _row(claim: Claim, machine: str, found: Found) -> dict[str, Any]:
    interval = found.interval
    verdict = judge(claim.bound, interval, target=claim.kind == TARGET, why_not=found.why_not)
    reason = found.reason or found.why_not
    if verdict == NOT_ENOUGH and reason is None:
        reason = NO_INTERVAL
    return {
        "id": claim.id,
        "machine": machine,
        "document": claim.document,
        "kind": claim.kind,
        "source": claim.source,
        "place": claim.place,
        "label_en": claim.named("en"),
        "label_pt": claim.named("pt"),
        "statement_en": claim.statement["en"],
        "statement_pt": claim.statement["pt"],
        "figure": claim.figure,
        "figure_value": claim.figure_value,
        "unit": claim.unit,
        "value": None if interval is None else _finite(interval.value),
        "ci_low": None if interval is None else _finite(interval.low),
        "ci_high": None if interval is None else _finite(interval.high),
        "bound": claim.bound.text(claim.unit),
        "bound_low": _finite(claim.bound.low),
        "bound_high": _finite(claim.bound.high),
        "verdict": verdict,
        "expected": claim.expected,
        "reason": reason,
        "rounds": found.rounds,
        "blocks": found.blocks,
        "smallest_difference": _finite(found.smallest_difference),
        "measured_on": found.measured_on,
        "cells": sorted(set(found.cells)),
    }


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
