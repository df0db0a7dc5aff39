"""Measured time against the least time the machine allows, per strategy."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvbench.analysis import selection
from kvbench.figures import _kv, style
from kvbench.records.identity import IDENTITY

TABLES = ("kv_summary",)

QUESTION = "How far is each strategy from the roof of its machine?"


#: Panels beside each other at most; more machines begin another row.
_BESIDE = 4


def draw(summary: pd.DataFrame, predictions: pd.DataFrame | None = None) -> Figure:
    """Draw one panel per machine: a row per strategy, a mark per cell, the roof at 1.

    The distance to the roof is how many times the prediction a cell takes; behind each row stands its
    geometric mean. Filled marks wait for memory, hollow ones for arithmetic.

    Parameters
    ----------
    summary:
        The table ``kv_summary``: ``machine, scenario, strategy, e2e_s_median``.
    predictions:
        ``predicted_e2e_s`` (s) and ``bound`` (``memory`` or ``compute``) of the same cells; None
        if the summary has these columns itself.
    """
    table = summary
    if predictions is not None:
        keys = [key for key in IDENTITY if key in summary and key in predictions]
        extra = predictions[[*keys, "predicted_e2e_s", "bound"]].drop_duplicates(keys)
        table = summary.drop(columns=["predicted_e2e_s", "bound"], errors="ignore").merge(
            extra, on=keys
        )
    table = table[(table["e2e_s_median"] > 0) & (table["predicted_e2e_s"] > 0)]
    if table.empty:
        return _kv.empty(QUESTION, "no measured cell has a prediction: were the ceilings measured?")
    distance = table["e2e_s_median"].astype(float) / table["predicted_e2e_s"].astype(float)
    table = table.assign(distance=distance)
    machines = selection.machines(table)
    order = selection.in_order(set(table["strategy"]))
    columns = min(_BESIDE, len(machines))
    lines = -(-len(machines) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(style.PAGE_WIDTH, 1.1 + lines * (0.3 + 0.16 * max(4, len(order)))),
        sharey=True,
        squeeze=False,
    )
    for ax, machine in zip(axes.flat, machines, strict=False):
        _panel(ax, table[table["machine"] == machine], order)
        count = int((table["machine"] == machine).sum())
        measured = f"n = {count} cell{'s' * (count != 1)}"
        ax.set_title(f"{_kv.called(machine)} · {measured}", fontsize=7.5, style="italic")
        # As many machines beside each other as there may be leave an inch and a half to each.
        ax.set_xlabel("times the least time", fontsize=6.5 if columns == _BESIDE else None)
    for ax in list(axes.flat)[len(machines) :]:
        ax.set_visible(False)
    first = axes[0][0]
    first.set_yticks(range(len(order)), [style.look(name).label for name in order], fontsize=6.5)
    first.set_ylim(len(order) - 0.5, -0.5)
    figure.suptitle(QUESTION, fontsize=9)
    mark = {"color": "0.35", "markersize": 4, "linewidth": 0}
    bounds = [
        Line2D([], [], marker="o", label="memory-bound", **mark),
        Line2D([], [], marker="o", mfc="none", label="compute-bound", **mark),
        Line2D([], [], color="0.35", linewidth=1, label="roof: as fast as the machine allows"),
    ]
    figure.legend(
        handles=bounds,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        title="a mark is a scenario; number: geometric mean of a row",
        title_fontsize=6.5,
    )
    return figure


def _panel(ax: Axes, rows: pd.DataFrame, order: list[str]) -> None:
    for place, strategy in enumerate(order):
        if place % 2:
            ax.axhspan(place - 0.5, place + 0.5, color="0.965", lw=0, zorder=0)
        own = rows[rows["strategy"] == strategy]
        if own.empty:
            continue
        look = style.look(strategy)
        for bound, part in own.groupby("bound"):
            ax.plot(
                part["distance"],
                [place] * len(part),
                linestyle="",
                marker=look.marker,
                markersize=4 * look.size,
                color=look.colour,
                mfc="none" if bound == "compute" else look.colour,
            )
        mean = float(np.exp(np.log(own["distance"]).mean()))
        ax.annotate(
            f"{mean:.{1 if mean < 10 else 0}f}×",
            (0.985, place),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            fontsize=6.5,
        )
    ax.axvline(1.0, color="0.35", linewidth=1)
    ax.set_xscale("log")
    # Room behind the last mark for the means.
    least, most = rows["distance"].min(), rows["distance"].max()
    ax.set_xlim(min(0.8, 0.8 * least), most * max(1.6, (most / min(1, least)) ** 0.45))
    ax.grid(axis="x", color="0.92", linewidth=0.5)
    ax.set_axisbelow(True)
