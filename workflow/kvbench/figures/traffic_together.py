"""What exact, semantic and prefix caches save of a log when a request meets them in order."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv, _traffic, style

TABLES = ("traffic_together", "traffic_summary")

QUESTION = "Your traffic: what is left when all caches stand in a row?"

_STAGES = {
    "exact": ("exact cache", "blue"),
    "semantic": ("semantic cache", "green"),
    "prefix": ("prefix cache", "vermilion"),
    "model": ("left to compute", "grey"),
}


def draw(table: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Draw the shares of requests and of input tokens that each stage takes."""
    rows = _traffic.one(table)
    if rows.empty:
        return _kv.empty(QUESTION, "the log does not show which requests are alike")
    figure, axes = plt.subplots(figsize=(style.PAGE_WIDTH, 1.9))
    for place, column in enumerate(("token_share", "request_share")):
        start = 0.0
        for stage, (label, colour) in _STAGES.items():
            share = rows.loc[rows["stage"] == stage, column]
            if share.empty:
                continue
            width = 100 * float(share.fillna(0).iloc[0])
            axes.barh(
                place,
                width,
                left=start,
                color=style.OKABE_ITO[colour],
                label=label if place == 0 else None,
            )
            if width > 4:
                axes.text(
                    start + width / 2,
                    place,
                    f"{width:.1f}",
                    color="white",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                )
            start += width
    axes.set_yticks([0, 1], ["input tokens", "requests"])
    axes.set(xlabel="share (%)", xlim=(0, 100))
    figure.legend(frameon=False, ncols=4, loc="outside lower center", fontsize=6.5)
    figure.suptitle(_traffic.title(QUESTION, rows, summary))
    return figure
