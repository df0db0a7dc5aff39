"""Time of memoised and plain recursion, and whether the ways to memoise differ."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants, style

QUESTION = "What does memoising a recursive function save?"

#: Label, colour and marker of each way, from the slowest to the fastest.
_LOOKS = {
    "plain": ("no cache", "black", "X"),
    "lru_1": ("lru_cache(1)", "vermilion", "v"),
    "lru_2": ("lru_cache(2)", "orange", "^"),
    "dict": ("own decorator", "purple", "D"),
    "lru_128": ("lru_cache(128)", "green", "s"),
    "lru_3": ("lru_cache(3)", "yellow", "P"),
    "lru_cache": ("lru_cache(None)", "sky", "o"),
    "cache": ("cache", "blue", "*"),
    "iterative": ("loop, no cache", "grey", "d"),
}

#: Ways that are orders of magnitude slower than the others at the largest n.
_SLOW = ("plain", "lru_1", "lru_2")


def draw(table: pd.DataFrame) -> Figure:
    """Draw the first call against n (left) and the fast ways at the largest n (right)."""
    table = one_machine(table)
    table = table[table["variant"].notna()]
    looks = _variants.looks(_LOOKS, table["variant"])
    if table.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE_WIDTH, 2.7))
    cold = table[table["state"] == "cold"]
    for name, (label, colour, marker) in looks.items():
        own = cold[cold["variant"] == name].sort_values("n")
        left.plot(
            own["n"],
            own["median_s"],
            color=style.OKABE_ITO[colour],
            marker=marker,
            markersize=4,
            linewidth=1,
            label=label,
        )
    left.set(yscale="log", xlabel="n of the Fibonacci number", ylabel="first call (s)")
    left.legend(loc="upper left", ncols=2, frameon=False, fontsize=6, handlelength=1.4)
    left.set_ylim(top=left.get_ylim()[1] * 300)
    largest = table["n"].max()
    fast = [name for name in looks if name not in _SLOW]
    at_largest = table[table["n"] == largest]
    for place, name in enumerate(fast):
        label, colour, marker = looks[name]
        for state, filled in (("cold", True), ("warm", False)):
            own = at_largest[(at_largest["variant"] == name) & (at_largest["state"] == state)]
            median = 1e6 * own["median_s"].to_numpy()
            reach = [
                np.maximum(0, median - 1e6 * own["p25_s"].to_numpy()),
                np.maximum(0, 1e6 * own["p75_s"].to_numpy() - median),
            ]
            right.errorbar(
                median,
                [place] * len(own),
                xerr=reach,
                color=style.OKABE_ITO[colour],
                marker=marker,
                markersize=5,
                markerfacecolor=None if filled else "white",
                linestyle="",
                elinewidth=1,
            )
    right.set_yticks(range(len(fast)), [looks[name][0] for name in fast])
    right.set(xscale="log", xlabel=f"one call at n = {largest:.0f} (µs), median and quartiles")
    for filled, text in ((True, "first call"), (False, "second call")):
        right.plot(
            [],
            [],
            "o",
            color=style.OKABE_ITO["black"],
            markersize=4,
            markerfacecolor=None if filled else "white",
            label=text,
        )
    right.set_ylim(-0.5, len(fast) + 0.4)
    right.legend(loc="upper left", frameon=False, fontsize=6.5, ncols=2)
    figure.suptitle(_app.title(QUESTION, table, "samples", "calls"), fontsize=9)
    return figure
