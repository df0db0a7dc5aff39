"""The exact response cache: time of a hit per backend, wrong answers per key, frozen sampling."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants, style

QUESTION = "What does an exact response cache save, and what must its key contain?"

_BACKENDS = {
    "memory": "memory",
    "sqlite": "SQLite",
    "server_unix": "server, Unix socket",
    "server_tcp": "server, TCP",
}
_POLICIES = {
    "off": ("no cache", "black", "X"),
    "skip": ("not stored", "grey", "o"),
    "seed": ("keyed by seed", "green", "s"),
    "pool": ("pool of draws", "sky", "^"),
    "freeze": ("frozen", "vermilion", "v"),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw hit times per backend, wrong answers per definition of the key, distinct samples."""
    table = one_machine(table)
    if table.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, axes = plt.subplots(
        1, 3, figsize=(style.PAGE_WIDTH, 3.0), gridspec_kw={"width_ratios": [1.1, 1, 1]}
    )
    _times(axes[0], table[table["kind"] == "latency"])
    _wrong(axes[1], table[table["kind"] == "key"])
    _samples(axes[2], table[table["kind"] == "sampling"])
    figure.suptitle(_app.title(QUESTION, table, "requests", "requests"), fontsize=9)
    return figure


def _times(ax: Axes, rows: pd.DataFrame) -> None:
    backends = _variants.labels(_BACKENDS, rows.loc[rows["backend"] != "none", "backend"])
    names = [name for name in backends if (rows["backend"] == name).any()]
    for place, name in enumerate(names):
        own = rows[(rows["backend"] == name) & (rows["hits"] > 0)]
        offsets = np.linspace(-0.2, 0.2, len(own)) if len(own) > 1 else [0.0]
        for offset, (_, row) in zip(offsets, own.iterrows(), strict=True):
            for column, colour, marker in (
                ("hit_p50_s", "blue", "o"),
                ("hit_p99_s", "vermilion", "^"),
            ):
                middle = row[column] * 1000
                ends = [
                    [middle - row[f"{column}_ci_low"] * 1000],
                    [row[f"{column}_ci_high"] * 1000 - middle],
                ]
                ax.errorbar(
                    middle,
                    place + offset,
                    xerr=np.maximum(ends, 0),
                    color=style.OKABE_ITO[colour],
                    marker=marker,
                    markersize=3.5,
                    linewidth=0.8,
                    label={"hit_p50_s": "median", "hit_p99_s": "p99"}[column],
                )
    ax.axvline(10, color=style.OKABE_ITO["grey"], linestyle="--", linewidth=0.9)
    ax.annotate(
        "claim: below 10 ms",
        (10, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(2, 0),
        textcoords="offset points",
        rotation=90,
        ha="left",
        fontsize=6,
        color=style.OKABE_ITO["grey"],
    )
    ax.set_xscale("log")
    ax.set_xlim(right=max(30, ax.get_xlim()[1]))
    ax.set_yticks(range(len(names)), [backends[name] for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    streams = sorted(rows["exponent"].dropna().unique())
    said = [f"Zipf {one:g}" if one else "uniform" for one in streams]
    ax.set_xlabel(
        "time of a hit (ms), log" + (f"\nfrom above: {', '.join(said)}" if said[1:] else "")
    )
    ax.set_title("where answers are stored")
    _legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.36), ncols=2)


def _wrong(ax: Axes, rows: pd.DataFrame) -> None:
    rows = rows.sort_values(["wrong_answers", "hits_lost"], kind="stable").reset_index(drop=True)
    share_wrong = rows["wrong_answers"] / rows["requests"] * 100
    share_lost = rows["hits_lost"] / rows["requests"] * 100
    ax.barh(rows.index, share_wrong, color=style.OKABE_ITO["vermilion"], label="wrong answers")
    ax.barh(
        rows.index,
        share_lost,
        left=share_wrong,
        color=style.OKABE_ITO["sky"],
        hatch="///",
        edgecolor="white",
        label="hits lost",
    )
    ax.set_yticks(rows.index, [_key(name) for name in rows["key_fields"]])
    ax.tick_params(axis="y", labelsize=6)
    ax.set_xlabel("share of requests (%)")
    ax.set_title("what the key holds")
    ax.invert_yaxis()
    _legend(ax, loc="upper center", bbox_to_anchor=(0.4, -0.27), ncols=2)


def _key(name: str) -> str:
    return {"guide md5": "the guide's md5"}.get(name, name)


def _samples(ax: Axes, rows: pd.DataFrame) -> None:
    known = _variants.looks(_POLICIES, rows["policy"])
    policies = [name for name in known if (rows["policy"] == name).any()]
    for name in policies:
        label, colour, marker = known[name]
        own = rows[rows["policy"] == name].sort_values("temperature")
        ax.plot(
            own["temperature"],
            own["distinct_answers"],
            color=style.OKABE_ITO[colour],
            marker=marker,
            markersize=4,
            linewidth=1,
            # Two policies may coincide; the hollow marker lets the other be seen.
            markerfacecolor="none" if name == "skip" else None,
            linestyle="--" if name == "skip" else "-",
            label=label,
        )
    ax.set_ylim(bottom=0)
    ax.set_xlabel("temperature")
    ax.set_ylabel("answers per prompt")
    ax.set_title("what happens to sampling")
    if policies:
        _legend(ax, loc="upper center", bbox_to_anchor=(0.45, -0.27), ncols=2)


def _legend(ax: Axes, **place: object) -> None:
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        ax.legend(unique.values(), unique.keys(), frameon=False, fontsize=6.5, **place)
