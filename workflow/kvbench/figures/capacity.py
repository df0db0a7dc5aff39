"""How many conversations fit one machine, and how many machines a fleet needs, by memory size."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvbench.analysis import selection
from kvbench.figures import _kv, style

TABLES = ("capacity",)

QUESTION = "From a laptop to a fleet: how many conversations fit the memory?"

#: The table has a block of rows per model; the figure shows the source document's.
MODEL = "llama-3.2-1b"

#: Values closer than this share are one line.
_SAME = 0.02


def draw(table: pd.DataFrame) -> Figure:
    """Draw conversations per machine and machines per fleet against the memory of one machine.

    Strategies of which as many conversations fit share one line, and the legend names them all.

    Parameters
    ----------
    table:
        Rows of :func:`kvbench.analysis.capacity.sweep`, of one conversation length. Of several models
        :data:`MODEL` is shown.
    """
    if "model" in table and table["model"].nunique() > 1:
        table = table[table["model"] == MODEL]
    fitting = table[table["concurrent"].fillna(0) > 0]
    if fitting.empty:
        return _kv.empty(QUESTION, "no conversation fits any of these memory sizes")
    first = fitting.iloc[0]
    figure, axes = plt.subplots(1, 2, figsize=(style.PAGE_WIDTH, 4.4))
    handles: dict[str, object] = {}
    for names in _alike(fitting):
        rows = fitting[fitting["strategy"] == names[0]].sort_values("memory_bytes")
        gib = rows["memory_bytes"].astype(float) / 2**30
        look = style.look(names[0])
        mark = {
            "color": look.colour,
            "marker": look.marker,
            "markersize": 3.8 * look.size,
            "linewidth": 1.1,
        }
        axes[0].plot(gib, rows["concurrent"].astype(float), **mark)
        (line,) = axes[1].plot(gib, rows["machines"].astype(float), **mark)
        handles[", ".join(style.label(name) for name in names)] = line
    sizes = sorted(table["memory_bytes"].astype(float).unique() / 2**30)
    axes[0].set_ylabel("conversations at once per machine")
    axes[1].set_ylabel(f"machines for {int(first['conversations']):,} conversations")
    for ax in axes:
        _axes(ax, sizes)
    figure.suptitle(QUESTION, fontsize=9)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        title=f"{_kv.called(first['model'])}, {first['dtype']}, {int(first['tokens']):,} tokens "
        "a conversation; computed, not measured\n"
        "bytes of weights and caches only; offloaded caches: as much host memory",
        title_fontsize=6.5,
    )
    return figure


def _alike(table: pd.DataFrame) -> list[list[str]]:
    """Group strategies of which equally many conversations fit every memory, within :data:`_SAME`."""
    counts = table.pivot_table(index="strategy", columns="memory_bytes", values="concurrent")
    counts = counts.astype(float).fillna(0)
    groups: list[tuple[pd.Series, list[str]]] = []
    for name in selection.in_order(counts.index):
        own = counts.loc[name]
        for others, names in groups:
            # One conversation more or less is a matter of rounding down.
            if ((own - others).abs() <= (_SAME * others).clip(lower=1)).all():
                names.append(name)
                break
        else:
            groups.append((own, [name]))
    return [names for _, names in sorted(groups, key=lambda group: -group[0].iloc[-1])]


def _axes(ax: Axes, sizes: list[float]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], rotation=45)
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.yaxis.set_major_locator(LogLocator(numticks=9))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(color="0.92", linewidth=0.5)
    ax.set_xlabel("memory of one machine (GiB)")
