"""The instrument's own test: false alarms, slowdowns found, and how long it takes to see how little."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis import instrument, selection
from kvbench.figures import _kv, style

QUESTION = "How small a difference does the instrument see, and how long does that take?"
TABLES = ("aa_test",)

#: Arm to colour and marker.
_ARMS = {
    instrument.SAME: (style.OKABE_ITO["vermilion"], "o"),
    instrument.SLOWED: (style.OKABE_ITO["blue"], "s"),
}


def draw(aa_test: pd.DataFrame) -> Figure:
    """Draw one row of panels per machine, of comparisons of single blocks.

    Left, the share of comparisons whose interval excludes 1, by the rounds they had; right, the
    smallest slowdown that nine out of ten of them find, by the time they took.

    Parameters
    ----------
    aa_test:
        The table ``aa_test``.
    """
    rows = aa_test[aa_test["blocks"] == 1]
    machines = selection.machines(rows)
    if not machines:
        return _kv.empty(QUESTION, "the test has not been made yet: snakemake aa_test")
    height = min(_kv.TALLEST, 2.4 * len(machines))
    figure, axes = plt.subplots(
        len(machines), 2, figsize=(style.PAGE_WIDTH, 0.9 + height), squeeze=False
    )
    handles: dict[str, object] = {}
    for (left, right), machine in zip(axes, machines, strict=True):
        found = rows[rows["machine"] == machine].sort_values("rounds")
        pairs = int(found["independent"].max())
        _kv.head_panel(left, f"{_kv.called(machine)} · n = {pairs} independent pairs")
        _shares(left, found, handles)
        _curve(right, found[found["arm"] == instrument.SAME])
    _kv.finish_lines(figure, handles, QUESTION, "bar: 95 % interval; dashed: the aims")
    return figure


def _shares(ax: Axes, rows: pd.DataFrame, handles: dict[str, object]) -> None:
    for side, (arm, part) in enumerate(rows.groupby("arm", sort=True)):
        colour, marker = _ARMS[arm]
        label = "equal cells said to differ"
        if arm == instrument.SLOWED:
            label = f"slowdowns of {100 * part['slowdown'].iloc[0]:g} % found"
        share = 100 * part["share"]
        # Beside each other, so that their intervals do not hide one another.
        handles[label] = ax.errorbar(
            part["rounds"] * (0.988, 1.012)[side % 2],
            share,
            yerr=[share - 100 * part["share_ci_low"], 100 * part["share_ci_high"] - share],
            color=colour,
            marker=marker,
            ms=4,
            linewidth=0.9,
            elinewidth=0.8,
        )
    for aim in (instrument.FALSE_ALARMS, instrument.FOUND):
        ax.axhline(100 * aim, color="0.4", linewidth=0.7, linestyle=(0, (4, 3)))
    ax.set_ylim(-2, 102)
    ax.set_xscale("log")
    ax.set_xlabel("rounds")
    ax.set_ylabel("share of comparisons (%)")
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _curve(ax: Axes, rows: pd.DataFrame) -> None:
    rows = rows[rows["smallest_slowdown"] > 0]
    seconds, smallest = rows["measuring_s"], 100 * rows["smallest_slowdown"]
    ax.plot(seconds, smallest, color="black", marker="o", ms=4, linewidth=0.9)
    if len(rows):
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.set_xlabel("measuring time of both cells (s)")
    ax.set_ylabel("smallest slowdown found (%)")
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
