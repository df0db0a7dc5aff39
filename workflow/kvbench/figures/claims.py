"""Every claim of the source documents: the measured interval against its figure, with the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from kvbench.analysis import claims, selection
from kvbench.analysis.claims import verdict
from kvbench.figures import _kv, _language, style

QUESTION = "What do the source documents claim, and what was measured?"

TABLES = ("claims",)

#: Verdict to colour and marker; the shape alone tells them apart too.
VERDICTS = {
    verdict.REPRODUCED: (style.OKABE_ITO["green"], "o"),
    verdict.REFUTED: (style.OKABE_ITO["vermilion"], "X"),
    verdict.INCONCLUSIVE: (style.OKABE_ITO["orange"], "D"),
    verdict.MET: (style.OKABE_ITO["blue"], "s"),
    verdict.NOT_MET: (style.OKABE_ITO["purple"], "P"),
    verdict.NOT_ENOUGH: (style.OKABE_ITO["sky"], "."),
    verdict.NOT_TESTED: (style.OKABE_ITO["grey"], "_"),
}

#: The axis ends here; what lies beyond is an arrow at the end with its number beside it.
_LOWEST, _HIGHEST = 1e-2, 1e2
_ROW = 0.165
#: More panels than these would leave no room for the intervals.
_MOST_MACHINES = 3


def draw(table: pd.DataFrame | Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a row a claim and a panel a machine, this one first, three at most.

    The axis is the measured value over the source's figure, or over the end of the bound where the
    source gives none, so that claims in seconds, bytes and ratios share it; 1 is what was claimed.

    Parameters
    ----------
    table:
        The table ``claims`` or the rows of :func:`kvbench.analysis.claims.evaluate`.
    """
    rows = claims.plain(table)
    if not rows:
        return _kv.empty(QUESTION, "there are no claims")
    order = list(dict.fromkeys(row["id"] for row in rows))
    called = {row["id"]: row["label_en"] for row in rows}
    named = pd.DataFrame({"machine": [row["machine"] or None for row in rows]})
    found = selection.machines(named) or [""]
    shown = found[:_MOST_MACHINES]
    height = min(_kv.TALLEST, 0.9 + _ROW * len(order))
    figure = style.plt.figure(figsize=(style.PAGE_WIDTH, height))
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, machine in zip(axes, shown, strict=True):
        own = {row["id"]: row for row in rows if (row["machine"] or machine) == machine}
        for place, name in enumerate(order):
            if name in own:
                _mark(ax, place, own[name])
        _frame(ax, len(order), len(shown))
        ax.set_title(_kv.called(machine) if machine else "computed", fontsize=7.5, style="italic")
    axes[0].set_yticks(range(len(order)), [called[name] for name in order], fontsize=6)
    _language.bring(figure, {"pt": {row["label_en"]: row["label_pt"] for row in rows}})
    axes[0].set_ylim(len(order) - 0.5, -0.7)
    figure.suptitle(f"{QUESTION}\nn = {len(order)} claims", fontsize=9)
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=4.5, linewidth=1.2 * (marker != "_"))
        for colour, marker in VERDICTS.values()
    ]
    words = list(VERDICTS)
    handles.append(Patch(color="0.88"))
    words.append("where the claim holds")
    left_out = found[_MOST_MACHINES:]
    figure.legend(
        handles,
        words,
        loc="outside lower center",
        ncols=5,
        frameon=False,
        title=f"not shown: {', '.join(left_out)}" if left_out else None,
        title_fontsize=6.5,
    )
    return figure


def _frame(ax: Axes, count: int, panels: int) -> None:
    ax.set_xscale("log")
    ax.set_xlabel("measured / claimed", fontsize=7)
    # The numbers stand in a column of their own, right of the last tick: a quarter of a wide panel,
    # half of a narrow one.
    taken = 0.25 * (panels + 1) / 2
    left = _LOWEST / 1.6
    ax.set_xlim(left, left * (_HIGHEST / left) ** (1 / (1 - taken)))
    ticks = [0.01, 0.1, 1, 10, 100]
    ax.xaxis.set_major_locator(FixedLocator(ticks if panels < 3 else ticks[::2]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.plot([1, 1], [-0.7, count - 0.5], color="0.4", linewidth=0.8, linestyle=(0, (4, 3)))
    for place in range(1, count, 2):
        ax.axhspan(place - 0.5, place + 0.5, color="0.97", lw=0, zorder=0)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def reference(row: Mapping[str, Any]) -> float | None:
    """The number that stands at 1: the source's figure, else the end of the bound that is there."""
    for name in ("figure_value", "bound_low", "bound_high"):
        number = row[name]
        if number is not None and number > 0:
            return float(number)
    return None


def _mark(ax: Axes, place: int, row: Mapping[str, Any]) -> None:
    colour, marker = VERDICTS[row["verdict"]]
    claimed = reference(row)

    def clipped(number: float) -> float:
        return min(max(number, _LOWEST), _HIGHEST)

    if claimed is not None:
        low = _LOWEST if row["bound_low"] is None else clipped(row["bound_low"] / claimed)
        high = _HIGHEST if row["bound_high"] is None else clipped(row["bound_high"] / claimed)
        # A bound that is a single number still has to be seen.
        ax.barh(
            place,
            max(high - low, 0.04 * low),
            left=low,
            height=0.62,
            color="0.88",
            linewidth=0,
            zorder=1,
        )
    text = claims.measured_text(row) if row["value"] is not None else row["verdict"]
    value = row["value"]
    if value is not None and value > 0 and claimed is not None:
        x = value / claimed
        ends = [row["ci_low"], row["ci_high"]]
        if None not in ends:
            drawn = [clipped(max(end, 0) / claimed) for end in ends]
            ax.plot(drawn, [place, place], color=colour, linewidth=1.3, zorder=3)
        outside = "<" if x < _LOWEST else ">" if x > _HIGHEST else None
        ax.plot(
            clipped(x),
            place,
            outside or marker,
            color=colour,
            ms=4.5,
            mec="white",
            mew=0.4,
            zorder=4,
        )
    elif value is None:
        ax.plot(1, place, marker, color=colour, ms=5, mew=1.2, zorder=4)
    else:
        ax.plot(_LOWEST, place, marker, color=colour, ms=4.5, mec="white", mew=0.4, zorder=4)
    ax.text(
        1.0,
        place,
        text,
        transform=ax.get_yaxis_transform(),
        ha="right",
        va="center",
        fontsize=5,
        color="0.45" if value is None else "0.15",
    )
