"""Lossy caches: bytes per token against what they lose, one named point a strategy."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis import selection
from kvbench.figures import _kv, style

QUESTION = "How much quality does a smaller cache cost?"
TABLES = ("kv_quality",)

#: Divergences up to here are rounding (float32 attention in another order) and drawn at the edge.
ROUNDING_NATS = 1e-8


def draw(quality: pd.DataFrame) -> Figure:
    """Draw one panel per machine and model: bytes per token against KL, each point with its name.

    Strategies on no other's wrong side, in bytes and KL both, are joined by a line.
    """
    rows = quality[quality["kl_nats"].notna() & quality["kv_bytes_per_token"].notna()]
    if rows.empty:
        return _kv.empty(
            QUESTION, "quality was not measured: it needs a trained model and reference replies"
        )
    groups = list(rows.groupby(["machine", "model"], sort=True))
    groups.sort(key=lambda group: group[0][0] != selection.HERE)
    height = min(_kv.TALLEST, 2.6 * len(groups))
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(style.PAGE_WIDTH, 0.7 + height), squeeze=False
    )
    for ax, ((machine, model), own) in zip(axes[:, 0], groups, strict=True):
        ax.set_title(f"{machine} · {model}", fontsize=7.5, style="italic", loc="left")
        _points(ax, own)
        _front(ax, own)
        ax.set_ylabel("KV cache per token (KiB)")
        ax.margins(y=0.12)
        ax.set_ylim(bottom=0)
    figure.suptitle(QUESTION, fontsize=9)
    note = "median over turns; bar: 95 % interval; line: nothing is smaller and better"
    figure.supxlabel(note, fontsize=6.5, color="0.35")
    return figure


def _points(ax: Axes, rows: pd.DataFrame) -> None:
    """One point a row, at its KL; rounding is put at the edge. Points on one spot share a name."""
    spots: dict[tuple[int, int], list] = {}
    for row in rows.to_dict("records"):
        look = style.look(row["strategy"])
        centre = max(float(row["kl_nats"]), ROUNDING_NATS)
        height = float(row["kv_bytes_per_token"]) / 1024
        ends = [row["kl_nats_ci_low"], row["kl_nats_ci_high"]]
        if not any(pd.isna(end) for end in ends):
            low, high = (max(float(end), ROUNDING_NATS) for end in ends)
            ax.plot([low, high], [height] * 2, color=look.colour, linewidth=0.9)
        ax.plot(
            centre,
            height,
            marker=look.marker,
            color=look.colour,
            ms=5 * look.size,
            mec="white",
            mew=0.5,
            linestyle="none",
        )
        spot = (round(8 * math.log10(centre)), round(10 * height))
        names = spots.setdefault(spot, [centre, height])
        if look.label not in names[2:]:
            names.append(look.label)
    for centre, height, *names in spots.values():
        ax.annotate(
            ", ".join(names),
            (centre, height),
            xytext=(4, 5),
            textcoords="offset points",
            fontsize=6.5,
        )
    ax.set_xscale("log")
    ax.set_xlim(left=ROUNDING_NATS / 2)
    ax.set_xlabel("KL from the exact cache (nats per token; left edge: rounding)")
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _front(ax: Axes, rows: pd.DataFrame) -> None:
    """Join the points that no other beats in bytes and KL both, within each scenario."""
    for _, own in rows.groupby("scenario", sort=True):
        points = sorted(
            zip(
                own["kl_nats"].clip(lower=ROUNDING_NATS),
                own["kv_bytes_per_token"] / 1024,
                strict=True,
            )
        )
        front: list[tuple[float, float]] = []
        for divergence, size in points:
            if not front or size < front[-1][1]:
                front.append((divergence, size))
        ax.plot(*zip(*front, strict=True), color="0.6", linewidth=0.7, zorder=1)
