"""Sweeps in a table of cells: rows that differ in one option of their strategy and in nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from kvbench import strategies
from kvbench.analysis import selection
from kvbench.errors import InputError
from kvbench.strategies import options

#: Fewest values of an option that make a curve.
FEWEST = 3
#: What all rows of a sweep share.
GROUP = ["machine", "model", "device", "dtype", "scenario"]


@dataclass(frozen=True)
class Sweep:
    """Rows that differ in one option only.

    Attributes
    ----------
    rows:
        Rows of ``kv_summary`` with the option's value in the column ``value``, in its order.
    strategy, option:
        What is swept: a class of strategies and one of its options.
    others:
        What ids say of the options that all rows share.
    """

    rows: pd.DataFrame
    strategy: str
    option: str
    others: tuple[str, ...]

    @property
    def heading(self) -> str:
        """One line that names machine, model, scenario and what stays the same."""
        first = self.rows.iloc[0]
        parts = [*(str(first[name]) for name in ("machine", "model", "scenario")), self.strategy]
        return " · ".join([*parts, *self.others])


def sweeps(summary: pd.DataFrame) -> list[Sweep]:
    """Every sweep of a table: at least :data:`FEWEST` values of a number, all else being equal.

    The longest come first, those of this machine before others.
    """
    found = []
    rows = selection.measured(summary)
    for _, own in rows.groupby(GROUP, sort=True):
        for (name, option, others), values in _alike(own).items():
            if len(values) >= FEWEST:
                chosen = own.loc[list(values.values())].assign(value=list(values))
                found.append(Sweep(chosen.sort_values("value"), name, option, others))
    here = selection.HERE
    return sorted(found, key=lambda one: (one.rows["machine"].iloc[0] != here, -len(one.rows)))


def _alike(rows: pd.DataFrame) -> dict[tuple, dict[float, object]]:
    """Strategy, option and the other options to index labels by the option's value."""
    found: dict[tuple, dict[float, object]] = {}
    for index, strategy in _known(rows):
        known = options.of(type(strategy))
        for name, one in known.items():
            if not isinstance(one.default, int | float) or isinstance(one.default, bool):
                continue
            others = tuple(
                other.spell(getattr(strategy, key))
                for key, other in known.items()
                if key != name and (other.always or getattr(strategy, key) != other.default)
            )
            values = found.setdefault((type(strategy).name, name, others), {})
            values[getattr(strategy, name)] = index
    return found


def _known(rows: pd.DataFrame) -> Iterator[tuple[object, strategies.Strategy]]:
    for index, name in rows["strategy"].items():
        try:
            yield index, strategies.get(str(name))
        except InputError:
            # The control, or another version's strategy.
            continue
