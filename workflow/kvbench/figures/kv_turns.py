"""E2E latency of each turn while the conversation grows, for the caches a program chooses from."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis import metrics, selection, statistics
from kvbench.figures import _kv, style

QUESTION = "How does a turn slow down as the conversation grows?"

#: No cache, one that is made anew at every turn, and one that is kept: the others lie on these.
STRATEGIES = ("none", "dynamic", "static", "dynamic_reuse")

#: Turns written on the axis at most; more would run into each other.
MOST_TICKS = 8


def draw(
    summary: pd.DataFrame,
    samples: pd.DataFrame,
    *,
    model: str | None = None,
    scenario: str | None = None,
) -> Figure:
    """Draw one panel per machine.

    Parameters
    ----------
    summary, samples:
        The tables ``kv_summary`` and ``kv_samples``.
    model, scenario:
        Narrow the choice; by default each machine shows the conversation (two turns or more) in
        which it measured the most strategies.
    """
    chosen = [
        best
        for machine in selection.machines(summary)
        if (
            best := selection.widest(
                summary,
                machine,
                model=model,
                scenario=scenario,
                turns_at_least=2,
            )
        )
    ]
    chosen = [one for one in chosen if len(selection.rows_of(samples, *one))]
    if not chosen:
        return _kv.empty(QUESTION, "no conversation of two turns or more has been measured yet")
    columns = min(2, len(chosen))
    lines = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(style.PAGE_WIDTH, 0.75 + 2.2 * lines),
        sharey=True,
        squeeze=False,
    )
    seen: list[float] = []
    samples = metrics.counted(samples)
    for ax, (group, name) in zip(axes.flat, chosen, strict=False):
        rows = selection.measured(selection.rows_of(summary, group, name))
        rows = rows[rows["strategy"].isin(STRATEGIES)]
        seen += _panel(ax, selection.rows_of(samples, group, name), rows)
        parts = [group.machine, group.model, name]
        _kv.head_panel(ax, " · ".join([*map(_kv.called, parts), _kv.counted(rows)]))
    logarithmic = bool(seen) and min(seen) > 0 and max(seen) / min(seen) > 15
    axes[0][0].set(**{"yscale": "log"} if logarithmic else {"ylim": (0, None)})
    for ax in axes.flat:
        _part_names(ax, logarithmic)
    for ax in list(axes.flat)[len(chosen) :]:
        ax.set_visible(False)
    for line in axes:
        line[0].set_ylabel("time of a turn (s)")
    figure.suptitle(QUESTION, fontsize=9)
    figure.supxlabel("median of the turn; bar: 95 % interval", fontsize=6.5, color="0.35")
    return figure


def _panel(ax: Axes, samples: pd.DataFrame, rows: pd.DataFrame) -> list[float]:
    """Draw one machine's lines; return the numbers that the axis has to hold."""
    strategies = selection.in_order(rows["strategy"])
    seen: list[float] = []
    ends: list[tuple[float, float, str]] = []
    for place, strategy in enumerate(strategies):
        own = samples[(samples["strategy"] == strategy) & samples["e2e_s"].notna()]
        if own.empty:
            continue
        look = style.look(strategy)
        turns, centres, below, above = [], [], [], []
        for turn, part in own.groupby("turn", sort=True):
            found = statistics.median_interval(metrics.turn_replicates(part, "e2e_s"))
            centre = found.value
            # One sample has no interval: its bar has no length.
            low, high = (centre if math.isnan(end) else end for end in found.as_tuple())
            turns.append(float(turn) + 0.12 * (place - (len(strategies) - 1) / 2))
            centres.append(centre)
            below.append(centre - low)
            above.append(high - centre)
            seen.extend([low, high])
        ax.errorbar(
            turns,
            centres,
            yerr=[below, above],
            **_kv.line_of(look),
            linewidth=1,
            elinewidth=0.9,
        )
        ends.append((turns[-1], centres[-1], strategy))
    _name_lines(ax, ends)
    tokens = samples.groupby("turn", sort=True)["prompt_tokens"].median()
    step = -(-len(tokens) // MOST_TICKS)
    kept = tokens.iloc[::step]
    ax.set_xticks(
        [float(turn) for turn in kept.index],
        [
            f"{turn:g}" + (f"\n{count:.0f}" if count == count else "")
            for turn, count in kept.items()
        ],
    )
    ax.set_xlabel("turn (below: prompt tokens)")
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    return seen


def _name_lines(ax: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Write each line's name behind its last point."""
    if not ends:
        return
    last = max(turn for turn, _, _ in ends)
    for _, value, strategy in ends:
        look = style.look(strategy)
        ax.annotate(
            look.label,
            (last, value),
            xytext=(6, 0),
            textcoords="offset points",
            color=look.colour,
            fontsize=6.5,
            va="center",
            annotation_clip=False,
        )
    first = ax.get_xlim()[0]
    ax.set_xlim(first, last + 0.5 * (last - first))


def _part_names(ax: Axes, logarithmic: bool) -> None:
    """Move the names of lines apart that end close together."""
    scale = math.log if logarithmic else float
    low, high = map(scale, ax.get_ylim())
    least, placed = 0.075 * (high - low), -math.inf
    for text in sorted(ax.texts, key=lambda one: one.xy[1]):
        at = max(scale(text.xy[1]), placed + least)
        placed = at
        text.xy = (text.xy[0], math.exp(at) if logarithmic else at)
