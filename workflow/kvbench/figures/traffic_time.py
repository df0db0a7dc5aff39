"""What a time to live costs, and whether the caches decay in the course of a log."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvbench.figures import _kv, _traffic, style

TABLES = ("traffic_time", "traffic_ttl", "traffic_summary")

QUESTION = "Your traffic: does a cache keep its worth?"


def draw(time: pd.DataFrame, ttl: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Draw shares over the windows of the log, and the hit ratio against the time to live."""
    rows, lives = _traffic.one(time), _traffic.one(ttl)
    if rows.empty or not rows[["exact_hit_ratio", "prefix_token_share"]].notna().any(axis=None):
        return _kv.empty(QUESTION, "no cache could be replayed on this log")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(style.PAGE_WIDTH, 2.7), width_ratios=[1.5, 1]
    )
    for column, label, colour, marker in (
        ("exact_hit_ratio", "exact cache, requests", "blue", "o"),
        ("prefix_token_share", "prefix cache, input tokens", "vermilion", "s"),
    ):
        if rows[column].notna().any():
            left.plot(
                rows["window"],
                100 * rows[column].astype(float),
                f"{marker}-",
                markersize=3,
                color=style.OKABE_ITO[colour],
                label=label,
            )
    left.set(xlabel="window of the log (equally many requests)", ylabel="share saved (%)")
    left.set_ylim(bottom=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(frameon=False, ncols=2, loc="outside lower left", fontsize=6.5)
    if lives.empty:
        right.text(0.5, 0.5, "no times, or no repeats", ha="center", va="center", fontsize=7)
        right.set_axis_off()
    else:
        right.plot(
            lives["ttl_s"],
            100 * lives["hit_ratio"],
            "o-",
            markersize=3,
            color=style.OKABE_ITO["green"],
        )
        right.set(xscale="log", xlabel="time to live (s)", ylabel="exact hit ratio (%)")
        right.set_ylim(bottom=0)
    figure.suptitle(_traffic.title(QUESTION, rows, summary))
    return figure
