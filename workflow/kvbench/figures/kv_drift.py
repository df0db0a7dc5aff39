"""How the machine's speed wandered while blocks were measured, and what pairing within rounds removes."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvbench import strategies
from kvbench.analysis import selection
from kvbench.figures import _kv, style

QUESTION = "How did the machine's speed wander, and what does pairing remove?"
TABLES = ("kv_rounds",)

#: Fewer rounds show no course of time.
_FEWEST = 3
_PLACE = ["model", "device", "dtype", "scenario", "block"]


def draw(rounds: pd.DataFrame) -> Figure:
    """Draw one row of panels per machine, of its block with the most rounds.

    Left, round by round, how far the fixed computation and the reference's turns lie from their
    medians. Right, for every strategy, how much its time varies from round to round, alone (hollow)
    and as a ratio to the reference in the same round (filled); rounds that something else disturbed
    are left out there and crossed out on the left.

    Parameters
    ----------
    rounds:
        The table ``kv_rounds``.
    """
    chosen = [
        (machine, block)
        for machine in selection.machines(rounds)
        if (block := _longest(rounds[rounds["machine"] == machine])) is not None
    ]
    if not chosen:
        return _kv.empty(QUESTION, "no block of cells has been measured in rounds yet")
    height = min(_kv.TALLEST, 1.75 * len(chosen))
    figure, axes = plt.subplots(
        len(chosen), 2, figsize=(style.PAGE_WIDTH, 1.0 + height), squeeze=False, width_ratios=(3, 2)
    )
    handles: dict[str, object] = {}
    for (left, right), (machine, block) in zip(axes, chosen, strict=True):
        first = block.iloc[0]
        parts = [machine, first["model"], first["scenario"]]
        _kv.head_panel(left, " · ".join([*map(_kv.called, parts), f"n = {_rounds(block)}"]))
        _course(left, block, handles)
        _spreads(right, block)
    note = "beside: spread of times alone (hollow) and of ratios to the reference in the same round"
    _kv.finish_lines(figure, handles, QUESTION, note)
    return figure


def _longest(rows: pd.DataFrame) -> pd.DataFrame | None:
    """The block with the most rounds in which the reference was measured; ties by name."""
    reference = rows[rows["strategy"] == strategies.REFERENCE]
    counts = reference.groupby(_PLACE, sort=True)["round"].nunique()
    if counts.empty or counts.max() < _FEWEST:
        return None
    wanted = dict(zip(_PLACE, counts.idxmax(), strict=True))
    return rows[(rows[_PLACE] == pd.Series(wanted)).all(axis=1)]


def _rounds(block: pd.DataFrame) -> str:
    """How many rounds a block has."""
    return f"{block['round'].nunique()} rounds"


def _course(ax: Axes, block: pd.DataFrame, handles: dict[str, object]) -> None:
    reference = block[block["strategy"] == strategies.REFERENCE].sort_values("round")
    look = style.look(strategies.REFERENCE)
    lines = {
        "fixed computation": (reference["probe_s"], {"color": "0.55", "linewidth": 0.9}),
        f"{style.label(strategies.REFERENCE)}, E2E latency": (
            reference["e2e_s"],
            {"color": look.colour, "marker": look.marker, "ms": 2.5, "linewidth": 0.7},
        ),
    }
    for label, (seconds, marks) in lines.items():
        if seconds.notna().any():
            off = 100 * (seconds / seconds.median() - 1)
            (handles[label],) = ax.plot(reference["round"], off, **marks)
    hit = reference[reference["disturbed"].astype(str) == "True"]
    if len(hit):
        off = 100 * (hit["e2e_s"] / reference["e2e_s"].median() - 1)
        (handles["disturbed"],) = ax.plot(
            hit["round"], off, "x", color=style.OKABE_ITO["vermilion"], ms=5
        )
    ax.axhline(0, color="0.4", linewidth=0.7, linestyle=(0, (4, 3)))
    ax.set_xlabel("round")
    ax.set_ylabel("deviation from the median (%)")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _spreads(ax: Axes, block: pd.DataFrame) -> None:
    calm = block[block["disturbed"].astype(str) != "True"]
    names = [
        name
        for name in selection.in_order(calm["strategy"])
        if name != strategies.REFERENCE
        and calm.loc[calm["strategy"] == name, "ratio"].count() >= _FEWEST
    ]
    for place, name in enumerate(names):
        rows = calm[calm["strategy"] == name]
        alone, ratio = (_spread(rows[column]) for column in ("e2e_s", "ratio"))
        look = style.look(name)
        ax.plot([ratio, alone], [place, place], color="0.8", linewidth=1, zorder=1)
        mark = {"marker": look.marker, "ms": 5 * look.size, "color": look.colour}
        ax.plot(alone, place, mfc="white", mew=0.9, **mark)
        ax.plot(ratio, place, mec="white", mew=0.4, **mark)
    ax.set_yticks(range(len(names)), [style.label(name) for name in names])
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    # Room for the widest one's marker.
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.set_xlabel("spread from round to round (%)")
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _spread(numbers: pd.Series) -> float:
    """Standard deviation of the logarithms, as a percentage."""
    logs = np.log(numbers.dropna())
    return 100 * float(logs.std(ddof=1)) if len(logs) > 1 else math.nan
