"""Where the time of a decoded token goes: a stacked bar per strategy, and the roof of the memory."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis import selection
from kvbench.figures import _kv, style

QUESTION = "Where does the time of a token go?"
TABLES = ("kv_profile",)

#: Columns of the table in the order of the bars, with their words, colours and hatches.
PARTS = {
    "weights_s": ("products with weights", "blue", ""),
    "attention_s": ("attention", "orange", "////"),
    "cache_s": ("writing and copying the cache", "vermilion", "...."),
    "other_s": ("other operators", "sky", "\\\\\\\\"),
    "outside_s": ("Python and dispatch", "grey", "xxxx"),
}
_GROUP = ["machine", "model", "device", "dtype", "scenario"]


def draw(profile: pd.DataFrame) -> Figure:
    """Draw a panel per machine, model and scenario: a bar per strategy, its roof as a black line."""
    rows = profile[profile["token_s"].notna()]
    if rows.empty:
        return _kv.empty(QUESTION, "no experiment asked for a profile")
    groups = list(rows.groupby(_GROUP, sort=True))
    groups.sort(key=lambda group: group[0][0] != selection.HERE)
    heights = [0.75 + 0.2 * len(own) for _, own in groups]
    shrink = min(1.0, _kv.TALLEST / sum(heights))
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(style.PAGE_WIDTH, 1.0 + shrink * sum(heights)),
        squeeze=False,
        height_ratios=heights,
    )
    handles: dict[str, object] = {}
    for ax, (names, own) in zip(axes[:, 0], groups, strict=True):
        machine, model, device, dtype, scenario = names
        context = f"{int(own['context_tokens'].max()):,} tokens of context"
        parts = [
            *map(_kv.called, (machine, model)),
            f"{dtype} on {device}",
            _kv.called(scenario),
            context,
            f"n = {int(own['steps'].max())} steps",
        ]
        ax.set_title(" · ".join(parts), fontsize=7, style="italic", loc="left")
        handles |= _bars(ax, own.set_index("strategy"))
    axes[-1, 0].set_xlabel("time per token (ms)")
    note = "without what the profiler itself costs"
    _kv.finish_lines(figure, handles, QUESTION, note)
    return figure


def _bars(ax: Axes, rows: pd.DataFrame) -> dict[str, object]:
    """The bars of one panel; returns what its legend needs."""
    order = selection.in_order(rows.index)
    rows = rows.loc[order]
    left = pd.Series(0.0, index=rows.index)
    handles: dict[str, object] = {}
    for column, (words, colour, hatch) in PARTS.items():
        widths = 1e3 * rows[column].astype(float)
        handles[words] = ax.barh(
            range(len(order)),
            widths,
            left=left,
            height=0.62,
            color=style.OKABE_ITO[colour],
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
        )
        left = left + widths
    for place, (strategy, row) in enumerate(rows.iterrows()):
        if pd.notna(row["roof_s"]):
            ends = (place - 0.42, place + 0.42)
            (line,) = ax.plot([1e3 * row["roof_s"]] * 2, ends, color="black", linewidth=1.6)
            handles["roof: bytes of a token over the read bandwidth"] = line
            share = f" {row['roof_share']:.0%} of the roof"
            # Behind the roof where the bar ends close before it: the line would cross the words.
            end = left[strategy]
            near = end < 1e3 * row["roof_s"] < end + 0.25 * float(left.max())
            at = 1e3 * row["roof_s"] if near else end
            ax.text(at, place, share, va="center", fontsize=6)
    ax.set_yticks(range(len(order)), [style.label(name) for name in order])
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_xlim(0, 1.18 * float(left.max()))
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    return handles
