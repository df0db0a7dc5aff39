"""Which rows of the KV tables stand for a machine in figures, tables and prose: one rule each."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from kvbench.strategies.looks import in_order as in_order

#: The cell the source document published: 152 prompt tokens, 150 new ones, one turn.
HEADLINE_SCENARIO = "symposium_turn"

#: The fixed scenario that sweeps the prompt length; a median over it means nothing.
SWEEP_SCENARIO = "context_growth"

#: The machine name of the records measured by this run; all others were recorded before.
HERE = "here"

#: Models nearest to the published cell come first; the rest follow by coverage, then by name.
MODEL_ORDER = ("llama-3.2-1b", "llama-3.2-1b-geometry")

#: The precision a device is timed in, as in ``configuration.DEFAULT_DTYPE`` (which is not imported,
#: so that drawing needs no torch); another one on the same device is the exactness pass.
TIMED_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


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
            group.dtype != TIMED_DTYPE.get(group.device),
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
            group.dtype != TIMED_DTYPE.get(group.device),
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
        (-int(size), key[3] != TIMED_DTYPE.get(key[2]), Group(*map(str, key)))
        for key, size in sizes.items()
    )
    return ranked[0][2] if ranked else None
