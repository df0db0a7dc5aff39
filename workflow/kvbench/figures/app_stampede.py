"""Loads and waiting times when many threads want one value."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants, style

QUESTION = "How often is one value loaded when many threads want it at once?"

_LABELS = {
    "none": "none",
    "lru_cache": "lru_cache",
    "cachetools_lock": "cachetools, lock",
    "cachetools_condition": "cachetools, condition",
    "single_flight": "single flight",
    "xfetch": "XFetch",
    "stale_while_revalidate": "stale while revalidate",
    "set_nx": "SET NX on the server",
}
_ALIKE = "not told apart from none, within rounds"
_LOOKS = (("sky", "o"), ("blue", "s"), ("vermilion", "^"), ("purple", "D"), ("black", "v"))


def draw(table: pd.DataFrame) -> Figure:
    """Draw loads (left) and the 99th percentile of the waiting time (right) per protection.

    Hollow where rounds do not tell the waiting time apart from that without protection.
    """
    table = one_machine(table)
    table = table[table["protection"].notna()]
    labels = _variants.labels(_LABELS, table["protection"])
    if table.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    places: dict[tuple[str, float], str] = {}
    for name, label in labels.items():
        for beta in sorted(table.loc[table["protection"] == name, "beta"].fillna(0).unique()):
            places[(name, beta)] = label + (f", β = {beta:g}" if name == "xfetch" else "")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(style.PAGE_WIDTH, 1.1 + 0.24 * len(places)), sharey=True
    )
    crowds = sorted(table["threads"].unique())
    for number, threads in enumerate(crowds):
        colour, marker = _LOOKS[number % len(_LOOKS)]
        offset = (number - (len(crowds) - 1) / 2) * 0.22
        for place, (name, beta) in enumerate(places):
            own = table[
                (table["protection"] == name)
                & (table["beta"].fillna(0) == beta)
                & (table["threads"] == threads)
            ]
            label = f"{threads:.0f} thread{'s' if threads > 1 else ''}" if place == 0 else None
            shared = {"color": style.OKABE_ITO[colour], "marker": marker, "markersize": 4}
            at = [place + offset] * len(own)
            left.plot(own["loads"], at, linestyle="", label=label, **shared)
            wait = own["wait_p99_s"].to_numpy() * 1000
            ends = [
                wait - own["wait_p99_s_ci_low"].to_numpy() * 1000,
                own["wait_p99_s_ci_high"].to_numpy() * 1000 - wait,
            ]
            right.errorbar(
                wait,
                at,
                xerr=np.maximum(ends, 0),
                linestyle="",
                elinewidth=0.8,
                **shared,
            )
            if _app.not_told_apart(own, "wait_p99_ratio").any():
                right.plot(wait, at, linestyle="", mfc="white", zorder=3, **shared)
    # Fewer are seen where somebody still waited for a fresh value when the asking ended.
    minimum = table["loads_minimum"].max()
    left.axvline(minimum, color=style.OKABE_ITO["green"], linestyle="--", linewidth=1)
    left.annotate(
        f"enough to stay fresh: {minimum:.0f}",
        (minimum, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, 2),
        textcoords="offset points",
        fontsize=6.5,
        color=style.OKABE_ITO["green"],
    )
    left.set_yticks(range(len(places)), list(places.values()))
    left.set_ylim(len(places) - 0.4, -0.6)
    left.set_xscale("log")
    left.set_xlabel("loads during the run")
    right.set_xscale("log")
    right.set_xlabel("99th percentile of the waiting time (ms)")
    for ax in (left, right):
        ax.grid(axis="x", linewidth=0.3)
    handles = left.get_legend_handles_labels()[0]
    if _app.not_told_apart(table, "wait_p99_ratio").any():
        handles.append(
            Line2D([], [], ls="", marker="o", ms=4, color="0.35", mfc="white", label=_ALIKE)
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(_app.title(QUESTION, table, "requests", "requests"), fontsize=9)
    return figure
