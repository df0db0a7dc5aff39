"""Candidate hits of a semantic cache on a log by threshold, and what its guards refuse."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv, _traffic, style

TABLES = ("traffic_semantic", "traffic_summary")

QUESTION = "Your traffic: how much could a semantic cache answer?"


def draw(table: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Draw candidate hits with and without guards against the threshold, and refusals by guard."""
    rows = _traffic.one(table)
    if rows.empty:
        return _kv.empty(QUESTION, "the log has no texts, or no sentence encoder was there")
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE_WIDTH, 2.5))
    for column, label, colour, marker in (
        ("exact_share", "in the cache word for word", "black", "o"),
        ("unguarded_share", "close enough", "grey", "s"),
        ("candidate_share", "close enough, guards agree", "green", "^"),
    ):
        left.plot(
            rows["threshold"],
            100 * rows[column],
            f"{marker}-",
            markersize=3,
            color=style.OKABE_ITO[colour],
            label=label,
        )
    left.set(xlabel="threshold (cosine)", ylabel="share of the requests (%)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=6.5)
    colours = [style.OKABE_ITO[name] for name in ("blue", "orange", "vermilion", "purple", "sky")]
    refusals = [name for name in rows if name.startswith("refused_")]
    for place, name in enumerate(refusals):
        right.plot(
            rows["threshold"],
            rows[name],
            "o-",
            markersize=3,
            color=colours[place % len(colours)],
            label=name.removeprefix("refused_"),
        )
    right.set(xlabel="threshold (cosine)", ylabel="pairs that the guard refuses")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=6.5, title="guard", title_fontsize=6.5)
    figure.suptitle(_traffic.title(QUESTION, rows, summary))
    return figure
