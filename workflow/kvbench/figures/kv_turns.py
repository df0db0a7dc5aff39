"""E2E latency of each turn while the conversation grows, one line per strategy."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis import metrics, selection, statistics
from kvbench.figures import _kv, style

QUESTION = "How does a turn slow down as the conversation grows?"

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
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(style.PAGE_WIDTH, 0.9 + 2.3 * lines), squeeze=False
    )
    handles: dict[str, object] = {}
    samples = metrics.counted(samples)
    for ax, (group, name) in zip(axes.flat, chosen, strict=False):
        rows = selection.rows_of(summary, group, name)
        _panel(ax, selection.rows_of(samples, group, name), rows, handles)
        ax.set_title(f"{group.machine} · {group.model}\n{name}", fontsize=7.5, style="italic")
    for ax in list(axes.flat)[len(chosen) :]:
        ax.set_visible(False)
    for line in axes:
        line[0].set_ylabel("E2E latency of the turn (s)")
    handles = {style.label(name): handles[name] for name in selection.in_order(handles)}
    _kv.finish_lines(
        figure, handles, QUESTION, "median of the turn; bar: 95 % interval of the median"
    )
    return figure


def _panel(ax: Axes, samples: pd.DataFrame, rows: pd.DataFrame, handles: dict[str, object]) -> None:
    strategies = selection.in_order(rows.loc[rows["status"].isin(selection.TIMED), "strategy"])
    shift = 0.36 / max(len(strategies), 1)
    seen: list[float] = []
    for place, strategy in enumerate(strategies):
        own = samples[(samples["strategy"] == strategy) & samples["e2e_s"].notna()]
        if own.empty:
            continue
        look = style.look(strategy)
        turns, centres, below, above = [], [], [], []
        for turn, part in own.groupby("turn", sort=True):
            at = float(turn) + (place - (len(strategies) - 1) / 2) * shift
            found = statistics.median_interval(metrics.turn_replicates(part, "e2e_s"))
            centre = found.value
            # One sample has no interval: its bar has no length.
            low, high = (centre if math.isnan(end) else end for end in found.as_tuple())
            turns.append(at)
            centres.append(centre)
            below.append(centre - low)
            above.append(high - centre)
            seen.extend([low, high])
            if 1 < len(part) < _kv.FEW:
                ax.scatter(
                    [at] * len(part), part["e2e_s"], s=3, color=look.colour, alpha=0.3, linewidths=0
                )
        handles[strategy] = ax.errorbar(
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
    positive = [value for value in seen if value > 0]
    if positive and max(positive) / min(positive) > 15:
        ax.set_yscale("log")
        _kv.plain_log_axis(ax.yaxis, min(positive), max(positive))
    else:
        ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
