"""The kinds of measure: one class each, with the keys it takes and how it finds its number.

To add one, write a class with ``name``, ``required``, ``optional`` and ``find``, and name it in
:data:`KINDS` and in the ``kind`` of ``workflow/schemas/claims.schema.json``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from kvbench import documents, physics, strategies, studies
from kvbench.analysis import metrics, selection, statistics
from kvbench.analysis.claims.measured import (
    EXACT_COLUMNS,
    FILTERS,
    METRICS,
    NO_INTERVAL,
    Found,
    Tables,
    cells_of,
    choose,
    compare,
    of_lengths,
    of_row,
    samples_of,
    where,
)
from kvbench.analysis.metrics import Evidence
from kvbench.analysis.statistics import Interval
from kvbench.analysis.tables import APP_COLUMNS, SUMMARY_COLUMNS
from kvbench.errors import InputError, one_of
from kvbench.records.identity import IDENTITY, record_paths, study_paths

_GIB = 2**30


class Kind(ABC):
    """One way to obtain the number of a claim."""

    name: ClassVar[str]
    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    #: False for arithmetic, which needs no machine.
    per_machine: ClassVar[bool] = True

    def check(self, measure: Mapping[str, Any], spot: str, folder: Path) -> dict[str, Any]:
        """Check what only this kind knows; return the measure, filled.

        Raises
        ------
        InputError
            A name that the kind does not know.
        """
        return dict(measure)

    @abstractmethod
    def find(self, tables: Tables, machine: str, measure: Mapping[str, Any]) -> Found:
        """What the tables say on one machine."""


class Ratio(Kind):
    """One strategy over another, paired by turn and by round; memory and bytes by turn."""

    name = "ratio"
    required = ("metric", "numerator", "denominator", "scenario")
    optional = ("prompt_tokens", *FILTERS)

    def check(self, measure: Mapping[str, Any], spot: str, folder: Path) -> dict[str, Any]:
        """Refuse names that this kind does not know."""
        if measure["numerator"] == measure["denominator"]:
            raise InputError(
                f"{spot}: numerator and denominator are both {measure['numerator']!r}, whose ratio is "
                "1 whatever is measured; name two strategies"
            )
        return dict(measure)

    def find(self, tables: Tables, machine: str, measure: Mapping[str, Any]) -> Found:
        """Find the number on one machine."""
        above, below = measure["numerator"], measure["denominator"]
        place = choose(tables, machine, measure, (above, below))
        if isinstance(place, str):
            return Found(None, place)
        return compare(tables, place, measure, above, below)


class Fastest(Kind):
    """How many times longer the nearest rival takes; its ends are the lowest of all rivals'."""

    name = "fastest"
    required = ("strategy", "among", "scenario")
    optional = ("metric", "prompt_tokens", *FILTERS)

    def check(self, measure: Mapping[str, Any], spot: str, folder: Path) -> dict[str, Any]:
        """Refuse a strategy without a rival."""
        if set(measure["among"]) <= {measure["strategy"]}:
            raise InputError(
                f"{spot}: among names {measure['strategy']!r} alone, which is compared with itself; "
                "name its rivals"
            )
        return dict(measure)

    def find(self, tables: Tables, machine: str, measure: Mapping[str, Any]) -> Found:
        """Find the number on one machine."""
        strategy = measure["strategy"]
        rivals = [name for name in measure["among"] if name != strategy]
        place = choose(tables, machine, measure, (strategy, *rivals))
        if isinstance(place, str):
            return Found(None, place)
        compared = [compare(tables, place, measure, rival, strategy) for rival in rivals]
        if any(found.interval is None for found in compared):
            return next(found for found in compared if found.interval is None)
        ratios = [found.interval for found in compared]
        value, low, high = (min(getattr(r, end) for r in ratios) for end in _ENDS)
        if any(math.isnan(ratio.low) for ratio in ratios):
            low = high = math.nan
        return Found(
            Interval(value, low, high),
            None,
            compared[0].measured_on,
            tuple(cell for found in compared for cell in found.cells),
            min((found.rounds for found in compared if found.rounds is not None), default=None),
            min((found.blocks for found in compared if found.blocks is not None), default=None),
            max(found.smallest_difference for found in compared),
            next((found.why_not for found in compared if found.why_not), None),
        )


_ENDS = ("value", "low", "high")


class Growth(Kind):
    """Exponent ``k`` of ``metric ~ context**k`` over the turns of one scenario.

    The context is the mean number of tokens during the turn, ``prompt + (new - 1)/2``: the work of
    recomputing is proportional to it but for attention, so 1 is linear growth (against the prompt
    alone the new tokens would act as a constant and pull the exponent down). The slope is that of
    the least-squares line in log-log, one for each repeat of the conversation, and the interval that
    of these repeats.
    """

    name = "growth"
    required = ("metric", "strategy", "scenario")
    optional = ("prompt_tokens", *FILTERS)

    def find(self, tables: Tables, machine: str, measure: Mapping[str, Any]) -> Found:
        """Find the number on one machine."""
        name = measure["strategy"]
        place = choose(tables, machine, measure, (name,))
        if isinstance(place, str):
            return Found(None, place)
        group, scenario = place
        rows = of_lengths(measure, samples_of(tables, group, scenario, name))
        spot = where(group, scenario, rows)
        context = rows["prompt_tokens"] + (rows["new_tokens"] - 1) / 2
        lengths = context.groupby(rows["turn"]).median()
        if lengths.nunique() < 3:
            return Found(None, "a growth needs turns of at least three lengths", spot)
        slopes = []
        kept = metrics.counted(rows)
        for _, part in kept[kept[measure["metric"]].notna()].groupby("replicate", sort=True):
            table = part.pivot_table(index="turn", columns="iteration", values=measure["metric"])
            table = table.dropna(axis=1)
            x = np.log(lengths.loc[table.index])
            slopes.append([float(one) for one in np.polyfit(x, np.log(table), 1)[0]])
        repeats = sum(map(len, slopes))
        needed = tables.evidence.get(machine, Evidence())
        return Found(
            statistics.median_interval(slopes),
            None,
            spot,
            cells_of(tables, group, scenario, (name,)),
            repeats,
            why_not=metrics.why_not_judged(repeats, needed.blocks, needed),
        )


class Value(Kind):
    """A column of ``kv_summary``."""

    name = "value"
    required = ("column", "strategy", "scenario")
    optional = FILTERS

    def check(self, measure: Mapping[str, Any], spot: str, folder: Path) -> dict[str, Any]:
        """Refuse names that this kind does not know."""
        one_of("column", measure["column"], SUMMARY_COLUMNS, f"{spot}.column")
        return dict(measure)

    def find(self, tables: Tables, machine: str, measure: Mapping[str, Any]) -> Found:
        """Find the number on one machine."""
        name, column = measure["strategy"], measure["column"]
        place = choose(tables, machine, measure, (name,))
        if isinstance(place, str):
            return Found(None, place)
        group, scenario = place
        rows = selection.rows_of(tables.summary, group, scenario)
        row = rows[rows["strategy"] == name].iloc[0]
        spot = where(group, scenario, samples_of(tables, group, scenario, name))
        cells = cells_of(tables, group, scenario, (name,))
        return of_row(row, column, column in EXACT_COLUMNS, spot, cells)


class Extreme(Kind):
    """The lowest or highest entry of a column of ``kv_summary`` over all cells attempted."""

    name = "extreme"
    required = ("column", "pick")
    optional = ("strategies", "exact", *FILTERS)

    def check(self, measure: Mapping[str, Any], spot: str, folder: Path) -> dict[str, Any]:
        """Refuse names that this kind does not know."""
        one_of("column", measure["column"], SUMMARY_COLUMNS, f"{spot}.column")
        return dict(measure)

    def find(self, tables: Tables, machine: str, measure: Mapping[str, Any]) -> Found:
        """Find the number on one machine."""
        column = measure["column"]
        rows = tables.summary[tables.summary["machine"] == machine]
        if column == "tokens_match_reference":
            # The reference equals itself, which shows nothing.
            rows = rows[rows["strategy"] != strategies.REFERENCE]
        if "strategies" in measure:
            rows = rows[rows["strategy"].isin(measure["strategies"])]
        for key in FILTERS:
            if key in measure:
                rows = rows[rows[key].isin(measure[key])]
        if "exact" in measure:
            rows = rows[rows["exact"].astype(str) == str(measure["exact"])]
        rows = rows[rows[column].notna()]
        absent = [
            name for name in measure.get("strategies", ()) if name not in set(rows["strategy"])
        ]
        if absent:
            return Found(None, f"{', '.join(absent)}: not measured")
        if rows.empty:
            return Found(None, f"no cell of this kind has {column}")
        row = _picked(rows, column, measure["pick"])
        spot = f"{measure['pick']} of {len(rows)}: "
        spot += f"{row['strategy']}, {row['model']}, {row['dtype']}, {row['scenario']}"
        paths = record_paths(tables.replicates, row.to_dict())
        return of_row(row, column, column in EXACT_COLUMNS, spot, paths)


def _picked(rows: pd.DataFrame, column: str, pick: str) -> pd.Series:
    readings = rows[column].astype(float)
    return rows.loc[readings.idxmin() if pick == "lowest" else readings.idxmax()]


class Formula(Kind):
    """Arithmetic of the physics module, from sizes alone."""

    name = "formula"
    required = ("quantity", "tokens", "bytes_per_element")
    optional = ("architecture", "of_model", "new_tokens", "bits")
    per_machine = False

    def check(self, measure: Mapping[str, Any], spot: str, folder: Path) -> dict[str, Any]:
        """Refuse names that this kind does not know."""
        filled = dict(measure)
        filled["architecture"] = _architecture(measure, spot, folder)
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

    def find(self, tables: Tables, machine: str, measure: Mapping[str, Any]) -> Found:
        """Find the number on one machine."""
        value = _compute(measure)
        tokens = f"{measure['tokens']} tokens"
        if "new_tokens" in measure:
            tokens = f"{measure['tokens']} + {measure['new_tokens']} tokens"
        spot = f"computed for {tokens}, {measure['bytes_per_element']:g} bytes per number"
        return Found(Interval(value, value, value), None, spot)


def _architecture(measure: Mapping[str, Any], spot: str, folder: Path) -> physics.Architecture:
    if ("architecture" in measure) == ("of_model" in measure):
        raise InputError(f"{spot}: give either architecture or of_model")
    if "architecture" in measure:
        return physics.Architecture.from_config(measure["architecture"], f"{spot}.architecture")
    name = measure["of_model"]
    known = sorted(file.stem for file in (folder / "models").glob("*.yaml"))
    one_of("model", name, known, f"{spot}.of_model")
    model = documents.read_yaml(folder / "models" / f"{name}.yaml")
    if "architecture" not in model:
        raise InputError(f"{spot}.of_model: {name} states no architecture; give one here")
    return physics.Architecture.from_config(model["architecture"], f"models/{name}.yaml")


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


class Study(Kind):
    """A value that a study of the application caches names, or the ratio of two."""

    name = "study"
    required = ("study", "value")
    optional = ("over", "exact")

    def check(self, measure: Mapping[str, Any], spot: str, folder: Path) -> dict[str, Any]:
        """Refuse names that this kind does not know."""
        one_of("study", measure["study"], studies.names(), f"{spot}.study")
        named = value_names(measure["study"])
        for key in ("value", "over"):
            if key in measure:
                one_of(f"value of {measure['study']}", measure[key], named, f"{spot}.{key}")
        if measure.get("over") == measure["value"]:
            raise InputError(
                f"{spot}: value and over are both {measure['value']!r}, whose ratio is 1 whatever is "
                "measured; name two values"
            )
        return dict(measure)

    def find(self, tables: Tables, machine: str, measure: Mapping[str, Any]) -> Found:
        """Find the number on one machine."""
        name = measure["study"]
        table = tables.others.get(name)
        rows = None if table is None else table[table["machine"] == machine]
        if rows is None or rows.empty:
            return Found(None, f"study {name} was not measured")
        key = (name, machine)
        if key not in tables.values:
            good = rows[rows["status"] == "ok"].reset_index(drop=True)
            tables.values[key] = studies.get(name).values(good)
        named = tables.values[key]
        cells = study_paths(machine, name, rows["cell"].unique())
        spot = f"study {name}: {measure['value']}"
        parts = [measure["value"], *([measure["over"]] if "over" in measure else [])]
        intervals = []
        for part in parts:
            number = named[part].value
            if number is None or isinstance(number, str):
                return Found(None, _why_empty(rows, part), spot, cells)
            ends = named[part].ci or ((number, number) if measure.get("exact") else None)
            intervals.append(Interval(float(number), *map(float, ends or (math.nan, math.nan))))
        if len(intervals) == 1:
            told = named[measure["value"]]
            return Found(
                intervals[0],
                None,
                spot,
                cells,
                told.rounds,
                smallest_difference=told.smallest_difference or math.nan,
                why_not=told.not_judged or _unknown(intervals[0]),
            )
        above, below = intervals
        spot += f" over {measure['over']}"
        if not (below.value > 0 and (below.low > 0 or math.isnan(below.low))):
            return Found(None, f"{measure['over']} is not above zero", spot, cells)
        # The ends of both intervals combined: wider than the interval of the ratio would be.
        low, high = above.low / below.high, above.high / below.low
        if math.isnan(low) or math.isnan(high):
            low = high = math.nan
        ratio = Interval(above.value / below.value, low, high)
        told = next((named[part].not_judged for part in parts if named[part].not_judged), None)
        return Found(ratio, None, spot, cells, why_not=told or _unknown(ratio))


def _unknown(interval: Interval) -> str | None:
    return NO_INTERVAL if math.isnan(interval.low) else None


@cache
def value_names(study: str) -> list[str]:
    """Names of the values that a study can give, found by asking it about an empty table."""
    found = studies.get(study)
    return list(found.values(pd.DataFrame(columns=[*APP_COLUMNS, *found.columns])))


def _why_empty(rows: pd.DataFrame, value: str) -> str:
    """Reasons of the cells that did not run, or that the factors that ran do not give it."""
    stopped = rows[rows["status"] != "ok"]
    reasons = dict.fromkeys(
        str(row["reason"]) if pd.notna(row["reason"]) else str(row["status"])
        for _, row in stopped.iterrows()
    )
    return "; ".join(reasons) or f"the factors that were run do not give {value}"


class Table(Kind):
    """An entry of another table."""

    name = "table"
    required = ("table", "column", "where", "pick")
    optional = ("exact",)

    def find(self, tables: Tables, machine: str, measure: Mapping[str, Any]) -> Found:
        """Find the number on one machine."""
        name, column = measure["table"], measure["column"]
        table = tables.others.get(name)
        if table is None or "machine" not in table or not len(table):
            return Found(None, f"table {name} has no rows")
        for wanted in (column, *measure["where"]):
            one_of("column", wanted, list(table.columns), f"claims.yaml: table {name}")
        rows = table[(table["machine"] == machine) & table[column].notna()]
        for key, wanted in measure["where"].items():
            rows = rows[rows[key] == wanted]
        spelled = ", ".join(f"{key} {wanted}" for key, wanted in measure["where"].items())
        if rows.empty:
            return Found(None, f"table {name} has no {column} for {spelled}")
        row = _picked(rows, column, measure["pick"])
        shown = [str(row[key]) for key in ("model", "dtype", "scenario") if key in row]
        spot = ", ".join([f"{measure['pick']} of {len(rows)} rows of {name}", spelled, *shown])
        cells: tuple[str, ...] = ()
        if set(IDENTITY) <= set(rows.columns):
            cells = record_paths(tables.replicates, row.to_dict())
        return of_row(row, column, measure.get("exact", False), spot, cells)


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (Ratio(), Fastest(), Growth(), Value(), Extreme(), Formula(), Study(), Table())
}


def checked(
    measure: Mapping[str, Any], known: Mapping[str, Sequence[str]], spot: str, folder: Path
) -> dict[str, Any]:
    """Check the keys of a measure and every name in it; return it, filled.

    Parameters
    ----------
    known:
        ``scenario`` and ``model`` to the names that a measure may use.
    spot:
        File and claim, for messages.
    folder:
        The configuration folder, in which the models are.

    Raises
    ------
    InputError
        A key is missing or foreign, or a name unknown.
    """
    kind = KINDS[measure["kind"]]
    keys = set(measure) - {"kind"}
    if missing := [key for key in kind.required if key not in keys]:
        raise InputError(f"{spot}: kind {kind.name} needs {', '.join(missing)}")
    if foreign := sorted(keys - {*kind.required, *kind.optional}):
        raise InputError(
            f"{spot}: kind {kind.name} has no key {', '.join(foreign)}; it takes "
            f"{', '.join((*kind.required, *kind.optional))}"
        )
    for key in ("numerator", "denominator", "strategy"):
        if key in measure:
            _check_strategy(measure[key], f"{spot}.{key}")
    for key in ("among", "strategies"):
        for name in measure.get(key, ()):
            _check_strategy(name, f"{spot}.{key}")
    if "metric" in measure:
        one_of("metric", measure["metric"], METRICS, f"{spot}.metric")
    if "scenario" in measure:
        one_of("scenario", measure["scenario"], known["scenario"], f"{spot}.scenario")
    for name in measure.get("model", ()):
        one_of("model", name, known["model"], f"{spot}.model")
    return kind.check(measure, spot, folder)


def _check_strategy(name: str, where: str) -> None:
    """Refuse what is no strategy's id: the tables know one name for the same options."""
    (strategy,) = strategies.variants(name, where)
    if strategy.id != name:
        raise InputError(f"{where}: tables call {name!r} {strategy.id!r}; write that")
