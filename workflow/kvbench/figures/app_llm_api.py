"""Figure: the time of a call to an API, directly and through the caching proxy."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants
from kvbench.figures.style import OKABE_ITO, PAGE_WIDTH

QUESTION = "What does a caching proxy do to the time of a call to a language model's API?"

_CALLS = {
    "direct": ("without the proxy", "grey"),
    "no_store": ("no-store", "grey"),
    "first": ("first call", "vermilion"),
    "near_miss": ("near miss", "vermilion"),
    "paraphrased": ("paraphrased", "orange"),
    "paraphrased_hit": ("paraphrased, hits only", "orange"),
    "repeated": ("repeated", "green"),
    "stream_first": ("first, streamed", "blue"),
    "stream_repeated": ("repeated, streamed", "blue"),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw the median (with interval) and the range of each kind of call, slowest on top."""
    table = one_machine(table)
    known = _variants.looks(_CALLS, table["call"])
    rows = {name: table[table["call"] == name] for name in known}
    rows = {name: found.iloc[0] for name, found in rows.items() if not found.empty}
    if not rows:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, axes = plt.subplots(figsize=(PAGE_WIDTH, 1.0 + 0.24 * len(rows)))
    labels = []
    for place, (name, row) in enumerate(rows.items()):
        label, colour = known[name]
        colour = OKABE_ITO[colour]
        middle, low, high = (1e3 * row[f"call_p50_s{end}"] for end in ("", "_ci_low", "_ci_high"))
        axes.plot([1e3 * row["min_s"], 1e3 * row["max_s"]], [place] * 2, color=colour, lw=0.8)
        axes.plot([low, high], [place] * 2, color=colour, lw=3.5, alpha=0.45)
        axes.plot(middle, place, "o", color=colour, ms=4.5)
        labels.append(f"{label} ({row['hits']:.0f} of {row['calls']:.0f} hits)")
    axes.set(
        xscale="log",
        xlabel="time of the call (ms): median, its 95 % interval (thick), range (thin)",
        yticks=range(len(rows)),
        yticklabels=labels,
    )
    axes.invert_yaxis()
    figure.suptitle(_app.title(QUESTION, pd.DataFrame(rows.values()), "calls", "calls"), fontsize=9)
    axes.grid(axis="x", which="major", lw=0.4, alpha=0.6)
    return figure
