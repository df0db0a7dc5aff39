"""Claims of the source documents: what they say, what was measured, and the verdict of its interval.

A claim is one entry of ``config/claims.yaml``. Its verdict compares the 95 % interval of a
measurement with the bound of the claim, never a single number.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvbench import documents, physics, strategies, studies
from kvbench.analysis import selection, statistics
from kvbench.analysis.selection import HEADLINE_SCENARIO, HERE, SWEEP_SCENARIO, Group
from kvbench.analysis.statistics import Interval
from kvbench.analysis.tables import APP_COLUMNS, SUMMARY_COLUMNS
from kvbench.errors import InputError
from kvbench.paper import numbers

REPRODUCED, REFUTED, INCONCLUSIVE, NOT_TESTED = (
    "reproduced",
    "refuted",
    "inconclusive",
    "not tested",
)
VERDICTS = (REPRODUCED, REFUTED, INCONCLUSIVE, NOT_TESTED)

#: Columns of ``kv_samples`` that two strategies can be compared in.
METRICS = ("e2e_s", "ttft_s", "tpot_s", "output_tokens_per_s", "peak_memory_mib", "kv_mib")
#: Measured once per turn and process, in a pass of their own.
_ONCE_PER_TURN = ("peak_memory_mib", "kv_mib")
#: Counts, shares of counts and sizes of the cache's own storage: they have no sampling error.
_EXACT_COLUMNS = (
    "success_rate",
    "kv_mib",
    "kv_mib_predicted",
    "tokens_match_reference",
    "turns",
)
_SCENARIO_WORDS = ("headline", "sweep", "conversation")
_FILTERS = ("model", "device", "dtype")
_GIB = 2**30

#: Column of ``claims.csv`` to its meaning, in the table's order.
COLUMNS: Mapping[str, str] = {
    "id": "name of the claim in config/claims.yaml",
    "machine": "`here`, or a recorded machine; empty for arithmetic, which needs none",
    "document": "S1 to S4, other or ours: whose sentence it is",
    "kind": "stated, printed, target, code, derived or hypothesis",
    "source": "document and place",
    "statement_en": "what is claimed",
    "statement_pt": "the same in Portuguese",
    "figure": "the source's number as it is printed; empty when it gives none",
    "figure_value": "the same as a number, in `unit`",
    "unit": "unit of figure, value, interval and bound; x is a ratio",
    "value": "the measured value",
    "ci_low": "lower end of its 95 % interval",
    "ci_high": "upper end of its 95 % interval",
    "bound": "where the value must lie for the claim to hold",
    "bound_low": "lower end of the bound; empty when there is none",
    "bound_high": "upper end of the bound; empty when there is none",
    "verdict": "reproduced, refuted, inconclusive or not tested",
    "expected": "the verdict that claims.yaml expects, if it does",
    "reason": "why the claim is not tested or has no interval",
    "measured_on": "model, precision, device, scenario and lengths",
    "cells": "records behind the value, from the repository's root",
}


@dataclass(frozen=True)
class Bound:
    """The numbers for which a claim holds: an interval, each end open or closed."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def verdict(self, interval: Interval) -> str:
        """Return reproduced (wholly inside), refuted (wholly outside) or inconclusive."""
        low, high = interval.low, interval.high
        if math.isnan(low) or math.isnan(high):
            return INCONCLUSIVE
        above = low > self.low or (low == self.low and not self.low_open)
        below = high < self.high or (high == self.high and not self.high_open)
        if above and below:
            return REPRODUCED
        if high < self.low or (high == self.low and self.low_open):
            return REFUTED
        if low > self.high or (low == self.high and self.high_open):
            return REFUTED
        return INCONCLUSIVE

    def text(self, unit: str = "") -> str:
        """The bound as a reader sees it: ``> 1x``, ``1.8 to 2.2 GiB``."""
        low, high = number_text(self.low), number_text(self.high)
        if self.low == self.high:
            return with_unit(f"= {low}", unit)
        if math.isinf(self.high):
            return with_unit(f"{'>' if self.low_open else '>='} {low}", unit)
        if math.isinf(self.low):
            return with_unit(f"{'<' if self.high_open else '<='} {high}", unit)
        return with_unit(f"{low} to {high}", unit)


@dataclass(frozen=True)
class Claim:
    """One sentence of a source document, and how it is put to the test."""

    id: str
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


@dataclass(frozen=True)
class Found:
    """What the tables say about a claim on one machine; ``interval`` is None if nothing."""

    interval: Interval | None
    reason: str | None = None
    measured_on: str = ""
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tables:
    samples: pd.DataFrame
    summary: pd.DataFrame
    others: Mapping[str, pd.DataFrame]
    replicates: Mapping[tuple[str, ...], list[int]]
    #: Identity of a cell to the positions of its samples, so that no claim searches all of them.
    positions: Mapping[tuple[str, ...], np.ndarray]
    #: (study, machine) to its named values; studies compute all of them at once.
    values: dict[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    #: What :func:`_choose` answered; many claims ask about the same cells.
    chosen: dict[tuple, tuple[Group, str] | str] = field(default_factory=dict)


# ---------------------------------------------------------------------------- reading


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
        The file is malformed, or a claim names an unknown document, metric, column, strategy,
        scenario, model, study or value.
    """
    document = documents.read_yaml(path)
    documents.check(document, "claims", str(path))
    document = documents.fill_defaults(document, documents.schema("claims"))
    if scenarios is None:
        scenarios = [file.stem for file in (path.parent / "scenarios").glob("*.yaml")]
    known = {
        "scenario": sorted({*scenarios, *_SCENARIO_WORDS}),
        "model": sorted(file.stem for file in (path.parent / "models").glob("*.yaml")),
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
    measure = _measure(entry["measure"], known, where, folder)
    return Claim(
        id=entry["id"],
        source=_source(entry, sources, where),
        statement=entry["statement"],
        figure=text,
        figure_value=value,
        unit=entry["unit"],
        measure=measure,
        bound=_bound(entry["holds_if"], value, where),
        expected=entry.get("expected"),
        document=entry.get("document"),
        kind=entry.get("kind"),
    )


def _source(entry: Mapping[str, Any], sources: Mapping[str, str], where: str) -> str:
    """How the claim's document is cited, with the place in it."""
    if "document" not in entry:
        if "source" not in entry:
            raise InputError(
                f"{where}: document is missing; use one of S1, S2, S3, S4, other, ours"
            )
        name, place = entry["source"]["document"], entry["source"]["place"]
        _one_of(name, sources, f"{where}: source.document", "document")
        return f"{sources[name]}, {place}"
    name = entry["document"]
    place = entry.get("place") or entry.get("source", {}).get("place")
    if name == "other":
        if missing := [key for key in ("author", "title", "url", "date") if key not in entry]:
            raise InputError(f"{where}: document other needs {', '.join(missing)}")
        cited = f"{entry['author']}, {entry['title']}, {entry['date']}, {entry['url']}"
    elif name == "ours":
        cited = sources.get(name, "this artifact")
    else:
        _one_of(name, sources, f"{where}: document", "document")
        cited = sources[name]
    return f"{cited}, {place}" if place else cited


def _one_of(name: Any, known: Iterable[str], where: str, kind: str) -> None:
    if name not in known:
        listed = ", ".join(sorted(known))
        listed = listed if len(listed) <= 600 else f"{listed[:600]} ..."
        raise InputError(f"{where}: unknown {kind} {name!r}; known: {listed}")


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


def _measure(
    measure: Mapping[str, Any], known: Mapping[str, Sequence[str]], where: str, folder: Path
) -> dict[str, Any]:
    kind = _KINDS[measure["kind"]]
    spot = f"{where}: measure"
    keys = set(measure) - {"kind"}
    if missing := [key for key in kind.required if key not in keys]:
        raise InputError(f"{spot}: kind {measure['kind']} needs {', '.join(missing)}")
    if foreign := sorted(keys - {*kind.required, *kind.optional}):
        raise InputError(
            f"{spot}: kind {measure['kind']} has no key {', '.join(foreign)}; it takes "
            f"{', '.join((*kind.required, *kind.optional))}"
        )
    filled = dict(measure)
    for key in ("numerator", "denominator", "strategy"):
        if key in measure:
            _one_of(measure[key], strategies.names(), f"{spot}.{key}", "strategy")
    for key in ("among", "strategies"):
        for name in measure.get(key, ()):
            _one_of(name, strategies.names(), f"{spot}.{key}", "strategy")
    if "metric" in measure:
        _one_of(measure["metric"], METRICS, f"{spot}.metric", "metric")
    if "scenario" in measure:
        _one_of(measure["scenario"], known["scenario"], f"{spot}.scenario", "scenario")
    for name in measure.get("model", ()):
        _one_of(name, known["model"], f"{spot}.model", "model")
    if measure["kind"] in ("value", "extreme"):
        _one_of(measure["column"], SUMMARY_COLUMNS, f"{spot}.column", "column")
    if measure["kind"] == "study":
        _one_of(measure["study"], studies.names(), f"{spot}.study", "study")
        named = value_names(measure["study"])
        for key in ("value", "over"):
            if key in measure:
                _one_of(measure[key], named, f"{spot}.{key}", f"value of {measure['study']}")
    if measure["kind"] == "formula":
        filled["architecture"] = _architecture(measure, known, spot, folder)
        needed = {"quantized_ratio": ("bits", "new_tokens"), "flops_ratio": ("new_tokens",)}
        for key in needed.get(measure["quantity"], ()):
            if key not in measure:
                raise InputError(f"{spot}: quantity {measure['quantity']} needs {key}")
        # Computed once here, so that sizes that cannot be computed stop before any measuring.
        try:
            _compute(filled)
        except InputError as error:
            raise InputError(f"{spot}: {error}") from None
    return filled


def _architecture(
    measure: Mapping[str, Any], known: Mapping[str, Sequence[str]], spot: str, folder: Path
) -> physics.Architecture:
    if ("architecture" in measure) == ("of_model" in measure):
        raise InputError(f"{spot}: give either architecture or of_model")
    if "architecture" in measure:
        return physics.Architecture.from_config(measure["architecture"], f"{spot}.architecture")
    name = measure["of_model"]
    _one_of(name, known["model"], f"{spot}.of_model", "model")
    model = documents.read_yaml(folder / "models" / f"{name}.yaml")
    if "architecture" not in model:
        raise InputError(f"{spot}.of_model: {name} states no architecture; give one here")
    return physics.Architecture.from_config(model["architecture"], f"models/{name}.yaml")


def value_names(study: str) -> list[str]:
    """Names of the values that a study can give, found by asking it about an empty table."""
    found = studies.get(study)
    return list(found.values(pd.DataFrame(columns=[*APP_COLUMNS, *found.columns])))


# ---------------------------------------------------------------------------- evaluating


def evaluate(
    claims: Sequence[Claim],
    samples: pd.DataFrame,
    summary: pd.DataFrame,
    study_tables: Mapping[str, pd.DataFrame],
) -> list[dict[str, Any]]:
    """Judge every claim on every machine.

    Parameters
    ----------
    samples, summary:
        The tables ``kv_samples`` and ``kv_summary``.
    study_tables:
        Name of a study to its table ``app_<study>``; further tables, which claims of kind
        ``table`` name, go by their own name.

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
    positions = samples.groupby(list(numbers.IDENTITY), sort=False).indices
    replicates = numbers.replicates_of(samples)
    tables = _Tables(samples, summary, study_tables, replicates, positions)
    named = [summary["machine"], *(table["machine"] for table in study_tables.values())]
    together = pd.DataFrame({"machine": pd.concat(named, ignore_index=True)})
    machines = selection.machines(together) or [HERE]
    rows = []
    for claim in claims:
        kind = _KINDS[claim.measure["kind"]]
        for machine in machines if kind.per_machine else [""]:
            rows.append(_row(claim, machine, kind.find(tables, machine, claim.measure)))
    return rows


def _row(claim: Claim, machine: str, found: Found) -> dict[str, Any]:
    interval = found.interval
    verdict = NOT_TESTED if interval is None else claim.bound.verdict(interval)
    reason = found.reason
    if interval is not None and math.isnan(interval.low) and reason is None:
        reason = "measured once, so there is no interval"
    return {
        "id": claim.id,
        "machine": machine,
        "document": claim.document,
        "kind": claim.kind,
        "source": claim.source,
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
        "measured_on": found.measured_on,
        "cells": sorted(set(found.cells)),
    }


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def unexpected(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows whose verdict differs from the expected one; what was not tested has no verdict."""
    return [
        row
        for row in rows
        if row["expected"] and row["verdict"] not in (row["expected"], NOT_TESTED)
    ]


def _choose(
    tables: _Tables, machine: str, measure: Mapping[str, Any], needed: Sequence[str]
) -> tuple[Group, str] | str:
    """Group and scenario in which all ``needed`` strategies were timed, or why there is none."""
    filters = tuple(tuple(measure.get(key, ())) for key in _FILTERS)
    asked = (machine, measure["scenario"], filters, tuple(needed))
    if asked not in tables.chosen:
        tables.chosen[asked] = _search(tables, machine, measure, needed)
    return tables.chosen[asked]


def _search(
    tables: _Tables, machine: str, measure: Mapping[str, Any], needed: Sequence[str]
) -> tuple[Group, str] | str:
    word = measure["scenario"]
    scenario = {"headline": HEADLINE_SCENARIO, "sweep": SWEEP_SCENARIO}.get(word, word)
    rows = tables.summary[tables.summary["machine"] == machine]
    if word == "conversation":
        rows = rows[
            (rows["turns"].fillna(1) > 1)
            & ~rows["scenario"].isin((HEADLINE_SCENARIO, SWEEP_SCENARIO))
        ]
        scenario = "a conversation of several turns"
    else:
        rows = rows[rows["scenario"] == scenario]
    if rows.empty:
        return f"{scenario} was not measured"
    for key in _FILTERS:
        if key in measure:
            rows = rows[rows[key].isin(measure[key])]
            if rows.empty:
                return f"{scenario} was not measured with {key} {' or '.join(measure[key])}"
    timed = selection.measured(rows)
    keys = [*Group._fields, "scenario"]
    complete = [
        part for _, part in timed.groupby(keys, sort=True) if set(needed) <= set(part["strategy"])
    ]
    if not complete:
        return _missing(rows, timed, needed, scenario)
    chosen = pd.concat(complete)
    if word == "headline":
        return selection.nearest_to_published(chosen, machine), scenario
    if word == "conversation":
        return selection.widest(chosen, machine, turns_at_least=2)
    return selection.widest(chosen, machine, scenario=scenario)


def _missing(rows: pd.DataFrame, timed: pd.DataFrame, needed: Sequence[str], scenario: str) -> str:
    """Say of each strategy that stopped a comparison how its cell ended."""
    told = []
    for strategy in needed:
        if strategy in set(timed["strategy"]):
            continue
        own = rows[rows["strategy"] == strategy]
        if own.empty:
            told.append(f"{strategy} was not measured in {scenario}")
            continue
        row = own.iloc[0]
        why = f" ({row['reason']})" if pd.notna(row["reason"]) else ""
        told.append(f"{strategy}: {str(row['status']).replace('_', ' ')}{why}")
    return "; ".join(told) or (f"{' and '.join(needed)} were not measured together in {scenario}")


def _own(tables: _Tables, group: Group, scenario: str, strategy: str) -> pd.DataFrame:
    """Samples of one cell, of those replicates only that finished all its turns."""
    found = tables.positions.get((*group, scenario, strategy))
    rows = tables.samples.iloc[[] if found is None else found]
    if rows.empty:
        return rows
    turns = rows.groupby("replicate")["turn"].transform("nunique")
    return rows[turns == turns.max()]


def _lengths(measure: Mapping[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    wanted = measure.get("prompt_tokens")
    lengths = rows["prompt_tokens"]
    if wanted == "longest":
        return rows[lengths == lengths.max()]
    if wanted == "shortest":
        return rows[lengths == lengths.min()]
    if wanted:
        return rows[lengths.between(wanted.get("at_least", 1), wanted.get("at_most", math.inf))]
    return rows


def _by_turn(rows: pd.DataFrame, metric: str) -> dict[tuple[str, int], list[list[float]]]:
    """(scenario, turn) to replicates of iterations, disturbed iterations left out.

    An iteration counts whole or not at all; where every one was disturbed, all count.
    """
    found: dict[tuple[str, int], list[list[float]]] = defaultdict(list)
    rows = rows[rows[metric].notna()]
    for (scenario, _), part in rows.groupby(["scenario", "replicate"], sort=True):
        if metric in _ONCE_PER_TURN:
            for turn, own in part.groupby("turn", sort=True):
                found[scenario, int(turn)].append([float(own[metric].iloc[0])])
            continue
        disturbed = part["disturbed"].astype(str).eq("True")
        dirty = set(part.loc[disturbed, "iteration"])
        clean = part[~part["iteration"].isin(dirty)]
        for turn, own in (clean if len(clean) else part).groupby("turn", sort=True):
            found[scenario, int(turn)].append(own.sort_values("iteration")[metric].tolist())
    return found


def _where(group: Group, scenario: str, rows: pd.DataFrame) -> str:
    """One line that names what was compared: model, precision, device, scenario, lengths."""
    prompt, new = (sorted({int(n) for n in rows[c]}) for c in ("prompt_tokens", "new_tokens"))

    def span(numbers: Sequence[int]) -> str:
        return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    tokens = f" ({span(prompt)} + {span(new)} tokens)" if prompt and new else ""
    return f"{group.model}, {group.dtype} on {group.device}, {scenario}{tokens}"


def _cells(tables: _Tables, group: Group, scenario: str, names: Iterable[str]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        row = {**group._asdict(), "scenario": scenario, "strategy": name}
        found += numbers.record_paths(tables.replicates, row)
    return tuple(found)


def _compare(
    tables: _Tables, place: tuple[Group, str], measure: Mapping[str, Any], above: str, below: str
) -> Found:
    """Ratio of one strategy over another in one group and scenario."""
    metric = measure.get("metric", "e2e_s")
    group, scenario = place
    sides = [_lengths(measure, _own(tables, group, scenario, name)) for name in (above, below)]
    where = _where(group, scenario, pd.concat(sides))
    cells = _cells(tables, group, scenario, (above, below))
    numerator, denominator = (_by_turn(rows, metric) for rows in sides)
    shared = sorted(set(numerator) & set(denominator))
    if not shared:
        return Found(None, f"{metric}: no turn of these lengths has it on both sides", where)
    for name, side in ((above, numerator), (below, denominator)):
        if any(sample <= 0 for key in shared for reps in side[key] for sample in reps):
            return Found(None, f"{metric} of {name} is too small to be measured", where, cells)
    if metric == "kv_mib":
        # The size of the storage does not vary: nothing is sampled.
        value = statistics.geometric_mean(
            max(map(max, numerator[key])) / max(map(max, denominator[key])) for key in shared
        )
        return Found(Interval(value, value, value), None, where, cells)
    ratio, reason = _allowed(statistics.ratio_interval(numerator, denominator), measure)
    return Found(ratio, reason, where, cells)


def _allowed(interval: Interval, measure: Mapping[str, Any]) -> tuple[Interval, str | None]:
    """Give a number without an interval the allowance that its claim states, and say so."""
    if not math.isnan(interval.low) or "allowance" not in measure:
        return interval, None
    factor = measure["allowance"]
    reason = f"measured once; a factor of {factor:g} either way stands for the interval"
    return Interval(interval.value, interval.value / factor, interval.value * factor), reason


def _ratio(tables: _Tables, machine: str, measure: Mapping[str, Any]) -> Found:
    above, below = measure["numerator"], measure["denominator"]
    place = _choose(tables, machine, measure, (above, below))
    if isinstance(place, str):
        return Found(None, place)
    return _compare(tables, place, measure, above, below)


def _fastest(tables: _Tables, machine: str, measure: Mapping[str, Any]) -> Found:
    """How many times longer the nearest rival takes; its ends are the lowest of all rivals'."""
    own = measure["strategy"]
    rivals = [name for name in measure["among"] if name != own]
    place = _choose(tables, machine, measure, (own, *rivals))
    if isinstance(place, str):
        return Found(None, place)
    compared = [_compare(tables, place, measure, rival, own) for rival in rivals]
    if any(found.interval is None for found in compared):
        return next(found for found in compared if found.interval is None)
    ratios = [found.interval for found in compared]
    lowest = Interval(*(min(getattr(r, end) for r in ratios) for end in ("value", "low", "high")))
    if any(math.isnan(ratio.low) for ratio in ratios):
        lowest = Interval(lowest.value, math.nan, math.nan)
    cells = tuple(cell for found in compared for cell in found.cells)
    return Found(lowest, None, compared[0].measured_on, cells)


def _growth(tables: _Tables, machine: str, measure: Mapping[str, Any]) -> Found:
    """Exponent ``k`` of ``metric ~ context**k`` over the turns of one scenario.

    The context is the mean number of tokens during the turn, ``prompt + (new - 1)/2``: the work of
    recomputing is proportional to it but for attention, so 1 is linear growth (against the prompt
    alone the new tokens would act as a constant and pull the exponent down). The slope is that of
    the least-squares line in log-log, one for each repeat of the conversation, and the interval
    that of these repeats.
    """
    name = measure["strategy"]
    place = _choose(tables, machine, measure, (name,))
    if isinstance(place, str):
        return Found(None, place)
    group, scenario = place
    rows = _lengths(measure, _own(tables, group, scenario, name))
    where = _where(group, scenario, rows)
    context = rows["prompt_tokens"] + (rows["new_tokens"] - 1) / 2
    lengths = context.groupby(rows["turn"]).median()
    if lengths.nunique() < 3:
        return Found(None, "a growth needs turns of at least three lengths", where)
    by_turn = _by_turn(rows, measure["metric"])
    turns = sorted(by_turn)
    x = np.log([lengths[turn] for _, turn in turns])
    slopes = []
    for replicate in range(min(len(by_turn[key]) for key in turns)):
        count = min(len(by_turn[key][replicate]) for key in turns)
        y = np.log([by_turn[key][replicate][:count] for key in turns])
        slopes.append([float(slope) for slope in np.polyfit(x, y, 1)[0]])
    interval = statistics.median_interval(slopes)
    return Found(interval, None, where, _cells(tables, group, scenario, (name,)))


def _value(tables: _Tables, machine: str, measure: Mapping[str, Any]) -> Found:
    name = measure["strategy"]
    place = _choose(tables, machine, measure, (name,))
    if isinstance(place, str):
        return Found(None, place)
    group, scenario = place
    rows = selection.rows_of(tables.summary, group, scenario)
    row = rows[rows["strategy"] == name].iloc[0]
    where = _where(group, scenario, _own(tables, group, scenario, name))
    cells = _cells(tables, group, scenario, (name,))
    found = _of_row(row, measure["column"], measure["column"] in _EXACT_COLUMNS, where, cells)
    if found.interval is None:
        return found
    interval, reason = _allowed(found.interval, measure)
    return Found(interval, reason, where, cells)


def _of_row(
    row: Mapping[str, Any], column: str, exact: bool, where: str, cells: tuple[str, ...]
) -> Found:
    """A number of a table's row with the interval in the columns beside it."""
    value = row[column]
    if value is None or pd.isna(value):
        return Found(None, f"{column} is empty", where, cells)
    value = float(value)
    stem = column.removesuffix("_median")
    ends = [row.get(f"{stem}_ci_{end}", math.nan) for end in ("low", "high")]
    if any(end is None or pd.isna(end) for end in ends):
        ends = [value, value] if exact else [math.nan, math.nan]
    return Found(Interval(value, *map(float, ends)), None, where, cells)


def _extreme(tables: _Tables, machine: str, measure: Mapping[str, Any]) -> Found:
    """The lowest or highest entry of a column over all cells that were attempted."""
    column = measure["column"]
    rows = tables.summary[tables.summary["machine"] == machine]
    if column == "tokens_match_reference":
        # The reference equals itself, which shows nothing.
        rows = rows[rows["strategy"] != "dynamic"]
    if "strategies" in measure:
        rows = rows[rows["strategy"].isin(measure["strategies"])]
    for key in _FILTERS:
        if key in measure:
            rows = rows[rows[key].isin(measure[key])]
    if "exact" in measure:
        rows = rows[rows["exact"].astype(str) == str(measure["exact"])]
    rows = rows[rows[column].notna()]
    absent = [name for name in measure.get("strategies", ()) if name not in set(rows["strategy"])]
    if absent:
        return Found(None, f"{', '.join(absent)}: not measured")
    if rows.empty:
        return Found(None, f"no cell of this kind has {column}")
    readings = rows[column].astype(float)
    row = rows.loc[readings.idxmin() if measure["pick"] == "lowest" else readings.idxmax()]
    where = f"{measure['pick']} of {len(rows)}: "
    where += f"{row['strategy']}, {row['model']}, {row['dtype']}, {row['scenario']}"
    return _of_row(row, column, column in _EXACT_COLUMNS, where, _paths(tables, row))


def _paths(tables: _Tables, row: pd.Series) -> tuple[str, ...]:
    return numbers.record_paths(tables.replicates, row.to_dict())


def _formula(_tables: _Tables, _machine: str, measure: Mapping[str, Any]) -> Found:
    value = _compute(measure)
    tokens = f"{measure['tokens']} tokens"
    if "new_tokens" in measure:
        tokens = f"{measure['tokens']} + {measure['new_tokens']} tokens"
    where = f"computed for {tokens}, {measure['bytes_per_element']:g} bytes per number"
    return Found(Interval(value, value, value), None, where)


def _compute(measure: Mapping[str, Any]) -> float:
    """Evaluate a formula of the physics module; bytes come out in GiB."""
    arch, tokens = measure["architecture"], measure["tokens"]
    element = measure["bytes_per_element"]
    if measure["quantity"] == "kv_bytes":
        return physics.kv_bytes(arch, tokens, element) / _GIB
    decoded = measure["new_tokens"] - 1
    if measure["quantity"] == "quantized_ratio":
        packed = physics.quantized_kv_bytes(
            arch, tokens, decoded, measure["bits"], "quanto", bytes_per_element=element
        )
        return physics.kv_bytes(arch, tokens + decoded, element) / packed
    uncached, cached = (
        physics.generation_flops(arch, tokens, decoded + 1, cached=flag) for flag in (False, True)
    )
    return uncached / cached


def _study(tables: _Tables, machine: str, measure: Mapping[str, Any]) -> Found:
    name = measure["study"]
    table = tables.others.get(name)
    own = None if table is None else table[table["machine"] == machine]
    if own is None or own.empty:
        return Found(None, f"study {name} was not measured")
    key = (name, machine)
    if key not in tables.values:
        good = own[own["status"] == "ok"].reset_index(drop=True)
        tables.values[key] = studies.get(name).values(good)
    named = tables.values[key]
    root = "results" if machine == HERE else f"results/recorded/{machine}"
    cells = tuple(f"{root}/cells/app/{name}/{cell}.json" for cell in own["cell"].unique())
    where = f"study {name}: {measure['value']}"
    parts = [measure["value"]] + ([measure["over"]] if "over" in measure else [])
    intervals, reason = [], None
    for part in parts:
        number = named[part].value
        if number is None or isinstance(number, str):
            return Found(None, _why_empty(own, part), where, cells)
        ends = named[part].ci or ((number, number) if measure.get("exact") else None)
        interval = Interval(float(number), *map(float, ends or (math.nan, math.nan)))
        interval, allowed = _allowed(interval, measure)
        intervals.append(interval)
        reason = allowed or reason
    if len(intervals) == 1:
        return Found(intervals[0], reason, where, cells)
    above, below = intervals
    where += f" over {measure['over']}"
    if not (below.value > 0 and (below.low > 0 or math.isnan(below.low))):
        return Found(None, f"{measure['over']} is not above zero", where, cells)
    # The ends of both intervals combined: wider than the interval of the ratio would be.
    ratio = Interval(above.value / below.value, above.low / below.high, above.high / below.low)
    if math.isnan(ratio.low) or math.isnan(ratio.high):
        ratio = Interval(ratio.value, math.nan, math.nan)
    return Found(ratio, reason, where, cells)


def _why_empty(rows: pd.DataFrame, value: str) -> str:
    """Reasons of the cells that did not run, or that the factors that ran do not give it."""
    stopped = rows[rows["status"] != "ok"]
    reasons = dict.fromkeys(
        str(row["reason"]) if pd.notna(row["reason"]) else str(row["status"])
        for _, row in stopped.iterrows()
    )
    return "; ".join(reasons) or f"the factors that were run do not give {value}"


def _table(tables: _Tables, machine: str, measure: Mapping[str, Any]) -> Found:
    name, column = measure["table"], measure["column"]
    table = tables.others.get(name)
    if table is None or "machine" not in table or not len(table):
        return Found(None, f"table {name} has no rows")
    for wanted in (column, *measure["where"]):
        _one_of(wanted, list(table.columns), f"claims.yaml: table {name}", "column")
    rows = table[(table["machine"] == machine) & table[column].notna()]
    for key, wanted in measure["where"].items():
        rows = rows[rows[key] == wanted]
    spelled = ", ".join(f"{key} {wanted}" for key, wanted in measure["where"].items())
    if rows.empty:
        return Found(None, f"table {name} has no {column} for {spelled}")
    readings = rows[column].astype(float)
    row = rows.loc[readings.idxmin() if measure["pick"] == "lowest" else readings.idxmax()]
    shown = [str(row[key]) for key in ("model", "dtype", "scenario") if key in row]
    where = ", ".join([f"{measure['pick']} of {len(rows)} rows of {name}", spelled, *shown])
    cells: tuple[str, ...] = ()
    if set(numbers.IDENTITY) <= set(rows.columns):
        cells = _paths(tables, row)
    return _of_row(row, column, measure.get("exact", False), where, cells)


@dataclass(frozen=True)
class _Kind:
    """One way to obtain the number of a claim: its keys, and the function that finds it."""

    find: Callable[[_Tables, str, Mapping[str, Any]], Found]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    per_machine: bool = True


_KINDS: Mapping[str, _Kind] = {
    "ratio": _Kind(
        _ratio,
        ("metric", "numerator", "denominator", "scenario"),
        ("prompt_tokens", "allowance", *_FILTERS),
    ),
    "fastest": _Kind(
        _fastest, ("strategy", "among", "scenario"), ("metric", "prompt_tokens", *_FILTERS)
    ),
    "growth": _Kind(_growth, ("metric", "strategy", "scenario"), ("prompt_tokens", *_FILTERS)),
    "value": _Kind(_value, ("column", "strategy", "scenario"), ("allowance", *_FILTERS)),
    "extreme": _Kind(_extreme, ("column", "pick"), ("strategies", "exact", *_FILTERS)),
    "formula": _Kind(
        _formula,
        ("quantity", "tokens", "bytes_per_element"),
        ("architecture", "of_model", "new_tokens", "bits"),
        per_machine=False,
    ),
    "study": _Kind(_study, ("study", "value"), ("over", "exact", "allowance")),
    "table": _Kind(_table, ("table", "column", "where", "pick"), ("exact",)),
}


# ---------------------------------------------------------------------------- writing


def number_text(number: float | None) -> str:
    """A number with three significant figures, without an exponent where it can be avoided."""
    if number is None:
        return "-"
    if number == 0 or 1e-3 <= abs(number) < 1e6:
        digits = 0 if number == 0 else max(0, 2 - math.floor(math.log10(abs(number))))
        text = f"{number:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{number:.3g}"


def with_unit(text: str, unit: str) -> str:
    """Append a unit: ``5.36x``, ``10 ms``."""
    return f"{text}x" if unit == "x" else f"{text} {unit}".strip()


def measured_text(row: Mapping[str, Any]) -> str:
    """The measured value with its interval: ``5.41x [5.30, 5.52]``."""
    if row["value"] is None:
        return "-"
    text = with_unit(number_text(row["value"]), row["unit"] or "")
    low, high = row["ci_low"], row["ci_high"]
    if low is None or high is None:
        return text
    return text if low == high else f"{text} [{number_text(low)}, {number_text(high)}]"


def claims_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text for the terminal: the measured interval beside the source's figure."""
    head = ("verdict", "claim", "machine", "source says", "measured [95 % interval]", "holds if")
    lines = [head]
    for row in rows:
        flag = "!" if unexpected([row]) else ""
        lines.append(
            (
                f"{row['verdict']}{flag}",
                row["id"],
                row["machine"] or "-",
                row["figure"] or "-",
                measured_text(row),
                row["bound"],
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    counts = ", ".join(f"{sum(r['verdict'] == v for r in rows)} {v}" for v in VERDICTS)
    text += ["", f"{len({row['id'] for row in rows})} claims: {counts}"]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] == NOT_TESTED:
            machine = f" on {row['machine']}" if row["machine"] else ""
            reasons.setdefault(f"{row['reason']}{machine}", []).append(row["id"])
    if reasons:
        text += ["not tested:"]
        text += [f"  {why}: {', '.join(ids)}" for why, ids in reasons.items()]
    if unexpected(rows):
        text += ["! differs from the verdict that claims.yaml expects"]
    return "\n".join(line.rstrip() for line in text) + "\n"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The claims with their statements and verdicts as a Markdown table."""

    def cell(text: object) -> str:
        return " ".join(str(text or "-").split()).replace("|", "\\|")

    lines = [
        "# Claims of the source documents",
        "",
        "The verdict compares the 95 % interval with the bound: *reproduced* when it lies wholly",
        "inside, *refuted* when wholly outside, *inconclusive* when astride, *not tested* when",
        "there is nothing to compare.",
        "",
        "| verdict | claim | source | says | machine | measured [95 % interval] | holds if | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = row["measured_on"]
        if row["reason"]:
            what = f"{what}; {row['reason']}" if what else row["reason"]
        entries = (
            f"**{row['verdict']}**",
            f"{row['statement_en']} (`{row['id']}`)",
            row["source"],
            row["figure"],
            row["machine"],
            measured_text(row),
            row["bound"],
            what,
        )
        lines.append(f"| {' | '.join(map(cell, entries))} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``claims.csv``, ``claims.json`` and ``claims.md`` into ``folder``."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["cells"] = table["cells"].map(" ".join)
    text = io.StringIO()
    table.to_csv(text, index=False, lineterminator="\n")
    documents.write_text_atomic(folder / "claims.csv", text.getvalue())
    documents.write_json(folder / "claims.json", [dict(row) for row in rows])
    documents.write_text_atomic(folder / "claims.md", markdown(rows))


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
            rows = numbers.claim_rows(table)
    if not isinstance(rows, list) or any(set(COLUMNS) - set(row) for row in rows):
        raise InputError(f"{path}: not the claims of this version; delete the file and run again")
    for row in rows:
        for column in ("machine", "measured_on", "unit"):
            row[column] = row[column] or ""
        if not isinstance(row["cells"], list):
            row["cells"] = (row["cells"] or "").split()
    return rows
