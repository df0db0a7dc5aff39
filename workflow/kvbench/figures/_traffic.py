"""What the figures of replayed logs share: one log, model and memory a figure, looks of policies."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from kvbench.figures import style

#: Colour, line, marker and label of the policies that are drawn beside each other.
POLICIES = {
    "opt": ("black", ":", "", "OPT (limit)"),
    "unlimited": ("black", ":", "", "unlimited"),
    "lru": ("blue", "-", "o", "LRU"),
    "lfu": ("vermilion", "-", "s", "LFU"),
    "fifo": ("orange", "-", "^", "FIFO"),
    "s3_fifo": ("green", "-", "D", "S3-FIFO"),
    "w_tiny_lfu": ("purple", "-", "v", "W-TinyLFU"),
    "arc": ("sky", "-", "P", "ARC"),
    "sieve": ("yellow", "-", "X", "SIEVE"),
}
_OTHERS = ("grey", "-", "")


def one(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first log, model and memory of a table; all are in the table itself."""
    for column in ("log", "model", "memory_bytes"):
        if len(table):
            table = table[table[column] == table[column].iloc[0]]
    return table


def title(question: str, table: pd.DataFrame, summary: pd.DataFrame | None = None) -> str:
    """The question, and below it which log answers it and how many requests that has.

    ``summary`` is the table ``traffic_summary``, which counts them.
    """
    if table.empty:
        return question
    log = table["log"].iloc[0]
    counts = () if summary is None else summary.loc[summary["log"] == log, "requests"].dropna()
    counted = f" · n = {int(counts.iloc[0]):,} requests" if len(counts) else ""
    return f"{question}\n{log}{counted}"


def lines(axes: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    """One line a policy; those without a look of their own share a grey one."""
    grey = False
    for policy, own in rows.groupby("policy", sort=False):
        colour, dash, marker, label = POLICIES.get(
            policy, (*_OTHERS, None if grey else "other policies")
        )
        grey = grey or policy not in POLICIES
        own = own.sort_values(x)
        axes.plot(
            own[x],
            100 * own[y],
            dash,
            color=style.OKABE_ITO[colour],
            linewidth=0.7 if colour == "grey" else 1.2,
            zorder=1 if colour == "grey" else 2,
            marker=marker if len(own) < 20 else "",
            markersize=3.5,
            markerfacecolor="none",
            markeredgewidth=0.8,
            label=label,
        )
