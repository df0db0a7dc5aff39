"""Broken cache servers, warm starts and stuck errors."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants, style

QUESTION = "What does a request cost when the cache server is broken, cold or full of errors?"

_FAULTS = {
    "up": "none",
    "refused": "refused",
    "black_hole": "black hole",
    "out_of_memory": "out of memory",
    "corrupt": "corrupt value",
    "wrong_type": "wrong type",
    "slow": "slow",
}
_CLIENTS = {
    "default": ("defaults", "vermilion", "s"),
    "short_timeout": ("short timeout, no retry", "sky", "o"),
    "breaker": ("with circuit breaker", "blue", "^"),
}
_POLICIES = {
    "cache_all": ("cached like answers", "vermilion"),
    "negative_ttl": ("cached for one second", "orange"),
    "skip_errors": ("not cached", "blue"),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw the added time per fault and client, hit ratios after preloading, errors served."""
    table = one_machine(table)
    if table.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, axes = plt.subplots(
        1, 3, figsize=(style.PAGE_WIDTH, 2.9), gridspec_kw={"width_ratios": [1.5, 1, 1]}
    )
    _added(axes[0], table[table["kind"] == "fallback"])
    _warm(axes[1], table[table["kind"] == "warm_up"])
    _errors(axes[2], table[table["kind"] == "errors"])
    figure.suptitle(_app.title(QUESTION, table, "requests", "requests"), fontsize=9)
    return figure


def _added(ax: Axes, rows: pd.DataFrame) -> None:
    known = _variants.labels(_FAULTS, rows["fault"])
    looks = _variants.looks(_CLIENTS, rows["client"])
    faults = [name for name in known if (rows["fault"] == name).any()]
    clients = [name for name in looks if (rows["client"] == name).any()]
    for number, client in enumerate(clients):
        label, colour, marker = looks[client]
        paint = style.OKABE_ITO[colour]
        own = rows[rows["client"] == client].set_index("fault")
        present = [name for name in faults if name in own.index]
        places = np.array([faults.index(name) for name in present])
        places = places + (number - (len(clients) - 1) / 2) * 0.25
        middle = own.loc[present, "added_p50_s"].to_numpy() * 1000
        most = own.loc[present, "added_max_s"].to_numpy() * 1000
        ax.hlines(places, middle, most, color=paint, linewidth=1)
        ax.plot(middle, places, marker, color=paint, markersize=4, label=label)
        ax.plot(most, places, "|", color=paint, markersize=5)
        for place, value, blocked in zip(
            places, most, own.loc[present, "blocked"].astype(bool), strict=True
        ):
            if blocked:
                ax.annotate(
                    "gave up",
                    (value, place),
                    xytext=(-4, 0),
                    textcoords="offset points",
                    fontsize=6,
                    ha="right",
                    va="center",
                    color=paint,
                )
    ax.set_xscale("log")
    ax.set_yticks(range(len(faults)), [known[name] for name in faults])
    ax.set_ylim(len(faults) - 0.5, -0.5)
    ax.grid(axis="x", linewidth=0.3)
    ax.set_xlabel("added time: median to longest (ms)")
    ax.set_title("fault of the server")
    if clients:
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.3, -0.25), ncols=2, frameon=False, fontsize=6.5
        )


def _warm(ax: Axes, rows: pd.DataFrame) -> None:
    for today, colour, marker, label in (
        ("same", "blue", "o", "popularity as yesterday"),
        ("shifted", "vermilion", "s", "popularity dealt anew"),
    ):
        own = rows[rows["popularity"] == today].sort_values("preload_share")
        if own.empty:
            continue
        middle = own["hit_ratio_window"].to_numpy() * 100
        # The range over the days is shown, because there are only a few.
        low = own["hits_window_min"].to_numpy() / own["window"].to_numpy() * 100
        high = own["hits_window_max"].to_numpy() / own["window"].to_numpy() * 100
        ax.errorbar(
            own["preload_share"] * 100,
            middle,
            yerr=np.maximum([middle - low, high - middle], 0),
            color=style.OKABE_ITO[colour],
            marker=marker,
            markersize=4,
            linewidth=1,
            label=label,
        )
        ax.set_ylabel(f"hits in the first {own['window'].iloc[0]:.0f} (%)")
        ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.25), frameon=False, fontsize=6.5)
    ax.set_xlabel("keys preloaded (%)")
    ax.set_title("warm start")


def _errors(ax: Axes, rows: pd.DataFrame) -> None:
    for policy, (label, colour) in _variants.looks(_POLICIES, rows["policy"]).items():
        own = rows[rows["policy"] == policy].sort_values("error_rate")
        if own.empty:
            continue
        ax.plot(
            own["error_rate"] * 100,
            own["errors_served"] / own["requests"] * 100,
            color=style.OKABE_ITO[colour],
            marker={"cache_all": "s", "negative_ttl": "^", "skip_errors": "o"}[policy],
            markersize=4,
            linewidth=1,
            label=label,
        )
        ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.25), frameon=False, fontsize=6.5)
    ax.set_xlabel("generations that fail (%)")
    ax.set_ylabel("requests with an error (%)")
    ax.set_title("errors")
