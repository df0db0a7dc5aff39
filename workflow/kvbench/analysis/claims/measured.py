"""What the tables say about a claim: which cells are compared, and the number they give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from kvbench.analysis import metrics, selection, statistics
from kvbench.analysis.metrics import Comparison, Evidence
from kvbench.analysis.selection import HEADLINE_SCENARIO, SWEEP_SCENARIO, Group
from kvbench.analysis.statistics import Interval
from kvbench.records.identity import IDENTITY, record_paths, replicates_of

#: Columns of ``kv_samples`` that two strategies can be compared in.
METRICS = ("e2e_s", "ttft_s", "tpot_s", "output_tokens_per_s", "peak_memory_mib", "kv_mib")
#: Measured once per turn and process, in a pass of their own that no drift reaches.
ONCE_PER_TURN = ("peak_memory_mib", "kv_mib")
#: Counts, shares of counts and sizes of the cache's own storage: they have no sampling error.
EXACT_COLUMNS = (
    "success_rate",
    "kv_mib",
    "kv_mib_predicted",
    "tokens_match_reference",
    "turns",
)
SCENARIO_WORDS = ("headline", "sweep", "conversation")
FILTERS = ("model", "device", "dtype")
#: Why a number without an interval is not judged.
NO_INTERVAL = "one run, or too few to show their spread"
#: Columns of the summary that stand for a comparison of times, to the end of the names of those that
#: say what it rests on.
SPEEDUPS = {"speedup_vs_none": "_vs_none", "speedup_vs_dynamic": ""}


@dataclass(frozen=True)
class Found:
    """What the tables say about a claim on one machine; ``interval`` is None if nothing."""

    interval: Interval | None
    reason: str | None = None
    measured_on: str = ""
    cells: tuple[str, ...] = ()
    #: Rounds and blocks behind it, and what they could have seen, where times are compared.
    rounds: int | None = None
    blocks: int | None = None
    smallest_difference: float = math.nan
    #: Why no verdict may rest on it, if so.
    why_not: str | None = None


@dataclass(frozen=True)
class Tables:
    """The tables that claims are held against, with what many claims ask of them."""

    samples: pd.DataFrame
    summary: pd.DataFrame
    others: Mapping[str, pd.DataFrame]
    evidence: Mapping[str, Evidence]
    replicates: Mapping[tuple[str, ...], list[int]]
    #: Identity of a cell to the positions of its samples, so that no claim searches all of them.
    positions: Mapping[tuple[str, ...], np.ndarray]
    #: (study, machine) to its named values; studies compute all of them at once.
    values: dict[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    #: What :func:`choose` answered; many claims ask about the same cells.
    chosen: dict[tuple, tuple[Group, str] | str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        samples: pd.DataFrame,
        summary: pd.DataFrame,
        others: Mapping[str, pd.DataFrame],
        evidence: Mapping[str, Evidence] | None = None,
    ) -> Tables:
        """Index the tables ``kv_samples``, ``kv_summary`` and those of the studies.

        Claims are about one request: rows of batches are left out.
        """
        samples, summary = selection.single(samples), selection.single(summary)
        return cls(
            samples,
            summary,
            others,
            evidence or {},
            replicates_of(samples),
            samples.groupby(list(IDENTITY), sort=False).indices,
        )


def choose(
    tables: Tables, machine: str, measure: Mapping[str, Any], needed: Sequence[str]
) -> tuple[Group, str] | str:
    """Group and scenario in which all ``needed`` strategies were timed, or why there is none."""
    filters = tuple(tuple(measure.get(key, ())) for key in FILTERS)
    asked = (machine, measure["scenario"], filters, tuple(needed))
    if asked not in tables.chosen:
        tables.chosen[asked] = _search(tables, machine, measure, needed)
    return tables.chosen[asked]


def _search(
    tables: Tables, machine: str, measure: Mapping[str, Any], needed: Sequence[str]
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
    for key in FILTERS:
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
        cell_rows = rows[rows["strategy"] == strategy]
        if cell_rows.empty:
            told.append(f"{strategy} was not measured in {scenario}")
            continue
        row = cell_rows.iloc[0]
        why = f" ({row['reason']})" if pd.notna(row["reason"]) else ""
        told.append(f"{strategy}: {str(row['status']).replace('_', ' ')}{why}")
    return "; ".join(told) or (f"{' and '.join(needed)} were not measured together in {scenario}")


def samples_of(tables: Tables, group: Group, scenario: str, strategy: str) -> pd.DataFrame:
    """Samples of one cell, of those replicates only that finished all its turns."""
    found = tables.positions.get((*group, scenario, strategy))
    rows = tables.samples.iloc[[] if found is None else found]
    if rows.empty:
        return rows
    turns = rows.groupby("replicate")["turn"].transform("nunique")
    return rows[turns == turns.max()]


def of_lengths(measure: Mapping[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the prompt lengths that a claim is about."""
    wanted = measure.get("prompt_tokens")
    lengths = rows["prompt_tokens"]
    if wanted == "longest":
        return rows[lengths == lengths.max()]
    if wanted == "shortest":
        return rows[lengths == lengths.min()]
    if wanted:
        return rows[lengths.between(wanted.get("at_least", 1), wanted.get("at_most", math.inf))]
    return rows


def once_per_turn(rows: pd.DataFrame, metric: str) -> dict[tuple[str, int], list[list[float]]]:
    """(scenario, turn) to replicates of one number each, for what is measured once a process."""
    rows = rows[rows[metric].notna()].drop_duplicates(["scenario", "turn", "replicate"])
    found: dict[tuple[str, int], list[list[float]]] = {}
    for scenario, turn, number in rows[["scenario", "turn", metric]].itertuples(index=False):
        found.setdefault((scenario, int(turn)), []).append([float(number)])
    return found


def where(group: Group, scenario: str, rows: pd.DataFrame) -> str:
    """One line that names what was compared: model, precision, device, scenario, lengths."""
    prompt, new = (sorted({int(n) for n in rows[c]}) for c in ("prompt_tokens", "new_tokens"))

    def span(numbers: Sequence[int]) -> str:
        return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    tokens = f" ({span(prompt)} + {span(new)} tokens)" if prompt and new else ""
    return f"{group.model}, {group.dtype} on {group.device}, {scenario}{tokens}"


def cells_of(tables: Tables, group: Group, scenario: str, names: Iterable[str]) -> tuple[str, ...]:
    """Records of some strategies in one group and scenario."""
    found: list[str] = []
    for name in names:
        row = {**group._asdict(), "scenario": scenario, "strategy": name}
        found += record_paths(tables.replicates, row)
    return tuple(found)


def compare(
    tables: Tables, place: tuple[Group, str], measure: Mapping[str, Any], above: str, below: str
) -> Found:
    """Ratio of one strategy over another in one group and scenario."""
    metric = measure.get("metric", "e2e_s")
    group, scenario = place
    sides = [
        of_lengths(measure, samples_of(tables, group, scenario, name)) for name in (above, below)
    ]
    spot = where(group, scenario, pd.concat(sides))
    cells = cells_of(tables, group, scenario, (above, below))
    known = [side[side[metric].notna()] for side in sides]
    if not set(known[0]["turn"]) & set(known[1]["turn"]):
        return Found(None, f"{metric}: no turn of these lengths has it on both sides", spot)
    for name, side in zip((above, below), known, strict=True):
        if not (side[metric] > 0).all():
            return Found(None, f"{metric} of {name} is too small to be measured", spot, cells)
    if metric in ONCE_PER_TURN:
        return Found(_ratio_of_sizes(metric, known), None, spot, cells)
    found = metrics.compare_rows(pd.concat(known), above, below, metric)
    return _judgeable(found, tables, place, (above, below), spot, cells)


def _ratio_of_sizes(metric: str, sides: Sequence[pd.DataFrame]) -> Interval:
    """Ratio of memory: of the storage, which does not vary, or of peaks of several processes."""
    numerator, denominator = (once_per_turn(side, metric) for side in sides)
    shared = sorted(set(numerator) & set(denominator))
    if metric == "kv_mib":
        value = statistics.geometric_mean(
            max(map(max, numerator[key])) / max(map(max, denominator[key])) for key in shared
        )
        return Interval(value, value, value)
    return statistics.ratio_interval(numerator, denominator)


def _judgeable(
    found: Comparison,
    tables: Tables,
    place: tuple[Group, str],
    names: Sequence[str],
    spot: str,
    cells: tuple[str, ...],
) -> Found:
    """A comparison of times with what it rests on, and why it may not be judged, if so."""
    needed = tables.evidence.get(place[0].machine, Evidence())
    why_not = found.reason or metrics.why_not_judged(found.rounds, found.blocks, needed)
    if why_not is None:
        rows = selection.rows_of(tables.summary, *place)
        why_not = next(filter(None, (control_is_off(rows, name) for name in names)), None)
    return Found(
        found.interval,
        None,
        spot,
        cells,
        found.rounds,
        found.blocks,
        found.smallest_difference,
        why_not,
    )


def control_is_off(rows: pd.DataFrame, strategy: str) -> str | None:
    """Why a strategy's blocks are not judged because of their control; None when they may be."""
    told = rows.loc[rows["strategy"] == strategy].get("not_judged")
    told = [] if told is None else [str(one) for one in told.dropna()]
    return next((one for one in told if one.startswith(metrics.CONTROL_OFF)), None)


def of_row(
    row: Mapping[str, Any], column: str, exact: bool, spot: str, cells: tuple[str, ...]
) -> Found:
    """A number of a table's row with the interval in the columns beside it."""
    value = row[column]
    if value is None or pd.isna(value):
        return Found(None, f"{column} is empty", spot, cells)
    value = float(value)
    stem = column.removesuffix("_median")
    ends = [row.get(f"{stem}_ci_{end}", math.nan) for end in ("low", "high")]
    if any(end is None or pd.isna(end) for end in ends):
        ends = [value, value] if exact else [math.nan, math.nan]
    interval = Interval(value, *map(float, ends))
    if column not in SPEEDUPS:
        why_not = NO_INTERVAL if math.isnan(interval.low) else None
        return Found(interval, None, spot, cells, why_not=why_not)
    end = SPEEDUPS[column]
    told, rounds = row.get(f"not_judged{end}"), row.get(f"rounds{end}")
    return Found(
        interval,
        None,
        spot,
        cells,
        int(rounds) if pd.notna(rounds) else 0,
        int(row["blocks"]) if pd.notna(row.get("blocks")) else 0,
        float(row.get(f"smallest_difference{end}", math.nan)),
        str(told) if told is not None and pd.notna(told) else None,
    )
