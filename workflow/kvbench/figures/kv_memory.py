"""KV memory measured in the cache's own storage against the prediction, as the context grows."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from kvbench.analysis import selection
from kvbench.figures import _kv, style

QUESTION = "Does the KV cache take the memory the formula says?"

#: The scenarios that sweep the context; without one, all conversations are used.
SWEEP = selection.SWEEP_SCENARIO


def draw(summary: pd.DataFrame, samples: pd.DataFrame, *, model: str | None = None) -> Figure:
    """Draw one log-log panel per machine: markers measured, lines predicted.

    Strategies that store nothing between steps have no place on a logarithmic axis and are left
    out.

    Parameters
    ----------
    summary, samples:
        The tables ``kv_summary`` and ``kv_samples``.
    model:
        Narrow the choice; by default each machine shows the model with the most KV measurements.
    """
    sweep = summary["scenario"].astype(str).str.startswith(SWEEP)
    chosen = []
    for machine in selection.machines(summary):
        for table in (summary[sweep], summary[~sweep]):
            group = selection.broadest(table, machine, "kv_mib", model=model)
            if group is None:
                continue
            names = set(selection.rows_of(table, group)["scenario"])
            own = selection.rows_of(samples, group)
            own = own[own["scenario"].isin(names) & (own["kv_mib"] > 0)]
            if len(own):
                chosen.append((group, own))
                break
    if not chosen:
        return _kv.empty(QUESTION, "no cell with a KV cache has been measured yet")
    columns = min(4, len(chosen))
    lines = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(style.PAGE_WIDTH, 1.2 + 2.2 * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    handles: dict[str, object] = {}
    for ax, (group, own) in zip(axes.flat, chosen, strict=False):
        _panel(ax, own, handles)
        ax.set_title(
            f"{_kv.called(group.machine)}\n{_kv.called(group.model)}\n"
            f"{group.dtype} · n = {len(own):,} samples",
            fontsize=7.5,
            style="italic",
        )
    for ax in list(axes.flat)[len(chosen) :]:
        ax.set_visible(False)
    for line in axes:
        line[0].set_ylabel("KV cache (MiB)")
    handles = {style.label(name): handles[name] for name in selection.in_order(handles)}
    _kv.finish_lines(figure, handles, QUESTION, "marker: measured; line: predicted")
    return figure


def _panel(ax: Axes, samples: pd.DataFrame, handles: dict[str, object]) -> None:
    table = samples.assign(context=samples["prompt_tokens"] + samples["new_tokens"])
    sizes = _nested(table)
    for strategy in selection.in_order(table["strategy"]):
        look = style.look(strategy)
        own = (
            table[table["strategy"] == strategy]
            .groupby("context", sort=True)[["kv_mib", "kv_mib_predicted"]]
            .median()
        )
        predicted = own["kv_mib_predicted"].dropna()
        ax.plot(predicted.index, predicted, color=look.colour, linewidth=0.9, alpha=0.8)
        (handles[strategy],) = ax.plot(
            own.index,
            own["kv_mib"],
            marker=look.marker,
            linestyle="none",
            color=look.colour,
            mfc="none",
            mew=0.9,
            ms=sizes[strategy] * look.size,
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set_xlabel("prompt and new tokens")
    ax.grid(color="0.92", linewidth=0.5)
    ax.set_axisbelow(True)


def _nested(table: pd.DataFrame) -> dict[str, float]:
    """Marker sizes in points, larger for the earlier of strategies that store the same amount."""
    stored = table.groupby("strategy")["kv_mib"].max()
    sizes: dict[str, float] = {}
    for strategy in reversed(selection.in_order(stored.index)):
        twins = [name for name in sizes if abs(stored[name] / stored[strategy] - 1) < 0.05]
        sizes[strategy] = 3.2 + 2.0 * len(twins)
    return sizes
