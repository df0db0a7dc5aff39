"""Lossy caches: bytes per token against what they lose, one named point a strategy."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from kvbench.analysis import selection
from kvbench.figures import _kv, style

QUESTION = "How much quality does a smaller cache cost?"
TABLES = ("kv_quality", "kv_replies")

#: Divergences up to here are rounding (float32 attention in another order) and drawn at the edge.
ROUNDING_NATS = 1e-8


def draw(quality: pd.DataFrame, replies: pd.DataFrame) -> Figure:
    """Draw one panel per machine and model: bytes per token against KL, each point with its name.

    Strategies on no other's wrong side, in bytes and KL both, are joined by a line.

    Parameters
    ----------
    quality, replies:
        The tables ``kv_quality`` and ``kv_replies``; the latter counts the turns behind a point.
    """
    rows = quality[quality["kl_nats"].notna() & quality["kv_bytes_per_token"].notna()]
    if rows.empty:
        return _kv.empty(
            QUESTION, "quality was not measured: it needs a trained model and reference replies"
        )
    groups = list(rows.groupby(["machine", "model"], sort=True))
    groups.sort(key=lambda group: group[0][0] != selection.HERE)
    height = min(_kv.TALLEST, 2.2 * len(groups))
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(style.PAGE_WIDTH, 0.9 + height),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    named = []
    for ax, ((machine, model), own) in zip(axes[:, 0], groups, strict=True):
        parts = [_kv.called(machine), _kv.called(model), _turns(own, replies)]
        _kv.head_panel(ax, " · ".join(filter(None, parts)))
        named.append(_points(ax, own))
        _front(ax, own)
        ax.set_ylabel("KV cache per token (KiB)")
    ax.set_xscale("log")
    ax.set_xlim(left=ROUNDING_NATS / 2)
    ax.set_xlim(right=30 * ax.get_xlim()[1])
    ax.set_ylim(0, 1.12 * ax.get_ylim()[1])
    ax.set_xlabel("KL from the exact cache (nats per token; left edge: rounding)")
    figure.suptitle(QUESTION, fontsize=9)
    note = "median over turns; bar: 95 % interval; line: nothing is smaller and better"
    figure.supxlabel(note, fontsize=6.5, color="0.35")
    figure.draw_without_rendering()
    for ax, spots in zip(axes[:, 0], named, strict=True):
        _write_names(ax, spots)
    return figure


def _turns(rows: pd.DataFrame, replies: pd.DataFrame) -> str:
    """How many turns the points of a panel rest on."""
    cell = ["machine", "model", "device", "dtype", "scenario", "strategy"]
    counts = replies.merge(rows[cell].drop_duplicates(), on=cell).groupby(cell)["turn"].nunique()
    if counts.empty:
        return ""
    low, high = counts.min(), counts.max()
    return f"n = {low} turns" if low == high else f"n = {low} to {high} turns"


#: A point, or several on one spot: KL, KiB per token, the names, and how long their longest line
#: may get in another language.
Spot = tuple[float, float, str, int]

#: Where a name may stand beside its point, in points: right, centre or left of it, and how high.
_PLACES = (
    ("left", 5, 3),
    ("left", 5, -9),
    ("right", -5, 3),
    ("right", -5, -9),
    ("center", 0, 8),
    ("center", 0, -14),
    ("left", 5, 13),
    ("left", 5, -19),
)


#: From one line of a name to the next, in points.
LINE = 7.5


def _points(ax: Axes, rows: pd.DataFrame) -> list[Spot]:
    """One point a row, at its KL; rounding is put at the edge. Points on one spot share a name."""
    spots: dict[tuple[int, int], list] = {}
    lengths: dict[str, int] = {}
    for row in rows.to_dict("records"):
        look = style.look(row["strategy"])
        lengths[look.label] = max(len(look.label), len(look.label_pt or ""))
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
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    found = []
    for centre, height, *names in spots.values():
        # Two names a line: a longer one would run across its neighbours.
        lines = [names[start : start + 2] for start in range(0, len(names), 2)]
        longest = max(sum(lengths[name] + 2 for name in line) for line in lines)
        found.append((centre, height, "\n".join(map(", ".join, lines)), longest))
    return found


def _write_names(ax: Axes, spots: list[Spot]) -> None:
    """Write each name where it covers no point, no interval and no other name."""
    scale = ax.figure.dpi / 72
    # A name across an interval can be read; across a point or another name it cannot.
    taken = [
        (
            _box(ax.transData.transform(line.get_xydata()), 2 * scale),
            1 if len(line.get_xydata()) > 1 else 4,
        )
        for line in ax.get_lines()
        if line.get_zorder() > 1
    ]
    for centre, height, text, length in sorted(spots):
        x, y = ax.transData.transform((centre, height))
        boxes = []
        for side, right, up in _PLACES:
            # A letter of 6.5 points is about 3 wide.
            more = LINE * text.count("\n")
            width, tall = 3.1 * length * scale, (7 + more) * scale
            left = x + right * scale - width * {"left": 0, "center": 0.5, "right": 1}[side]
            # Further lines grow upwards above the point and downwards below it.
            bottom = up if up > 0 else up - more
            boxes.append(Bbox.from_bounds(left, y + bottom * scale, width, tall))
        covered = [
            sum(weight * bool(Bbox.intersection(box, other)) for other, weight in taken)
            + 9 * (box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1 or box.y0 < ax.bbox.y0)
            for box in boxes
        ]
        best = covered.index(min(covered))
        side, right, up = _PLACES[best]
        taken.append((boxes[best], 4))
        ax.annotate(
            text,
            (centre, height),
            xytext=(right, up if up > 0 else up + 7),
            textcoords="offset points",
            ha=side,
            va="bottom" if up > 0 else "top",
            fontsize=6.5,
            linespacing=LINE / 6.5,
        )


def _box(points: np.ndarray, margin: float) -> Bbox:
    """The box around some points of the screen."""
    return Bbox([points.min(axis=0) - margin, points.max(axis=0) + margin])


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
