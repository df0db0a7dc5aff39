"""Swept options of a strategy: bytes, time against the exact cache and quality, one curve a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from kvbench import strategies
from kvbench.analysis import selection
from kvbench.errors import InputError
from kvbench.figures import _kv, style
from kvbench.strategies import options

QUESTION = "What does an option of a cache buy, value by value?"
TABLES = ("kv_summary", "kv_quality")

#: Fewest values of an option that make a curve.
FEWEST = 3
#: Most sweeps that fit a page.
MOST = 4
_GROUP = ["machine", "model", "device", "dtype", "scenario"]


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
    for _, own in rows.groupby(_GROUP, sort=True):
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


def draw(summary: pd.DataFrame, quality: pd.DataFrame) -> Figure:
    """Draw a row of three panels per sweep: bytes, time over dynamic, KL; values on the x axis."""
    found = sweeps(summary)[:MOST]
    if not found:
        return _kv.empty(QUESTION, "no option of a strategy was measured with three values")
    figure = plt.figure(figsize=(style.PAGE_WIDTH, 0.7 + 2.0 * len(found)))
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, sweep in zip(parts, found, strict=True):
        part.suptitle(sweep.heading, x=0.012, ha="left", fontsize=7.5, style="italic")
        size, time, loss = part.subplots(1, 3)
        rows = sweep.rows
        _curve(size, rows["value"], rows["kv_mib"], None)
        size.set_ylabel("KV cache (MiB)")
        size.set_ylim(bottom=0)
        # A ratio of speeds is turned over: its ends change places.
        ends = (1 / rows["speedup_vs_dynamic_ci_high"], 1 / rows["speedup_vs_dynamic_ci_low"])
        _curve(time, rows["value"], 1 / rows["speedup_vs_dynamic"], ends)
        time.axhline(1, color="0.6", linewidth=0.7)
        time.set_ylabel("E2E latency over dynamic")
        scored = rows[["value", *_GROUP, "strategy"]].merge(quality, on=[*_GROUP, "strategy"])
        ends = (scored["kl_nats_ci_low"], scored["kl_nats_ci_high"])
        _curve(loss, scored["value"], scored["kl_nats"], ends)
        loss.set_ylabel("KL from the exact cache\n(nats per token)")
        for ax in (size, time, loss):
            _values_axis(ax, rows["value"])
            ax.set_xlabel(sweep.option.replace("_", " "))
    figure.suptitle(QUESTION, fontsize=9)
    figure.supxlabel("marker: median; bar: 95 % interval", fontsize=6.5, color="0.35")
    return figure


def _curve(
    ax: Axes, values: pd.Series, heights: pd.Series, ends: tuple[pd.Series, pd.Series] | None
) -> None:
    """One curve with its intervals; or a word where nothing was measured."""
    if not heights.notna().any():
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.5")
        ax.set_yticks([])
        return
    colour = style.OKABE_ITO["blue"]
    ax.plot(values, heights, marker="o", color=colour, ms=4, linewidth=0.9)
    if ends is not None:
        ax.vlines(values, *ends, color=colour, linewidth=1.4)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _values_axis(ax: Axes, values: pd.Series) -> None:
    """A tick per measured value, on a logarithmic axis where they span more than a factor of four."""
    if values.min() > 0 and values.max() / values.min() > 4:
        ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(list(values)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.08)
