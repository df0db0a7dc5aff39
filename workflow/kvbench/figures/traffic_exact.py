"""Hit ratio of an exact response cache on a log, by capacity and policy."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv, _traffic, style

TABLES = ("traffic_exact", "traffic_summary")

QUESTION = "Your traffic: how large must an exact cache be?"


def draw(table: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Draw hit ratios against capacity, one line a policy, the limit dotted."""
    rows = _traffic.one(table)
    if rows.empty:
        return _kv.empty(QUESTION, "no request of the log is seen to repeat another")
    figure, axes = plt.subplots(figsize=(style.PAGE_WIDTH * 0.75, 2.8))
    _traffic.lines(axes, rows, "capacity", "hit_ratio")
    axes.set(xscale="log", xlabel="capacity (entries)", ylabel="hit ratio (% of the requests)")
    axes.set_ylim(bottom=0)
    figure.legend(frameon=False, loc="outside right center", fontsize=6.5)
    figure.suptitle(_traffic.title(QUESTION, rows, summary))
    return figure
