"""Time of repeated HTTP requests, and which clients obey the origin."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants, style

QUESTION = "What does a client-side HTTP cache save, and does it obey the origin?"

_LOOKS = {
    "none": ("requests.get", "black", "X"),
    "session": ("session", "sky", "o"),
    "requests_cache_revalidating": ("requests-cache,\nheeds headers", "green", "s"),
    "requests_cache": ("requests-cache,\ndefault", "blue", "D"),
    "lru_cache": ("lru_cache", "orange", "^"),
    "dict": ("dict", "vermilion", "v"),
}
_BEHAVIOURS = {
    "max_age": "max-age",
    "no_cache": "no-cache\n+ ETag",
    "no_store": "no-store",
    "error": "error\n500",
    "vary": "Vary",
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw wall time against the number of requests (left) and obedience by rule (right)."""
    table = one_machine(table)
    table = table[table["client"].notna()]
    looks = _variants.looks(_LOOKS, table["client"])
    behaviours = _variants.labels(_BEHAVIOURS, table["behaviour"])
    if table.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(style.PAGE_WIDTH, 2.8), width_ratios=[1, 1.15]
    )
    reusable = table[table["behaviour"] == "max_age"]
    for name, (label, colour, marker) in looks.items():
        own = reusable[reusable["client"] == name]
        own = own.sort_values("requests")
        # An interval stands only where there were rounds enough for one.
        reach = [
            (own["wall_s"] - own["wall_s_ci_low"]).fillna(0).clip(lower=0),
            (own["wall_s_ci_high"] - own["wall_s"]).fillna(0).clip(lower=0),
        ]
        left.errorbar(
            own["requests"],
            own["wall_s"],
            yerr=reach,
            color=style.OKABE_ITO[colour],
            marker=marker,
            markersize=4,
            linewidth=1,
            label=label.replace("\n", " "),
        )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="requests for one address that may be reused",
        ylabel="time of all (s)",
    )
    left.legend(frameon=False, fontsize=6, handlelength=1.5)
    grid, notes = _obedience(table, list(looks), list(behaviours))
    sns.heatmap(
        np.array(grid),
        ax=right,
        annot=np.array(notes),
        fmt="",
        annot_kws={"fontsize": 6.5, "color": "black"},
        cmap=ListedColormap(["#F3C9B0", "#BFE3D5", "#EEEEEE"]),
        vmin=0,
        vmax=2,
        cbar=False,
        xticklabels=list(behaviours.values()),
        yticklabels=[label for label, _, _ in looks.values()],
    )
    right.tick_params(length=0, labelsize=6.5, labelrotation=0)
    plt.setp(right.get_yticklabels(), verticalalignment="center")
    right.set_title("obeys RFC 9111? requests that reached the origin of all sent", fontsize=7)
    figure.suptitle(_app.title(QUESTION, table, "runs", "runs"), fontsize=9)
    return figure


def _obedience(
    table: pd.DataFrame, clients: list[str], behaviours: list[str]
) -> tuple[list[list[int]], list[list[str]]]:
    """Return 0 (wrong), 1 (right) or 2 (not measured) per client and rule, with its words."""
    grid, notes = [], []
    for name in clients:
        grid.append([])
        notes.append([])
        for behaviour in behaviours:
            own = table[(table["client"] == name) & (table["behaviour"] == behaviour)]
            if own.empty:
                grid[-1].append(2)
                notes[-1].append("not measured")
                continue
            longest = own.loc[own["requests"].idxmax()]
            right = bool(own["rfc_correct"].astype(bool).all())
            grid[-1].append(int(right))
            counts = f"{longest['origin_requests']:.0f} of {longest['requests']:.0f}"
            notes[-1].append(f"{'yes' if right else 'no'}\n{counts}")
    return grid, notes
