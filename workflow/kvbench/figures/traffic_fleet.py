"""Reused input tokens and balance of a fleet, cache-aware against random routing, by replicas."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from kvbench.figures import _kv, _traffic, style

TABLES = ("traffic_fleet", "traffic_summary")

QUESTION = "Your traffic: what does cache-aware routing save in a fleet?"

_ROUTINGS = {"random": ("random", "orange", "s"), "cache_aware": ("cache-aware", "blue", "o")}


def draw(table: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Draw reused tokens and the busiest replica's load against the number of replicas."""
    rows = _traffic.one(table)
    if rows.empty:
        return _kv.empty(QUESTION, "the log does not show which prompts begin alike")
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE_WIDTH, 2.5))
    for routing, (label, colour, marker) in _ROUTINGS.items():
        own = rows[rows["routing"] == routing].sort_values("replicas")
        for axes, values in ((left, 100 * own["token_share"]), (right, own["imbalance"])):
            axes.plot(
                own["replicas"],
                values,
                f"{marker}-",
                markersize=3,
                color=style.OKABE_ITO[colour],
                label=label,
            )
    left.set(ylabel="input tokens without prefill (%)")
    left.set_ylim(0, max(1.0, 108 * rows["token_share"].max()))
    right.set(ylabel="work, busiest over mean")
    right.set_ylim(bottom=0.9)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("replicas")
        axes.set_xticks(sorted(set(rows["replicas"])))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
    left.legend(frameon=False, title="routing", title_fontsize=6.5, loc="lower left")
    figure.suptitle(_traffic.title(QUESTION, rows, summary))
    return figure
