"""Batches: tokens per second and time per token against the requests generated for at once."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from kvbench.analysis import batches, selection
from kvbench.figures import _kv, style

QUESTION = "What does it gain to generate for several requests at once?"
TABLES = ("kv_summary",)
#: This figure is about batches: it is given their rows too.
BATCHES = True

#: Most sweeps that fit a page.
MOST = 3
#: Column of a panel, its prediction, its axis label, and the factor from the table's unit.
_PANELS = (
    ("output_tokens_per_s", "predicted_output_tokens_per_s", "throughput (tokens/s)", 1.0),
    ("tpot_s", "predicted_tpot_s", "time per token (ms)", 1e3),
)
_NOTE = "marker: median; bar: 95 % interval; throughput of all requests together"
_ROOF = "roof: the least time of any of these strategies"


def draw(summary: pd.DataFrame) -> Figure:
    """Draw two panels per sweep, the batch on the x axis: a line per strategy, and the machine's roof."""
    found = batches.sweeps(summary)[:MOST]
    if not found:
        return _kv.empty(QUESTION, "no scenario was measured with two batches")
    figure = plt.figure(figsize=(style.PAGE_WIDTH, 0.9 + 2.2 * len(found)))
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    handles: dict[str, object] = {}
    for part, sweep in zip(parts, found, strict=True):
        rows = sweep.rows
        parts = [_kv.heading(sweep.group, sweep.scenario), f"{sweep.lengths} lengths"]
        heading = " · ".join([*parts, _kv.counted(rows)])
        part.suptitle(heading, x=0.012, ha="left", fontsize=7.5, style="italic")
        for ax, panel in zip(part.subplots(1, len(_PANELS)), _PANELS, strict=True):
            _panel(ax, rows, *panel, handles)
    _kv.finish_lines(figure, handles, QUESTION, _NOTE)
    return figure


def _panel(
    ax: Axes,
    rows: pd.DataFrame,
    column: str,
    prediction: str,
    label: str,
    factor: float,
    handles: dict[str, object],
) -> None:
    """One measure against the batch."""
    seen: list[float] = []
    order = selection.in_order(rows["strategy"])
    for place, strategy in enumerate(order):
        own = rows[rows["strategy"] == strategy].sort_values("requests")
        centres = factor * own[f"{column}_median"]
        # A number without an interval has a bar of no length.
        low, high = (
            factor * own[f"{column}_ci_{end}"].fillna(own[f"{column}_median"])
            for end in ("low", "high")
        )
        look = style.look(strategy)
        # Beside each other, so that no interval hides another.
        beside = 2 ** (0.06 * (place - (len(order) - 1) / 2))
        handles[look.label] = ax.errorbar(
            own["requests"] * beside,
            centres,
            yerr=[centres - low, high - centres],
            **_kv.line_of(look),
            linewidth=1,
            elinewidth=1.2,
        )
        seen += [*low, *high]
    if rows[prediction].notna().any():
        by_batch = rows.groupby("requests", sort=True)[prediction]
        roof = factor * (by_batch.max() if column == "output_tokens_per_s" else by_batch.min())
        ax.plot(roof.index, roof, color="0.25", linestyle=(0, (4, 2)), linewidth=0.9)
        handles[_ROOF] = Line2D([], [], color="0.25", linestyle=(0, (4, 2)), linewidth=0.9)
        seen += roof.dropna().tolist()
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(sorted(rows["requests"].unique())))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("requests at once")
    if any(value > 0 for value in seen):
        ax.set_yscale("log")
    ax.set_ylabel(label)
    ax.margins(x=0.08)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
