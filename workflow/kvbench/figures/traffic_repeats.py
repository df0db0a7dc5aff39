"""How soon requests of a log come back, and how popular the popular ones are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv, _traffic, style

TABLES = ("traffic_repeats", "traffic_summary")

QUESTION = "Your traffic: what comes back, and how soon?"


def draw(table: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Draw the spacing of repeats and the share of requests that the most popular keys take."""
    rows = _traffic.one(table)
    if rows.empty:
        return _kv.empty(QUESTION, "the log does not show which requests are alike")
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE_WIDTH, 2.5))
    gaps = rows.dropna(subset=["quantile"])
    left.step(gaps["gap_requests"], 100 * gaps["quantile"], color=style.OKABE_ITO["blue"])
    left.set(xlabel="requests since the one it repeats", ylabel="share of the repeats (%)")
    left.set_ylim(0, 100)
    if len(gaps):
        left.set_xscale("log")
    else:
        left.text(0.5, 0.5, "no request is repeated", ha="center", transform=left.transAxes)
    ranks = rows.dropna(subset=["rank_share"])
    right.plot(
        100 * ranks["rank_share"],
        100 * ranks["request_share"],
        "o-",
        markersize=3,
        color=style.OKABE_ITO["vermilion"],
    )
    right.set(
        xscale="log",
        ylim=(0, 103),
        xlabel="most popular distinct requests (%)",
        ylabel="share of all requests (%)",
    )
    figure.suptitle(_traffic.title(QUESTION, rows, summary))
    return figure
