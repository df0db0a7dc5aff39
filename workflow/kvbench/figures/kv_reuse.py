"""Caches kept across turns: time to first token, prompt tokens not read, and memory held."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis import metrics, selection, statistics
from kvbench.figures import _kv, style
from kvbench.strategies import without_reuse

QUESTION = "What does a cache save that is kept from turn to turn, and what does it hold meanwhile?"


def draw(summary: pd.DataFrame, samples: pd.DataFrame) -> Figure:
    """Draw one row of panels per machine: TTFT, share of the prompt reused, and cache, per turn."""
    chosen = [
        best
        for machine in selection.machines(summary)
        if (best := selection.reusing(summary, samples, machine))
    ]
    if not chosen:
        return _kv.empty(QUESTION, "no strategy that keeps its cache across turns was measured yet")
    headings = [
        f"{_kv.heading(*one)} · {_kv.counted(selection.measured(selection.rows_of(summary, *one)))}"
        for one in chosen
    ]
    figure, lines = _bands(headings)
    handles: dict[str, object] = {}
    samples = metrics.counted(samples)
    for axes, (group, scenario) in zip(lines, chosen, strict=True):
        rows = selection.rows_of(summary, group, scenario)
        _panels(axes, selection.rows_of(samples, group, scenario), rows, handles)
    ordered = {style.label(name): handles[name] for name in selection.in_order(handles)}
    note = (
        "TTFT: time to first token, median; bar: 95 % interval; dotted: without reuse; "
        "thin lines: predicted by the physics"
    )
    _kv.finish_lines(figure, ordered, QUESTION, note)
    return figure


def _bands(headings: list[str]) -> tuple[Figure, list]:
    import matplotlib.pyplot as plt

    height = min(_kv.TALLEST, 2.2 * len(headings))
    figure = plt.figure(figsize=(style.PAGE_WIDTH, 0.9 + height))
    parts = figure.subfigures(len(headings), 1, squeeze=False)
    lines = []
    for part, text in zip(parts[:, 0], headings, strict=True):
        part.suptitle(text, x=0.012, ha="left", fontsize=7.5, style="italic")
        lines.append(part.subplots(1, 3))
    return figure, lines


def _panels(
    axes: list[Axes], samples: pd.DataFrame, rows: pd.DataFrame, handles: dict[str, object]
) -> None:
    times, shares, memory = axes
    measured = set(selection.measured(rows)["strategy"])
    reusing = selection.in_order(name for name in measured if without_reuse(name))
    seen: list[float] = []
    for strategy in reusing:
        own = samples[samples["strategy"] == strategy]
        look = style.look(strategy)
        for name, line in ((strategy, "-"), (without_reuse(strategy), ":")):
            if name not in measured:
                continue
            timed = samples[samples["strategy"] == name]
            handles[name], centres = _ttft(times, timed, name, line)
            seen += centres
            if "predicted_ttft_s" in timed and timed["predicted_ttft_s"].notna().any():
                least = timed.groupby("turn", sort=True)["predicted_ttft_s"].median()
                times.plot(least.index, least, line, color=style.look(name).colour, linewidth=0.5)
                seen += list(least)
        turns = own.groupby("turn", sort=True)[
            ["prompt_tokens", "new_tokens", "reused_tokens", "kv_mib", "kv_mib_predicted"]
        ].median()
        mark = {"color": look.colour, "marker": look.marker, "ms": 4 * look.size, "mec": "white"}
        share = 100 * turns["reused_tokens"] / turns["prompt_tokens"]
        shares.plot(turns.index, share, linewidth=0.9, mew=0.4, **mark)
        memory.plot(turns.index, turns["kv_mib"], linewidth=0, mew=0.4, **mark)
        memory.plot(turns.index, turns["kv_mib_predicted"], color=look.colour, linewidth=0.7)
    # All that a turn left in the cache is in the next prompt.
    if reusing:
        known = samples[samples["strategy"] == reusing[0]].groupby("turn", sort=True)
        prompt = known["prompt_tokens"].median()
        left = (prompt + known["new_tokens"].median() - 1).shift(fill_value=0)
        shares.plot(prompt.index, 100 * left / prompt, color="0.4", linewidth=0.7)
    if seen and min(seen) > 0:
        times.set_yscale("log")
    shares.set_ylim(0, 105)
    memory.set_ylim(bottom=0)
    for ax, text in (
        (times, "TTFT (s)"),
        (shares, "prompt not read (%)"),
        (memory, "cache held (MiB)"),
    ):
        ax.set_ylabel(text)
        ax.set_xlabel("turn")
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.xaxis.get_major_locator().set_params(integer=True)


def _ttft(ax: Axes, own: pd.DataFrame, strategy: str, line: str) -> tuple[object, list[float]]:
    """Draw the medians of a strategy per turn; return the artist and the medians."""
    look = style.look(strategy)
    turns, centres, below, above = [], [], [], []
    for turn, part in own[own["ttft_s"].notna()].groupby("turn", sort=True):
        found = statistics.median_interval(metrics.turn_replicates(part, "ttft_s"))
        low, high = (found.value if math.isnan(end) else end for end in found.as_tuple())
        turns.append(float(turn))
        centres.append(found.value)
        below.append(found.value - low)
        above.append(high - found.value)
    artist = ax.errorbar(
        turns,
        centres,
        yerr=[below, above],
        **_kv.line_of(look),
        linestyle=line,
        linewidth=0.9,
        elinewidth=0.8,
    )
    return artist, centres
