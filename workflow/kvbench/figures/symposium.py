"""The symposium notebook's own figure, regenerated: three bar panels over none, dynamic and static."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis import published, selection
from kvbench.figures import _kv, style

QUESTION = "Does the symposium's figure look the same when it is measured again?"

TABLES = ("kv_summary",)

#: Drawn once per scenario, as ``symposium_<scenario>``.
PER_SCENARIO = True

STRATEGIES = ("none", "dynamic", "static")

#: Grey, orange and blue, as in the source's ``resumo_plot``.
COLOURS = {
    "none": style.OKABE_ITO["grey"],
    "dynamic": style.OKABE_ITO["orange"],
    "static": style.OKABE_ITO["blue"],
}

#: Column of the summary, title as in the source (its Portuguese is in the words), factor from the
#: column's unit to the title's, and the key of what the source printed. Memory was never printed.
PANELS = (
    ("e2e_s_median", "Mean generation time (s)", 1.0, "e2e_s"),
    ("peak_memory_mib", "Mean memory used (MB)", 2**20 / 1e6, None),
    ("output_tokens_per_s_median", "Tokens/second (avg)", 1.0, "output_tokens_per_s"),
)


#: The line above the three panels of a machine.
_HEADING = {"loc": "left", "fontsize": 7.5, "style": "italic"}

#: A printed number this many times above or below all bars is written, not marked.
_FAR = 5


@dataclass(frozen=True)
class Bar:
    """One bar: its height, its interval where it has one, and what the source printed."""

    height: float
    low: float = math.nan
    high: float = math.nan
    printed: float | None = None


def draw(summary: pd.DataFrame, scenario: str) -> Figure:
    """Draw the source's figure of one scenario, a row of three panels per machine.

    Of several models a machine measured, the one nearest to the source's is drawn. What the source
    printed is marked only where the model has the source's shape.

    Parameters
    ----------
    summary:
        The table ``kv_summary``.
    scenario:
        Which conversation, or the published cell.
    """
    printed = published.turn()
    found = []
    for machine in selection.machines(summary):
        group = selection.nearest_to_published(summary, machine, scenario)
        rows = [] if group is None else selection.rows_of(summary, group, scenario)
        own = {
            row["strategy"]: row
            for row in (rows.to_dict("records") if len(rows) else [])
            if row["strategy"] in STRATEGIES and row["status"] in selection.TIMED
        }
        if own:
            found.append((group, own))
    if not found:
        return _kv.empty(QUESTION, "none of the three strategies was measured in this scenario")
    # Of many machines each gets less, so that a page of text has room beside them.
    height = min(_kv.TALLEST, (2.2 if len(found) <= 2 else 1.65) * len(found))
    figure, grid = plt.subplots(
        len(found), 3, figsize=(style.PAGE_WIDTH, 0.75 + height), squeeze=False
    )
    for axes, (group, own) in zip(grid, found, strict=True):
        names = [name for name in STRATEGIES if name in own]
        counts = " / ".join(f"{int(own[name]['samples'])}" for name in names)
        marked = scenario == selection.HEADLINE_SCENARIO and group.model in selection.MODEL_ORDER
        for ax, (column, title, factor, key) in zip(axes, PANELS, strict=True):
            bars = {
                name: _bar(own[name], column, factor, printed[name].get(key) if marked else None)
                for name in names
            }
            panel(ax, title, bars)
        # Above the middle title, which is a line of its own.
        axes[0].set_title(f"{_kv.heading(group, scenario)} · n = {counts}\n", **_HEADING)
    note = (
        "bar: median of the conversations' means; line: 95 % interval; memory: one pass of its own"
    )
    if any(ax.get_legend_handles_labels()[0] for ax in figure.axes):
        note += "; diamond: printed by the source"
    figure.supxlabel(note, fontsize=6.5, color="0.35")
    figure.suptitle(QUESTION, fontsize=9)
    return figure


def _bar(row: Mapping[str, object], column: str, factor: float, printed: float | None) -> Bar:
    def number(name: str) -> float:
        value = row.get(name)
        return math.nan if value is None or pd.isna(value) else factor * float(value)

    stem = column.removesuffix("_median")
    return Bar(number(column), number(f"{stem}_ci_low"), number(f"{stem}_ci_high"), printed)


def panel(ax: Axes, title: str, bars: Mapping[str, Bar]) -> None:
    """Draw one of the source's panels, with the value on each bar."""
    names: Sequence[str] = list(bars)
    heights = [bar.height for bar in bars.values() if not math.isnan(bar.height)]
    printed = [bar.printed for bar in bars.values() if bar.printed is not None]
    near = bool(heights) and all(
        min(heights) / _FAR <= number <= max(heights) * _FAR for number in printed
    )
    tops = []
    for place, name in enumerate(names):
        bar = bars[name]
        if math.isnan(bar.height):
            continue
        ax.bar(place, bar.height, width=0.6, color=COLOURS.get(name, style.look(name).colour))
        top, text = bar.height, _value(bar.height)
        if not math.isnan(bar.low):
            ax.plot([place, place], [bar.low, bar.high], color="black", linewidth=1.1, zorder=3)
            top = max(top, bar.high)
        if bar.printed is not None and near:
            ax.plot(
                place + 0.36,
                bar.printed,
                "D",
                ms=4.5,
                mfc="white",
                mec="black",
                mew=0.9,
                zorder=4,
                label="printed by the source",
            )
            tops.append(bar.printed)
        elif bar.printed is not None:
            text += f"\n(source: {_value(bar.printed)})"
        tops.append(top)
        ax.annotate(
            text,
            (place, top),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.5,
            linespacing=1.0,
        )
    ax.set_title(title)
    ax.set_xticks(range(len(names)), [style.look(name).label for name in names])
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_ylim(0, (1.18 if near or not printed else 1.32) * max(tops, default=1.0))


def _value(number: float) -> str:
    """Three figures, never in powers of ten."""
    digits = 0 if number >= 100 else 1 if number >= 10 else 2 if number >= 1 else 3
    return f"{number:,.{digits}f}"
