"""What the KV figures share: dot panels with intervals, turn medians, axes, empty figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvbench.analysis import metrics, selection
from kvbench.figures import style
from kvbench.strategies.looks import Look

#: Raw samples are drawn one by one below this number (the house rule of the figures).
FEW = 20


@dataclass(frozen=True)
class Metric:
    """One panel: a column of the tables, its axis label with the unit."""

    column: str
    axis: str
    #: A second column, drawn hollow on the same axis.
    inner: str | None = None


def empty(question: str, why: str) -> Figure:
    """A figure that says why there is nothing to see."""
    figure = plt.figure(figsize=(style.PAGE_WIDTH, 1.2))
    figure.suptitle(question, fontsize=9)
    figure.text(0.5, 0.4, why, ha="center", va="center", color=style.OKABE_ITO["grey"])
    return figure


#: What a reader calls machines, models and scenarios whose id does not say it.
_NAMES = {
    selection.HERE: "this machine",
    "epyc-genoa-2core": "EPYC Genoa",
    "epyc-turin-2core": "EPYC Turin",
    "h100-16core": "H100",
    "h200-16core": "H200",
    "embedded": "embedded model",
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.2-1b-geometry": "Llama-3.2-1B geometry",
    "symposium_start": "start of the source's turn",
    selection.HEADLINE_SCENARIO: "the source's turn",
}


def called(identifier: str) -> str:
    """A machine, model or scenario as a figure writes it: words, not an id."""
    return _NAMES.get(identifier, identifier.replace("_", " "))


def heading(group: selection.Group, scenario: str | None = None) -> str:
    """One line that names what a panel shows."""
    parts = [called(group.machine), called(group.model), f"{group.dtype} on {group.device}"]
    return " · ".join([*parts, called(scenario)] if scenario else parts)


def line_of(look: Look) -> dict[str, object]:
    """How a line of a strategy is drawn from point to point: its colour and its marker, parted by white."""
    return {
        "color": look.colour,
        "marker": look.marker,
        "ms": 4 * look.size,
        "mec": "white",
        "mew": 0.4,
    }


#: Height of all panels of a figure together, in inches: it has to fit a page with its caption.
TALLEST = 8.1
#: Height of a row with its name, and of the line above the rows of a machine, in inches.
ROW, TITLE = 0.135, 0.24


def bands(
    headings: Sequence[str], rows: Sequence[float], columns: int, margin: float
) -> tuple[Figure, list[np.ndarray]]:
    """A page-wide figure with a row of ``columns`` panels per heading, on one scale per column.

    ``rows`` counts the names that a band has to hold; ``margin`` (title, axis and legend) is in inches.
    Tall figures are shrunk to a page.
    """
    heights = [TITLE + ROW * max(3, count) for count in rows]
    figure, grid = plt.subplots(
        len(headings),
        columns,
        figsize=(style.PAGE_WIDTH, min(TALLEST, sum(heights)) + margin),
        sharex="col",
        sharey="row",
        squeeze=False,
        height_ratios=heights,
    )
    for axes, text in zip(grid, headings, strict=True):
        head_panel(axes[0], text)
        for ax in axes[1:]:
            ax.tick_params(axis="y", left=False)
        for ax in axes:
            ax.tick_params(axis="y", labelsize=6.5)
    return figure, list(grid)


def head_panel(ax: Axes, text: str) -> None:
    """Write what a panel, or a row of panels, shows."""
    ax.set_title(text, fontsize=7.5, style="italic", loc="left")


def _number(value: object) -> float:
    return float(value) if value is not None and not pd.isna(value) else math.nan


_CALM = {"s": 5, "alpha": 0.35, "linewidths": 0}
_DISTURBED = {"s": 9, "alpha": 0.6, "linewidths": 0.7, "marker": "x"}


def draw_metric(
    ax: Axes,
    rows: pd.DataFrame,
    repeats: Mapping[str, pd.DataFrame],
    order: Sequence[str],
    metric: Metric,
) -> list[float]:
    """Draw one metric of one cell group: a line per strategy, its interval, its few samples.

    ``repeats`` holds for each strategy what :func:`kvbench.analysis.metrics.conversations` returns.
    Returned are all numbers that the axis has to hold.
    """
    by_strategy = rows.drop_duplicates("strategy").set_index("strategy")
    seen: list[float] = []
    for place, strategy in enumerate(order):
        row, look = by_strategy.loc[strategy], style.look(strategy)
        centre = _number(row.get(f"{metric.column}_median", row.get(metric.column)))
        low = _number(row.get(f"{metric.column}_ci_low"))
        high = _number(row.get(f"{metric.column}_ci_high"))
        points = repeats.get(strategy, pd.DataFrame())
        if metric.column in points:
            points = points[points[metric.column].notna()]
        if metric.column in points and 1 < len(points) < FEW:
            spread = place + np.linspace(-0.26, 0.26, len(points))
            disturbed = points["disturbed"].to_numpy()
            values = points[metric.column].to_numpy(dtype=float)
            for some, dots in ((~disturbed, _CALM), (disturbed, _DISTURBED)):
                if some.any():
                    ax.scatter(values[some], spread[some], color=look.colour, **dots)
            seen.extend(values.tolist())
        if not math.isnan(low) and not math.isnan(high):
            ax.plot([low, high], [place, place], color=look.colour, linewidth=1.6, zorder=3)
            seen.extend([low, high])
        if metric.inner is not None:
            inner = _number(row.get(metric.inner))
            if inner > 0:
                ax.plot(
                    inner,
                    place,
                    marker=look.marker,
                    mfc="white",
                    mec=look.colour,
                    ms=4.5 * look.size,
                    mew=0.9,
                    zorder=3,
                )
                seen.append(inner)
        if not math.isnan(centre):
            ax.plot(
                centre,
                place,
                marker=look.marker,
                color=look.colour,
                ms=5 * look.size,
                mec="white",
                mew=0.5,
                zorder=4,
            )
            seen.append(centre)
    return seen


def scale_column(axes: Sequence[Axes], seen: Sequence[float], label: str) -> None:
    """One scale for a quantity on all machines: logarithmic where its numbers span too much.

    A zero has no place on a logarithmic axis; its marks are put on the left edge.
    """
    positive = [value for value in seen if value > 0]
    if positive and max(positive) / min(positive) > 15:
        low, high = min(positive) / 1.25, max(positive) * 1.25
        for ax in axes:
            for line in ax.get_lines():
                at = np.asarray(line.get_xdata(), dtype=float)
                if at.size == 1 and at[0] == 0:
                    line.set(xdata=[low], clip_on=False)
        axes[-1].set_xscale("log")
        axes[-1].set_xlim(low, high)
        edge = "\nleft edge: 0" if min(seen) == 0 else ""
        axes[-1].set_xlabel(f"{label}{edge}")
    else:
        if seen:
            axes[-1].set_xlim(left=min(0.0, min(seen)))
            # More labels than this touch each other.
            axes[-1].xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes[-1].set_xlabel(label)
    for ax in axes:
        ax.grid(axis="x", color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)


def name_rows(ax: Axes, rows: pd.DataFrame, order: Sequence[str]) -> bool:
    """Write strategy names on the y axis; a star marks unstable ones. True when there is a star."""
    by_strategy = rows.drop_duplicates("strategy").set_index("strategy")
    names, starred = [], False
    for strategy in order:
        row = by_strategy.loc[strategy]
        star = row.get("unstable") in (True, "True")
        starred |= bool(star)
        names.append(style.label(strategy, row.get("compiled")) + (" *" if star else ""))
    ax.set_yticks(range(len(order)), names)
    ax.set_ylim(len(order) - 0.5, -0.5)
    return starred


def counted(rows: pd.DataFrame) -> str:
    """How many conversations a panel rests on: ``n = 3`` or ``n = 1 to 3``."""
    counts = rows["samples"].dropna().astype(int)
    if counts.empty:
        return ""
    low, high = counts.min(), counts.max()
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def metric_figure(
    question: str,
    panels: Sequence[Metric],
    summary: pd.DataFrame,
    samples: pd.DataFrame,
    *,
    model: str | None = None,
    scenario: str | None = None,
) -> Figure:
    """A row of dot panels per machine: one panel a metric, one line a strategy that was measured."""
    chosen = []
    for machine in selection.machines(summary):
        best = selection.widest(summary, machine, model=model, scenario=scenario)
        if best is not None:
            chosen.append(best)
    if not chosen:
        return empty(question, "no cell has been measured yet")
    tables = [selection.measured(selection.rows_of(summary, *one)) for one in chosen]
    counts = [rows["strategy"].nunique() for rows in tables]
    names = [f"{heading(*one)} · {counted(rows)}" for one, rows in zip(chosen, tables, strict=True)]
    figure, axes = bands(names, counts, len(panels), margin=1.0)
    starred = False
    seen: list[list[float]] = [[] for _ in panels]
    for line, (group, name), rows in zip(axes, chosen, tables, strict=True):
        order = selection.in_order(rows["strategy"])
        own = selection.rows_of(samples, group, name)
        repeats = {
            strategy: metrics.conversations(part) for strategy, part in own.groupby("strategy")
        }
        for ax, metric, numbers in zip(line, panels, seen, strict=True):
            numbers += draw_metric(ax, rows, repeats, order, metric)
        starred |= name_rows(line[0], rows, order)
    for place, metric in enumerate(panels):
        scale_column([line[place] for line in axes], seen[place], metric.axis)
    figure.suptitle(question, fontsize=9)
    notes = ["marker: median; bar: 95 % interval; dots: single conversations"]
    if any(metric.inner for metric in panels):
        notes.append("hollow: the KV cache alone")
    if starred:
        notes.append("* unstable")
    figure.supxlabel("; ".join(notes), fontsize=6.5, color="0.35")
    return figure


def finish_lines(figure: Figure, handles: dict[str, object], question: str, note: str) -> None:
    """Title, one legend for all panels, and the note that explains the marks."""
    figure.suptitle(question, fontsize=9)
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=math.ceil(len(handles) / math.ceil(len(handles) / 5)),  # rows of equal length
            frameon=False,
            title=note,
            title_fontsize=6.5,
        )
