"""Figure: times to the first token and per token, and goodput, of endpoints against the load on them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants
from kvbench.figures.style import OKABE_ITO, PAGE_WIDTH

QUESTION = "How much load does an endpoint bear?"

_SERVERS = {
    "transformers_serve": ("transformers serve", "blue", "o"),
    "proxy": ("proxy before it", "green", "s"),
    "vllm_serve": ("vLLM's server", "purple", "^"),
    "vllm_proxy": ("proxy before vLLM", "orange", "v"),
    "configured": ("configured server", "vermilion", "D"),
}
_LOADS = {"closed": "open conversations", "open": "conversations that begin in a second (1/s)"}
#: Column, its 99th percentile, the column of its limit, label and factor.
_TIMES = (
    ("ttft_p50_s", "ttft_p99_s", "ttft_limit_s", "time to first token (ms)"),
    ("tpot_p50_s", "tpot_p99_s", "tpot_limit_s", "time per token (ms)"),
)


def draw(table: pd.DataFrame) -> Figure:
    """Draw a column a kind of load: TTFT and TPOT (p50 with interval, p99), and goodput."""
    rows = one_machine(table)
    kinds = [kind for kind in _LOADS if "load" in rows and (rows["load"] == kind).any()]
    if not kinds:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    looks = _variants.looks(_SERVERS, rows["server"])
    figure, grid = plt.subplots(
        3, len(kinds), figsize=(PAGE_WIDTH, 5.4), sharex="col", sharey="row", squeeze=False
    )
    handles: dict[str, object] = {}
    for column, kind in enumerate(kinds):
        own = rows[rows["load"] == kind]
        levels = sorted(own["level"].unique())
        servers = [server for server in looks if (own["server"] == server).any()]
        for number, server in enumerate(servers):
            part = own[own["server"] == server].sort_values("level")
            # Loads are as far apart as their number says; markers of one load stand side by side.
            shift = (number - (len(servers) - 1) / 2) * 0.08
            at = [levels.index(level) + shift for level in part["level"]]
            title, named, marker = looks[server]
            colour = OKABE_ITO[named]
            handles[title] = Line2D([], [], color=colour, marker=marker, lw=1.0, ms=4)
            for line, (middle, tail, _, _) in enumerate(_TIMES):
                _times(grid[line][column], at, part, (middle, tail), (colour, marker))
            _goodput(grid[2][column], at, part, (colour, marker))
        for line, (_, _, limit, _) in enumerate(_TIMES):
            for value in sorted(own[limit].dropna().unique()):
                grid[line][column].axhline(1000 * value, color="0.35", lw=0.8, ls=":")
        grid[2][column].set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        grid[2][column].set_xlim(-0.5, len(levels) - 0.5)
        grid[2][column].set_xlabel(_LOADS[kind])
        for axes in grid[:, column]:
            axes.grid(axis="y", color="0.9", linewidth=0.6)
            axes.set_axisbelow(True)
    for line, (*_, label) in enumerate(_TIMES):
        grid[line][0].set_yscale("log")
        grid[line][0].set_ylabel(label)
    grid[2][0].set_ylabel("goodput (requests/s)")
    grid[2][0].set_ylim(bottom=0)
    handles["99th percentile"] = Line2D([], [], color="0.35", ls="--", lw=0.9)
    handles["service level"] = Line2D([], [], color="0.35", ls=":", lw=0.9)
    _kv.finish_lines(
        figure,
        handles,
        _app.title(QUESTION, rows, "requests", "requests"),
        "line: median, bar: its 95 % interval; hollow: the load did not keep the service level",
    )
    return figure


def _times(
    axes: Axes, at: list[float], part: pd.DataFrame, names: tuple[str, str], look: tuple[str, str]
) -> None:
    """Medians with their intervals, and the 99th percentiles as a broken line."""
    (middle, tail), (colour, marker) = names, look
    axes.plot(at, 1000 * part[middle], color=colour, marker=marker, ms=3.8, lw=0.9)
    axes.plot(at, 1000 * part[tail], color=colour, ls="--", lw=0.8)
    axes.vlines(
        at,
        1000 * part[f"{middle}_ci_low"],
        1000 * part[f"{middle}_ci_high"],
        color=colour,
        lw=2.4,
        alpha=0.35,
    )


def _goodput(axes: Axes, at: list[float], part: pd.DataFrame, look: tuple[str, str]) -> None:
    """Requests within the service level in a second; hollow where too few were."""
    colour, marker = look
    axes.plot(at, part["good_per_s"], color=colour, lw=0.9)
    for place, value, borne in zip(at, part["good_per_s"], part["borne"], strict=True):
        filled = colour if borne == True else "white"  # noqa: E712  None in a row without a value
        axes.plot([place], [value], color=colour, marker=marker, ms=4, mfc=filled, lw=0)
