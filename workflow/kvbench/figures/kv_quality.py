"""Lossy caches: bytes and time per token against what they lose, one point a strategy."""

from __future__ import annotations

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
    """Draw one row of panels per machine and model: bytes, and time, against KL.

    Strategies on no other's wrong side, in bytes and KL both, are joined by a line.
    """
    rows = quality[quality["kl_nats"].notna() & quality["kv_bytes_per_token"].notna()]
    if rows.empty:
        return _kv.empty(
            QUESTION, "quality was not measured: it needs a trained model and reference replies"
        )
    groups = list(rows.groupby(["machine", "model"], sort=True))
    groups.sort(key=lambda group: group[0][0] != selection.HERE)
    height = min(_kv.TALLEST, 2.5 * len(groups))
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(style.PAGE_WIDTH, 0.9 + height), squeeze=False
    )
    handles: dict[str, object] = {}
    for (left, right), ((machine, model), own) in zip(axes, groups, strict=True):
        left.set_title(f"{machine} · {model}", fontsize=7.5, style="italic", loc="left")
        _points(left, own, own["kv_bytes_per_token"] / 1024, handles)
        _front(left, own)
        left.set_ylabel("KV cache per token (KiB)")
        left.margins(y=0.1)
        left.set_ylim(bottom=0)
        timed = own[own["tpot_s"].notna()]
        if timed.empty:
            right.text(0.5, 0.5, "not timed", transform=right.transAxes, ha="center", color="0.5")
            right.set_xticks([])
            right.set_yticks([])
            continue
        _points(right, timed, timed["tpot_s"] * 1000, handles)
        right.set_ylabel("time per output token (ms)")
        right.margins(y=0.1)
        right.set_ylim(bottom=0)
    ordered = {style.label(name): handles[name] for name in selection.in_order(handles)}
    note = "median over turns; bar: 95 % interval; line: nothing is smaller and better"
    _kv.finish_lines(figure, ordered, QUESTION, note)
    return figure


def _points(ax: Axes, rows: pd.DataFrame, heights: pd.Series, handles: dict[str, object]) -> None:
    """One point a row, at its KL; rounding is put at the edge."""
    for index, row in rows.iterrows():
        look = style.look(row["strategy"])
        centre = max(float(row["kl_nats"]), ROUNDING_NATS)
        ends = [row["kl_nats_ci_low"], row["kl_nats_ci_high"]]
        if not any(pd.isna(end) for end in ends):
            low, high = (max(float(end), ROUNDING_NATS) for end in ends)
            ax.plot([low, high], [heights[index]] * 2, color=look.colour, linewidth=0.9)
        (handles[row["strategy"]],) = ax.plot(
            centre,
            heights[index],
            marker=look.marker,
            color=look.colour,
            ms=5 * look.size,
            mec="white",
            mew=0.5,
            linestyle="none",
        )
    ax.set_xscale("log")
    ax.set_xlim(left=ROUNDING_NATS / 2)
    ax.set_xlabel("KL from the exact cache\n(nats per token; left edge: rounding)")
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
