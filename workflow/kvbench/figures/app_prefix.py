"""One system prompt for many requests: time to first token, memory, and what text loses."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, style

QUESTION = "What does it save to read a system prompt once for many requests?"

#: Label, colour, marker and line of each way to serve.
_WAYS = {
    "recompute": ("recomputed", "black", "X", "-"),
    "copied": ("prefix copied", "orange", "s", "-"),
    "shared": ("prefix lent", "blue", "o", "--"),
    "paged": ("paged", "grey", "^", "-"),
    "paged_shared": ("paged, blocks shared", "purple", "v", "--"),
    "vllm": ("vLLM", "vermilion", "D", "-"),
    "vllm_prefix_caching": ("vLLM, prefixes kept", "green", "P", "--"),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw TTFT and memory over the length of the system prompt, and the prefix that text keeps."""
    table = one_machine(table)
    parts = table["part"] if "part" in table else pd.Series(dtype=object)
    served, text = table[parts == "serving"], table[parts == "retokenise"]
    if served.empty and text.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, (times, memory, kept) = plt.subplots(1, 3, figsize=(style.PAGE_WIDTH, 2.9))
    handles: dict[str, object] = {}
    if served.empty:
        _nothing(times)
        _nothing(memory)
    else:
        _serving(times, memory, served, handles)
    if text.empty:
        _nothing(kept)
    else:
        _surviving(kept, text)
    _kv.finish_lines(
        figure,
        handles,
        _app.title(QUESTION, table, "requests", "requests"),
        "bar: 95 % interval; thin line: predicted bytes",
    )
    return figure


def _nothing(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.5")
    ax.set_xticks([])
    ax.set_yticks([])


def _serving(times: Axes, memory: Axes, rows: pd.DataFrame, handles: dict[str, object]) -> None:
    lengths = sorted(rows["system_tokens"].unique())
    place = {length: position for position, length in enumerate(lengths)}
    ways = [way for way in _WAYS if (rows["way"] == way).any()]
    for number, way in enumerate(ways):
        label, colour, marker, line = _WAYS[way]
        own = rows[rows["way"] == way].sort_values("system_tokens")
        shift = (number - (len(ways) - 1) / 2) * 0.11
        at = [place[length] + shift for length in own["system_tokens"]]
        centre = own["ttft_p50_s"] * 1000
        ends = [
            centre - own["ttft_p50_s_ci_low"] * 1000,
            own["ttft_p50_s_ci_high"] * 1000 - centre,
        ]
        look = {"color": style.OKABE_ITO[colour], "marker": marker, "linestyle": line}
        handles[label] = times.errorbar(
            at, centre, yerr=ends, ms=3.8, mec="white", mew=0.4, linewidth=0.9, **look
        )
        memory.plot(at, own["held_mib"], ms=3.8, mec="white", mew=0.4, linewidth=0, **look)
        memory.plot(at, own["held_mib_predicted"], color=look["color"], linewidth=0.7)
    for ax in (times, memory):
        ax.set_xticks(range(len(lengths)), [f"{length:.0f}" for length in lengths])
        ax.set_xlabel("system prompt (tokens)")
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
    times.set_yscale("log")
    times.set_ylabel("time to first token (ms)")
    memory.set_ylim(bottom=0)
    memory.set_ylabel(f"caches of {rows['together'].max():.0f} requests (MiB)")


def _surviving(ax: Axes, rows: pd.DataFrame) -> None:
    colours = ("black", "sky", "vermilion", "green", "orange")
    markers = ("o", "^", "s", "D", "v")
    for number, (temperature, own) in enumerate(rows.groupby("temperature", sort=True)):
        turns = own.groupby("turn", sort=True)["surviving"].mean() * 100
        ax.plot(
            turns.index,
            turns,
            color=style.OKABE_ITO[colours[number % len(colours)]],
            marker=markers[number % len(markers)],
            ms=3.8,
            linewidth=0.9,
            label=f"temperature {temperature:g}" if temperature else "greedy",
        )
    ax.set_ylim(0, 105)
    ax.set_xlabel("turn of a history\nkept as text")
    ax.set_ylabel("cached tokens still valid (%)")
    ax.legend(frameon=False, fontsize=6)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
