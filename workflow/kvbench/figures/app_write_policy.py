"""Staleness, store writes, latency and losses by write policy."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants, style

QUESTION = "Where should a write go, and what is stale or lost for it?"

_LABELS = {
    "aside_stale": "aside, cache not told",
    "aside_invalidate": "aside, invalidate",
    "aside_update": "aside, update",
    "read_through": "read-through",
    "write_through": "write-through",
    "write_around": "write-around",
    "write_back": "write-back",
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw one panel per measure, policies down the side."""
    table = one_machine(table)
    table = table[table["policy"].notna()]
    known = _variants.labels(_LABELS, table["policy"])
    if table.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    steady = table[table["kind"] == "steady"]
    shares = steady["write_share"].dropna().unique()
    share = min(shares, key=lambda one: abs(one - 0.1)) if len(shares) else np.nan
    steady = steady[steady["write_share"] == share]
    crash = table[table["kind"] == "crash"]
    settings = [
        (name, flush)
        for name in known
        for flush in sorted(table.loc[table["policy"] == name, "flush_every"].fillna(0).unique())
    ]
    figure, panels = plt.subplots(
        1, 4, figsize=(style.PAGE_WIDTH, 1.2 + 0.21 * len(settings)), sharey=True
    )
    stale, writes, latency, losses = panels
    colours = style.OKABE_ITO
    outsiders = sorted(steady["external_share"].dropna().unique())
    for place, (name, flush) in enumerate(settings):

        def own(rows: pd.DataFrame, name: str = name, flush: float = flush) -> pd.DataFrame:
            return rows[(rows["policy"] == name) & (rows["flush_every"].fillna(0) == flush)]

        for outside in outsiders:
            rows = own(steady)
            rows = rows[rows["external_share"] == outside]
            stale.plot(
                100 * rows["stale_share"],
                [place] * len(rows),
                "o" if outside == 0 else "D",
                markersize=4.5,
                markerfacecolor=colours["blue"] if outside == 0 else "white",
                color=colours["blue"],
                label=(
                    ("alone" if outside == 0 else f"other writer, {100 * outside:.0f} %")
                    if place == 0
                    else None
                ),
            )
        alone = own(steady)
        alone = alone[alone["external_share"] == 0]
        writes.plot(
            alone["store_writes"], [place] * len(alone), "s", markersize=4, color=colours["green"]
        )
        if alone["write_p50_s_ci_low"].notna().any():
            ends = 1e6 * alone[["write_p50_s_ci_low", "write_p50_s_ci_high"]].to_numpy()[0]
            latency.plot(ends, [place] * 2, color=colours["purple"], lw=3, alpha=0.4)
        for column, marker in (("write_p50_s", "o"), ("write_p99_s", "|")):
            latency.plot(
                1e6 * alone[column],
                [place] * len(alone),
                marker,
                markersize=4 if marker == "o" else 7,
                color=colours["purple"],
                linestyle="",
                label={"o": "median", "|": "99th percentile"}[marker] if place == 0 else None,
            )
        crashed = own(crash)
        losses.plot(
            crashed["lost_keys"],
            [place] * len(crashed),
            "X",
            markersize=4.5,
            color=colours["vermilion"],
        )
    names = [known[name] + (f", flush {flush:.0f}" if flush else "") for name, flush in settings]
    stale.set_yticks(range(len(settings)), names, fontsize=6.5)
    stale.set_ylim(len(settings) - 0.4, -1.9)
    stale.set_xlabel("stale reads (%)")
    stale.legend(frameon=False, fontsize=6, loc="upper right", handletextpad=0.2)
    writes.set_xlabel("rows written\nto the store")
    writes.set_xlim(0, 1.08 * max(1.0, steady["store_writes"].max()))
    latency.set(xlabel="time of a write (µs)", xscale="log")
    latency.legend(frameon=False, fontsize=6, loc="upper right", handletextpad=0.2)
    losses.set_xlabel("keys lost\nin a crash")
    for panel in panels:
        panel.grid(axis="y", linewidth=0.4, alpha=0.6)
    figure.suptitle(
        f"{_app.title(QUESTION, steady, 'operations', 'operations')}, {100 * share:.0f} % writes",
        fontsize=9,
    )
    return figure
