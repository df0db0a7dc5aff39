"""Swept options of a strategy: bytes, time against the exact cache and quality, one curve a sweep."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from kvbench.analysis.sweeps import GROUP, sweeps
from kvbench.figures import _kv, style

QUESTION = "What does an option of a cache buy, value by value?"
TABLES = ("kv_summary", "kv_quality")

#: Most sweeps that fit a page.
MOST = 4


def draw(summary: pd.DataFrame, quality: pd.DataFrame) -> Figure:
    """Draw a row of three panels per sweep: bytes, time over dynamic, KL; values on the x axis."""
    found = sweeps(summary)[:MOST]
    if not found:
        return _kv.empty(QUESTION, "no option of a strategy was measured with three values")
    figure = plt.figure(figsize=(style.PAGE_WIDTH, 0.7 + 2.0 * len(found)))
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, sweep in zip(parts, found, strict=True):
        part.suptitle(
            " · ".join([*map(_kv.called, sweep.heading.split(" · ")), _kv.counted(sweep.rows)]),
            x=0.012,
            ha="left",
            fontsize=7.5,
            style="italic",
        )
        size, time, loss = part.subplots(1, 3)
        rows = sweep.rows
        _curve(size, rows["value"], rows["kv_mib"], None)
        size.set_ylabel("KV cache (MiB)")
        size.set_ylim(bottom=0)
        # A ratio of speeds is turned over: its ends change places.
        # One from which nothing may be concluded has none.
        judged = rows["not_judged"].isna()
        ends = tuple(
            1 / rows[f"speedup_vs_dynamic_ci_{end}"].where(judged) for end in ("high", "low")
        )
        _curve(time, rows["value"], 1 / rows["speedup_vs_dynamic"], ends)
        time.axhline(1, color="0.6", linewidth=0.7)
        time.set_ylabel("E2E latency over dynamic")
        scored = rows[["value", *GROUP, "strategy"]].merge(quality, on=[*GROUP, "strategy"])
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
