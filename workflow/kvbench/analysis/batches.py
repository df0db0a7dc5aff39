"""Sweeps of the batch: rows of one scenario that differ in how many requests are generated for at once."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from kvbench.analysis import selection
from kvbench.analysis.selection import Group
from kvbench.layout import EQUAL, MIXED, batch_of


@dataclass(frozen=True)
class Sweep:
    """One scenario at several batches.

    Attributes
    ----------
    group, scenario, lengths:
        Whose rows they are, and whether prompts of a batch are ``equal``ly long or ``mixed``.
    rows:
        Rows of ``kv_summary`` in the order of the column ``requests``: the batch.
    """

    group: Group
    scenario: str
    lengths: str
    rows: pd.DataFrame


def sweeps(summary: pd.DataFrame) -> list[Sweep]:
    """Every scenario that was measured at two batches or more, of equal and of mixed lengths.

    One request has no lengths: it begins the sweep of equal lengths and that of mixed ones, with the
    strategies and turns that a batch was measured of. The longest sweeps come first, those of this machine
    before others.
    """
    rows = selection.measured(summary)
    if rows.empty:
        return []
    parts = [batch_of(str(name)) for name in rows["scenario"]]
    rows = rows.assign(
        base=[part[0] for part in parts],
        requests=[part[1] for part in parts],
        spread=[part[2] for part in parts],
    )
    found = []
    for place, own in rows.groupby([*Group._fields, "base"], sort=True):
        for lengths in (EQUAL, MIXED):
            several = own[own["spread"] == lengths]
            one = own[
                (own["requests"] == 1)
                & own["strategy"].isin(several["strategy"])
                & own["turns"].isin(several["turns"])
            ]
            sweep = pd.concat([one, several]).sort_values("requests", kind="stable")
            if len(several) and sweep["requests"].nunique() > 1:
                *group, scenario = map(str, place)
                found.append(Sweep(Group(*group), scenario, lengths, sweep))
    here = selection.HERE
    return sorted(found, key=lambda one: (one.group.machine != here, -len(one.rows)))
