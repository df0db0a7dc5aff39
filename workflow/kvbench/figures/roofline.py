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


def draw(summary: pd.DataFrame, predictions: pd.DataFrame | None = None) -> Figure:
    """Draw one log-log panel per machine: a marker per cell, the roof as the diagonal.

    The distance to the roof is how many times the prediction a cell takes; the panel names its
    geometric mean per strategy. Filled markers wait for memory, hollow ones for arithmetic.

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
    machines = selection.machines(table)
    # One machine a row: the names with their distances stand beside the panel.
    figure, axes = plt.subplots(
        len(machines), 1, figsize=(style.PAGE_WIDTH, 0.9 + 2.9 * len(machines)), squeeze=False
    )
    for ax, machine in zip(axes.flat, machines, strict=True):
        _panel(ax, table[table["machine"] == machine])
        ax.set_title(str(machine), fontsize=7.5, style="italic")
    figure.suptitle(QUESTION, fontsize=9)
    bounds = [
        Line2D([], [], color="0.35", marker="o", markersize=4, linewidth=0, label="memory-bound"),
        Line2D(
            [],
            [],
            color="0.35",
            marker="o",
            mfc="none",
            markersize=4,
            linewidth=0,
            label="compute-bound",
        ),
        Line2D([], [], color="0.35", linewidth=1, label="roof: as fast as the machine allows"),
    ]
    figure.legend(handles=bounds, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame) -> None:
    predicted = rows["predicted_e2e_s"].astype(float)
    measured = rows["e2e_s_median"].astype(float)
    low = 0.6 * min(predicted.min(), measured.min())
    high = 1.7 * max(predicted.max(), measured.max())
    ax.plot([low, high], [low, high], color="0.35", linewidth=1)
    ax.fill_between([low, high], [low, low], [low, high], color="0.94", linewidth=0)
    names = []
    for strategy in selection.in_order(set(rows["strategy"])):
        own = rows[rows["strategy"] == strategy]
        look = style.look(strategy)
        for bound, part in own.groupby("bound"):
            ax.plot(
                part["predicted_e2e_s"].astype(float),
                part["e2e_s_median"].astype(float),
                linestyle="",
                marker=look.marker,
                markersize=4 * look.size,
                color=look.colour,
                mfc="none" if bound == "compute" else look.colour,
            )
        ratio = own["e2e_s_median"].astype(float) / own["predicted_e2e_s"].astype(float)
        distance = float(np.exp(np.log(ratio).mean()))
        mark = Line2D(
            [], [], color=look.colour, marker=look.marker, markersize=4 * look.size, linewidth=0
        )
        names.append((mark, f"{look.label}: {distance:.{1 if distance < 10 else 0}f}× the roof"))
    ax.legend(
        [mark for mark, _ in names],
        [text for _, text in names],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        fontsize=6,
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        _kv.plain_log_axis(axis, low, high)
    ax.grid(color="0.92", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.set_xlabel("predicted E2E latency (s)")
    ax.set_ylabel("measured E2E latency (s)")
