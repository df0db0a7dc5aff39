"""Lifetimes against renewal theory, freshness against hits, and the price of invalidation."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.caching import expiry
from kvbench.figures import _app, _kv, _variants, style

QUESTION = "How long may an answer be kept, and how is it taken back?"

_LIFETIMES = {
    "fixed": ("fixed", "blue", "o"),
    "jittered": ("fixed ± 20 %", "sky", "s"),
    "sliding": ("sliding", "vermilion", "^"),
    "by_class": ("by class", "black", "*"),
    "guide": ("the guide's, by type", "purple", "P"),
}
#: Lifetimes that differ by class: one point stands for all classes.
_BY_TYPE = ("by_class", "guide")
_METHODS = {
    "ttl": ("time to live only", "grey", "X"),
    "event": ("event", "blue", "o"),
    "tag": ("tag", "green", "s"),
    "version": ("version in key", "orange", "D"),
    "flush": ("flush", "purple", "P"),
    "pattern": ("pattern (SCAN)", "vermilion", "^"),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw theory and simulation, the trade between hits and freshness, and invalidation."""
    table = one_machine(table)
    if table.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, panels = plt.subplots(1, 3, figsize=(style.PAGE_WIDTH, 2.7))
    ttl = table[table["kind"] == "ttl"]
    _theory(panels[0], ttl[ttl["query_class"] == "volatile"])
    _trade(panels[1], ttl)
    _invalidation(panels[2], table[table["kind"] == "invalidation"])
    figure.suptitle(_app.title(QUESTION, table, "requests", "requests"), fontsize=9)
    return figure


def _theory(axes: Axes, rows: pd.DataFrame) -> None:
    axes.set(
        xscale="log",
        xlabel="time to live (s)",
        ylabel="share (%)",
        ylim=(-62, 104),
        yticks=range(0, 101, 25),
        title="volatile answers: theory (lines)",
    )
    if rows.empty:
        return
    rate, change = rows["rate_per_s"].iloc[0], rows["change_rate_per_s"].iloc[0]
    times = np.geomspace(rows["ttl_s"].min() / 3, rows["ttl_s"].max() * 2, 200)
    for name, predict in (("fixed", expiry.predict_fixed), ("sliding", expiry.predict_sliding)):
        label, colour, marker = _LIFETIMES[name]
        theory = [predict(rate, change, one) for one in times]
        own = rows[rows["policy"] == name]
        for part, line, filled in (("hit_ratio", "-", True), ("stale_share", ":", False)):
            axes.plot(
                times,
                [100 * getattr(one, part) for one in theory],
                line,
                linewidth=1,
                color=style.OKABE_ITO[colour],
            )
            axes.plot(
                own["ttl_s"],
                100 * own[part],
                marker,
                markersize=4,
                color=style.OKABE_ITO[colour],
                markerfacecolor=style.OKABE_ITO[colour] if filled else "white",
                label=label if filled else None,
            )
    axes.legend(
        frameon=False,
        fontsize=6,
        loc="lower center",
        ncols=2,
        title="filled: hits\nhollow: stale of hits",
        title_fontsize=6,
    )


def _trade(axes: Axes, rows: pd.DataFrame) -> None:
    """Equal traffic of all classes: stale hits per hit against hits per request."""
    for name, (label, colour, marker) in _variants.looks(_LIFETIMES, rows["policy"]).items():
        own = rows[rows["policy"] == name]
        points = []
        groups = [own] if name in _BY_TYPE else [part for _, part in own.groupby("ttl_s")]
        for part in groups:
            hits = part["hit_ratio"].mean()
            stale = (part["hit_ratio"] * part["stale_share"]).mean()
            if hits and not math.isnan(hits):
                points.append((100 * stale / hits, 100 * hits))
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker,
            markersize=9 if marker == "*" else 4.5,
            color=style.OKABE_ITO[colour],
            markerfacecolor="none" if name == "jittered" else None,
            label=label,
        )
    axes.set(
        xlabel="stale hits per hit (%)",
        ylabel="hits per request (%)",
        title="all classes together",
    )
    axes.legend(frameon=False, fontsize=6, loc="lower right", handletextpad=0.2)


def _invalidation(axes: Axes, rows: pd.DataFrame) -> None:
    if rows.empty:
        axes.text(0.5, 0.5, "no server was available", ha="center", va="center", fontsize=7)
        axes.set_axis_off()
        return
    for name, (label, colour, marker) in _variants.looks(_METHODS, rows["policy"]).items():
        own = rows[rows["policy"] == name].sort_values("entries")
        if own.empty or name == "ttl":
            continue
        stale = own["stale_reads"].sum()
        axes.plot(
            own["entries"],
            1e6 * own["invalidate_p50_s"],
            marker=marker,
            markersize=4,
            linewidth=1,
            color=style.OKABE_ITO[colour],
            label=label + (f" ({stale:.0f} stale)" if stale else ""),
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="entries on the server",
        ylabel="one invalidation, median (µs)",
        title="taking an answer back",
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 8)
    axes.legend(frameon=False, fontsize=6, loc="upper left", ncols=2, columnspacing=0.8)
