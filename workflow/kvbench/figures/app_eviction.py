"""Hit ratios of eviction policies by workload, against theory, and on a real server."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants, style

QUESTION = "Which entry should a full cache give up?"

#: Policies from the limit downwards in the order of the heat map.
_POLICIES = {
    "opt": "OPT (limit)",
    "w_tiny_lfu": "W-TinyLFU",
    "s3_fifo": "S3-FIFO",
    "sieve": "SIEVE",
    "arc": "ARC",
    "two_q": "2Q",
    "lfu_ageing": "LFU, ageing",
    "lfu": "LFU",
    "clock": "CLOCK",
    "lru": "LRU",
    "fifo": "FIFO",
    "random": "random",
    "ttl": "TTL",
    "lifo": "LIFO",
    "mru": "MRU",
}
_WORKLOADS = {
    "zipf": "Zipf",
    "loop": "loop",
    "scan": "Zipf,\nscans",
    "shift": "Zipf,\nshifts",
    "sessions": "ses-\nsions",
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw hit ratios by policy and workload, simulation against theory, and the server."""
    table = one_machine(table)
    if table.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure = plt.figure(figsize=(style.PAGE_WIDTH, 3.9))
    grid = figure.add_gridspec(2, 2, width_ratios=[1.15, 1], height_ratios=[1.15, 1])
    _heat_map(figure.add_subplot(grid[:, 0]), table[table["kind"] == "simulated"])
    _theory(figure.add_subplot(grid[0, 1]), table[table["kind"] == "simulated"])
    _server(figure.add_subplot(grid[1, 1]), table[table["kind"] == "server"])
    figure.suptitle(_app.title(QUESTION, table, "requests", "requests"), fontsize=9)
    return figure


def _heat_map(axes: Axes, rows: pd.DataFrame) -> None:
    shares = rows["capacity_share"].dropna().unique()
    share = min(shares, key=lambda one: abs(one - 0.1)) if len(shares) else None
    own = rows[rows["capacity_share"] == share]
    zipf = own.loc[own["workload"] == "zipf", "exponent"].dropna().unique()
    if len(zipf):
        shown = min(zipf, key=lambda one: abs(one - 0.9))
        own = own[(own["workload"] != "zipf") | (own["exponent"] == shown)]
    means = own.pivot_table(index="policy", columns="workload", values="hit_ratio")
    policies = _variants.labels(_POLICIES, means.index)
    workloads = _variants.labels(_WORKLOADS, means.columns)
    means = means.reindex(index=list(policies), columns=list(workloads))
    # A colour tells how close a policy comes to the limit of its own workload.
    limit = means.loc["opt"].where(means.loc["opt"] > 0)
    sns.heatmap(
        means / limit,
        ax=axes,
        annot=100 * means,
        fmt=".1f",
        annot_kws={"fontsize": 6.5, "color": "black"},
        cmap="Greens",
        vmin=0,
        vmax=1.6,
        cbar=False,
        xticklabels=list(workloads.values()),
        yticklabels=list(policies.values()),
    )
    axes.set(xlabel="", ylabel="")
    axes.tick_params(length=0, labelsize=6.5, labelrotation=0)
    plt.setp(axes.get_yticklabels(), verticalalignment="center")
    if share is not None:
        axes.set_title(
            f"hit ratio (%), room for {100 * share:.0f} % of the keys\n"
            "colour: share of the limit's hits",
            fontsize=7,
        )


def _theory(axes: Axes, rows: pd.DataFrame) -> None:
    rows = rows[(rows["workload"] == "zipf") & rows["predicted_hit_ratio"].notna()]
    looks = {"lru": ("LRU, Che", "blue", "o"), "fifo": ("FIFO, Martina et al.", "orange", "s")}
    for name, (label, colour, marker) in looks.items():
        own = rows[rows["policy"] == name]
        axes.plot(
            100 * own["predicted_hit_ratio"],
            100 * own["warm_hit_ratio"],
            linestyle="",
            marker=marker,
            markersize=3.5,
            markerfacecolor="none",
            color=style.OKABE_ITO[colour],
            label=label,
        )
    axes.plot([0, 100], [0, 100], color=style.OKABE_ITO["grey"], linewidth=0.8, zorder=0)
    axes.set(
        xlabel="hit ratio by theory (%)",
        ylabel="simulated (%)",
        xlim=(0, 100),
        ylim=(0, 100),
    )
    axes.legend(frameon=False, fontsize=6.5, loc="upper left")


def _server(axes: Axes, rows: pd.DataFrame) -> None:
    if rows.empty:
        axes.text(0.5, 0.5, "no server was available", ha="center", va="center", fontsize=7)
        axes.set_axis_off()
        return
    rows = rows.sort_values(["policy", "samples", "pace_s"], ascending=[False, True, True])
    names = [
        row.policy
        + (f", {row.samples:.0f} samples" if rows["samples"].nunique() > 1 else "")
        + (f", over {row.replay_s:.0f} s" if row.pace_s > 0 else "")
        for row in rows.itertuples()
    ]
    places = np.arange(len(rows))
    axes.plot(
        100 * rows["exact_hit_ratio"],
        places,
        "|",
        markersize=9,
        markeredgewidth=1.5,
        color=style.OKABE_ITO["black"],
        label="exact policy, as many entries",
    )
    axes.plot(
        100 * rows["hit_ratio"],
        places,
        "o",
        markersize=4,
        color=style.OKABE_ITO["vermilion"],
        label="server",
    )
    axes.set_yticks(places, names, fontsize=6.5)
    axes.set_ylim(-0.6, len(rows) + 0.9)
    axes.set_xlabel("hit ratio on the real server (%)")
    axes.legend(frameon=False, fontsize=6, loc="upper left", ncols=2, columnspacing=1)
