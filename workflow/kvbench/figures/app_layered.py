"""Two cache levels: who answers, and what that does to the mean."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants, style

QUESTION = "What does a private memory (L1) in front of the shared cache server (L2) gain?"

_LABELS = {
    "source": "no cache",
    "l1": "L1",
    "l2": "L2",
    "l1_l2": "L1 + L2, no promotion",
    "l1_l2_promotion": "L1 + L2, promotion",
    "guide": "the guide's L1 + L2",
}
_LEVELS = {
    1: ("L1, memory", "orange", ""),
    2: ("L2, server", "sky", "///"),
    3: ("source", "grey", "..."),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw one row of panels per number of workers and service time: shares, and means.

    Of several sizes of L1 the middle one is shown.
    """
    table = one_machine(table)
    table = table[table["configuration"].notna()]
    names = _variants.labels(_LABELS, table["configuration"])
    if table.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    sizes = sorted(table["l1_share"].dropna().unique())
    if sizes:
        size = sizes[len(sizes) // 2]
        table = table[table["l1_share"].isna() | (table["l1_share"] == size)]
    groups = list(table.groupby(["service_ms", "workers"], sort=True))
    figure, axes = plt.subplots(
        len(groups),
        2,
        figsize=(style.PAGE_WIDTH, 0.9 + 1.35 * len(groups)),
        squeeze=False,
        sharex="col",
    )
    for (left, right), ((service_ms, workers), rows) in zip(axes, groups, strict=True):
        order = [name for name in names if (rows["configuration"] == name).any()]
        rows = rows.set_index("configuration").loc[order]
        left.set_yticks(range(len(order)), [names[name] for name in order])
        left.set_title(
            f"{workers:.0f} worker{'s' if workers > 1 else ''}, source {service_ms:g} ms"
            + (f", L1 holds {100 * size:.0f} % of the keys" if sizes else ""),
            fontsize=7.5,
            style="italic",
        )
        _shares(left, rows)
        _means(right, rows)
        for ax in (left, right):
            ax.set_ylim(len(order) - 0.4, -0.6)
    axes[-1][0].set_xlabel("share of requests answered (%)")
    axes[-1][1].set_xlabel("mean time of a request (ms)")
    handles, labels = [], []
    for ax in axes[0]:
        more_handles, more_labels = ax.get_legend_handles_labels()
        handles += more_handles
        labels += more_labels
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(_app.title(QUESTION, table, "requests", "requests"), fontsize=9)
    return figure


def _shares(ax: Axes, rows: pd.DataFrame) -> None:
    start = np.zeros(len(rows))
    for level, (label, colour, hatch) in _LEVELS.items():
        share = rows[f"l{level}_share_of_requests"].to_numpy() * 100
        ax.barh(
            range(len(rows)),
            share,
            left=start,
            height=0.7,
            color=style.OKABE_ITO[colour],
            hatch=hatch,
            edgecolor="white",
            linewidth=0.4,
            label=label,
        )
        start += share
    ax.set_xlim(0, 100)


def _means(ax: Axes, rows: pd.DataFrame) -> None:
    places = np.arange(len(rows))
    mean = rows["mean_s"].to_numpy() * 1000
    ends = np.array(
        [
            mean - rows["mean_s_ci_low"].to_numpy() * 1000,
            rows["mean_s_ci_high"].to_numpy() * 1000 - mean,
        ]
    )
    ax.errorbar(
        mean,
        places,
        xerr=ends,
        fmt="o",
        color=style.OKABE_ITO["blue"],
        markersize=4,
        linewidth=0.9,
        label="measured",
    )
    ax.plot(
        rows["mean_predicted_s"] * 1000,
        places,
        "|",
        color=style.OKABE_ITO["vermilion"],
        markersize=11,
        markeredgewidth=1.4,
        label="predicted from the levels",
    )
    ax.set_yticks(places, [])
    ax.set_xlim(left=0)
    ax.grid(axis="x", linewidth=0.3)
