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
        lines, columns, figsize=(style.PAGE_WIDTH, 0.75 + 2.2 * lines), squeeze=False
    )
    samples = metrics.counted(samples)
    for ax, (group, name) in zip(axes.flat, chosen, strict=False):
        rows = selection.measured(selection.rows_of(summary, group, name))
        rows = rows[rows["strategy"].isin(STRATEGIES)]
        _panel(ax, selection.rows_of(samples, group, name), rows)
        title = f"{group.machine} · {group.model} · {name} · {_kv.counted(rows)}"
        ax.set_title(title, fontsize=7.5, style="italic", loc="left")
    for ax in list(axes.flat)[len(chosen) :]:
        ax.set_visible(False)
    for line in axes:
        line[0].set_ylabel("time of a turn (s)")
    figure.suptitle(QUESTION, fontsize=9)
    figure.supxlabel("median of the turn; bar: 95 % interval", fontsize=6.5, color="0.35")
    return figure


def _panel(ax: Axes, samples: pd.DataFrame, rows: pd.DataFrame) -> None:
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
            color=look.colour,
            marker=look.marker,
            ms=4 * look.size,
            mec="white",
            mew=0.4,
            linewidth=1,
            elinewidth=0.9,
        )
        ends.append((turns[-1], centres[-1], strategy))
    logarithmic = bool(seen) and min(seen) > 0 and max(seen) / min(seen) > 15
    _name_lines(ax, ends, logarithmic)
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
    if logarithmic:
        ax.set_yscale("log")
        _kv.plain_log_axis(ax.yaxis, min(seen), max(seen))
        ax.text(0.01, 0.98, "logarithmic", transform=ax.transAxes, va="top", fontsize=6.5)
    else:
        ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _name_lines(ax: Axes, ends: list[tuple[float, float, str]], logarithmic: bool) -> None:
    """Write each line's name behind its end, moved apart where ends lie close together."""
    if not ends:
        return
    scale = math.log if logarithmic else float
    values = [scale(value) for _, value, _ in ends]
    least = 0.085 * ((max(values) - min(0.0 if not logarithmic else min(values), *values)) or 1.0)
    placed: list[float] = []
    for (turn, _, strategy), value in sorted(
        zip(ends, values, strict=True), key=lambda end: end[1]
    ):
        at = value if not placed else max(value, placed[-1] + least)
        placed.append(at)
        look = style.look(strategy)
        ax.annotate(
            look.label,
            (turn + 0.25, math.exp(at) if logarithmic else at),
            color=look.colour,
            fontsize=7,
            va="center",
            annotation_clip=False,
        )
    last = max(turn for turn, _, _ in ends)
    first = ax.get_xlim()[0]
    ax.set_xlim(first, last + 0.28 * (last - first))
