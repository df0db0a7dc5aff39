"""Figure: search time of the vector indexes beside the time of an embedding."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv
from kvbench.figures.style import COLUMN_WIDTH, OKABE_ITO

QUESTION = "From how many entries on does an approximate index pay?"

_INDEXES = {
    "flat": ("flat (exact)", OKABE_ITO["black"], "o-"),
    "hnsw": ("HNSW", OKABE_ITO["orange"], "s--"),
    "sq8": ("8-bit scalars", OKABE_ITO["blue"], "^:"),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw median search times over the entries; the line is one embedding.

    Hollow where turns of the index do not differ from those of flat.
    """
    table = one_machine(table)
    if (table["part"] == "index").sum() == 0:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, axes = plt.subplots(figsize=(COLUMN_WIDTH, 2.8))
    for name, (label, colour, line) in _INDEXES.items():
        rows = table[(table["part"] == "index") & (table["index"] == name)].sort_values("entries")
        if rows.empty:
            continue
        low = 1e3 * (rows["p50_s"] - rows["p50_s_ci_low"]).clip(lower=0)
        high = 1e3 * (rows["p50_s_ci_high"] - rows["p50_s"]).clip(lower=0)
        axes.errorbar(
            rows["entries"],
            1e3 * rows["p50_s"],
            yerr=[low, high],
            fmt=line,
            ms=4,
            color=colour,
            label=label,
        )
        alike = rows[_app.not_told_apart(rows, "search_ratio")]
        axes.plot(
            alike["entries"],
            1e3 * alike["p50_s"],
            line[0],
            ms=4,
            color=colour,
            mfc="white",
            zorder=3,
        )
    searches = table[table["part"] == "index"]
    embedding = table[(table["part"] == "latency") & (table["step"] == "embed")]["p50_s"]
    if not embedding.empty:
        axes.axhline(
            1e3 * float(embedding.iloc[0]),
            color=OKABE_ITO["vermilion"],
            lw=1,
            label="one embedding",
        )
    if _app.not_told_apart(searches, "search_ratio").any():
        axes.plot([], [], "o", ms=4, color="0.35", mfc="white", label="not told apart from flat")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="entries",
        ylabel="median search (ms), 95 % interval",
    )
    axes.legend(frameon=False, fontsize=6.5)
    figure.suptitle(_app.title(QUESTION, searches, "queries", "searches a point"), fontsize=7.5)
    return figure
