"""Which machine, model, device, number format and scenario stand for a result: one rule each.

Figures, claims and prose ask here and nowhere else, so that a table and the sentence above it cannot
speak of two different cells. :class:`Choice` is all of it for one machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from kvbench.layout import DEFAULT_DTYPE, batch_of
from kvbench.records.identity import HERE
from kvbench.strategies import without_reuse
from kvbench.strategies.looks import in_order as in_order

#: The cell the source document published: 152 prompt tokens, 150 new ones, one turn.
HEADLINE_SCENARIO = "symposium_turn"

#: The fixed scenario that sweeps the prompt length; a median over it means nothing.
SWEEP_SCENARIO = "context_growth"


#: Models nearest to the published cell come first; the rest follow by coverage, then by name.
MODEL_ORDER = ("llama-3.2-1b", "llama-3.2-1b-geometry")

#: Speed-up of ``kv_summary`` to the column that says why no verdict may rest on it.
NOT_JUDGED = {"speedup_vs_none": "not_judged_vs_none", "speedup_vs_dynamic": "not_judged"}

#: Statuses of rows that carry numbers; ``mixed`` when some replicates ended otherwise.
TIMED = ("ok", "mixed")


class Group(NamedTuple):
    """Rows that may be compared with each other: one model in one precision on one device."""

    machine: str
    model: str
    device: str
    dtype: str


def machines(table: pd.DataFrame) -> list[str]:
    """Machines in the table: this one first, then the recorded ones by name."""
    found = sorted(str(name) for name in table["machine"].dropna().unique())
    return [name for name in found if name == HERE] + [name for name in found if name != HERE]


def one_machine(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of this run; those of the machine that the table names first where this run has none.

    Tables of studies name the machine first that was measured last.

    Times of different machines do not belong on one axis without saying so. Filter a table first:
    a machine that has no row left does not stand for those that have.
    """
    if "machine" not in table or table.empty:
        return table
    named = table["machine"]
    first = HERE if (named == HERE).any() else named.dropna().iloc[0]
    return table[named == first]


def single(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of cells that generated for one request; only what is about batches looks at the others."""
    if "scenario" not in table or table.empty:
        return table
    known = {
        name: batch_of(name)[1] == 1 for name in table["scenario"].dropna().astype(str).unique()
    }
    keep = table["scenario"].astype(str).map(known)
    return table if all(known.values()) else table[keep.fillna(True).astype(bool)]


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of a summary that carry a time."""
    return table[table["status"].isin(TIMED) & table["e2e_s_median"].notna()]


def rows_of(table: pd.DataFrame, group: Group, scenario: str | None = None) -> pd.DataFrame:
    """Rows of one group, and of one scenario when it is given."""
    keep = pd.Series(True, index=table.index)
    for column, wanted in zip(Group._fields, group, strict=True):
        keep &= table[column] == wanted
    if scenario is not None:
        keep &= table["scenario"] == scenario
    return table[keep]


def groups(table: pd.DataFrame, machine: str) -> list[Group]:
    """All groups of a machine, sorted by name."""
    rows = table.loc[table["machine"] == machine, list(Group._fields)].drop_duplicates()
    return sorted(Group(*map(str, row)) for row in rows.itertuples(index=False))


def nearest_to_published(
    summary: pd.DataFrame, machine: str, scenario: str = HEADLINE_SCENARIO
) -> Group | None:
    """The group of a machine to set beside the source document in one scenario.

    A group that timed both ``none`` and ``dynamic`` goes before one that did not, then the model
    nearest to Llama-3.2-1B, then the precision the device is timed in, then the number of
    strategies. None when the scenario was not planned on this machine.
    """
    candidates = [g for g in groups(summary, machine) if len(rows_of(summary, g, scenario))]

    def rank(group: Group) -> tuple:
        timed = set(measured(rows_of(summary, group, scenario))["strategy"])
        model = MODEL_ORDER.index(group.model) if group.model in MODEL_ORDER else len(MODEL_ORDER)
        return (
            not {"none", "dynamic"} <= timed,
            model,
            group.dtype != DEFAULT_DTYPE.get(group.device),
            -len(timed),
            group,
        )

    return min(candidates, key=rank, default=None)


def widest(
    summary: pd.DataFrame,
    machine: str,
    *,
    model: str | None = None,
    scenario: str | None = None,
    turns_at_least: int = 1,
) -> tuple[Group, str] | None:
    """The group and scenario of a machine that timed the most strategies.

    Ties go to the headline scenario, then to the longer conversation, the precision the device is
    timed in and the name. The sweep of the context counts only when asked for by name, since a
    median over its lengths means nothing. ``model`` and ``scenario`` narrow the choice. None when
    nothing was measured.
    """
    rows = measured(summary[summary["machine"] == machine])
    rows = rows[rows["turns"].fillna(1) >= turns_at_least]
    if model is not None:
        rows = rows[rows["model"] == model]
    rows = rows[rows["scenario"] == scenario if scenario else rows["scenario"] != SWEEP_SCENARIO]
    best = None
    for key, part in rows.groupby([*Group._fields, "scenario"], sort=True):
        group, name = Group(*map(str, key[:4])), str(key[4])
        rank = (
            -part["strategy"].nunique(),
            name != HEADLINE_SCENARIO,
            -float(part["turns"].fillna(1).max()),
            group.dtype != DEFAULT_DTYPE.get(group.device),
            group,
            name,
        )
        if best is None or rank < best[0]:
            best = rank, group, name
    return None if best is None else (best[1], best[2])


def broadest(
    summary: pd.DataFrame, machine: str, column: str, *, model: str | None = None
) -> Group | None:
    """The group of a machine with the most rows that have a number in ``column``."""
    rows = measured(summary[(summary["machine"] == machine) & summary[column].notna()])
    if model is not None:
        rows = rows[rows["model"] == model]
    sizes = rows.groupby(list(Group._fields), sort=True).size()
    ranked = sorted(
        (-int(size), key[3] != DEFAULT_DTYPE.get(key[2]), Group(*map(str, key)))
        for key, size in sizes.items()
    )
    return ranked[0][2] if ranked else None


def reusing(summary: pd.DataFrame, samples: pd.DataFrame, machine: str) -> tuple[Group, str] | None:
    """The conversation of a machine in which most strategies that keep their cache were timed.

    Ties go to the longest. Scenarios of independent requests have nothing to reuse and do not count.
    """
    rows = measured(summary[summary["machine"] == machine])
    rows = rows[
        rows["strategy"].map(lambda name: without_reuse(str(name)) is not None).astype(bool)
    ]
    reused = samples[samples["reused_tokens"] > 0]
    best = None
    for key, part in rows.groupby([*Group._fields, "scenario"], sort=True):
        found = Group(*map(str, key[:4])), str(key[4])
        rank = (part["strategy"].nunique(), float(part["turns"].fillna(1).max()))
        if len(rows_of(reused, *found)) and (best is None or rank > best[0]):
            best = (rank, found)
    return best and best[1]


def scored(quality: pd.DataFrame, machine: str) -> tuple[Group, str] | None:
    """The cell group and scenario of a machine in which the quality of most strategies was scored.

    Ties go to the number format the device is timed in, then to the name.
    """
    rows = quality[(quality["machine"] == machine) & quality["kl_nats"].notna()]
    ranked = sorted(
        (
            -part["strategy"].nunique(),
            key[3] != DEFAULT_DTYPE.get(key[2]),
            Group(*map(str, key[:4])),
            str(key[4]),
        )
        for key, part in rows.groupby([*Group._fields, "scenario"], sort=True)
    )
    return ranked[0][2:] if ranked else None


@dataclass(frozen=True)
class Choice:
    """The cells that stand for one machine; each is None where nothing fits."""

    machine: str
    #: Beside the source document: the published cell.
    headline: Group | None
    #: With the most strategies; and the same among conversations of two turns or more.
    widest: tuple[Group, str] | None
    conversation: tuple[Group, str] | None
    #: Of the strategies that keep their cache across turns.
    reuse: tuple[Group, str] | None
    #: Of the quality of lossy caches.
    quality: tuple[Group, str] | None


def choices(
    summary: pd.DataFrame, samples: pd.DataFrame, quality: pd.DataFrame | None = None
) -> dict[str, Choice]:
    """Machine to its choice, this machine first; made once, handed on to whoever tells a result."""
    named = [table["machine"] for table in (summary, quality) if table is not None]
    everyone = pd.DataFrame({"machine": pd.concat(named, ignore_index=True)})
    return {
        machine: Choice(
            machine,
            nearest_to_published(summary, machine),
            widest(summary, machine),
            widest(summary, machine, turns_at_least=2),
            reusing(summary, samples, machine),
            None if quality is None else scored(quality, machine),
        )
        for machine in machines(everyone)
    }


def first(found: Iterable[tuple[Group, str] | None]) -> tuple[Group, str] | None:
    """The first machine's cells that there are: this machine's, or else a recorded one's."""
    return next((one for one in found if one is not None), None)
