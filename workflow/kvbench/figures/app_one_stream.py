"""Figure: latency and origin of the answers of every strategy on one stream, wrong ones marked."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants
from kvbench.figures.style import OKABE_ITO, PAGE_WIDTH

QUESTION = "Which cache helps most on one and the same stream, and how often is it wrong?"

_STRATEGIES = {
    "none": ("none", "black", "-"),
    "exact": ("exact", "blue", "--"),
    "exact_semantic": ("exact + semantic", "orange", "-."),
    "layered": ("layered", "green", ":"),
}
_KINDS = {
    "exact": ("exact hit", "blue", ""),
    "memory": ("memory level", "sky", "///"),
    "server": ("server level", "green", "\\\\\\"),
    "semantic": ("semantic hit", "orange", "..."),
    "model": ("model", "grey", ""),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw, per mix, the distribution of latencies and the answers by kind."""
    table = one_machine(table)
    mixes = list(dict.fromkeys(table["mix"].dropna()))
    if not mixes:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, grid = plt.subplots(
        len(mixes), 2, figsize=(PAGE_WIDTH, 0.8 + 2.3 * len(mixes)), squeeze=False
    )
    for (left, right), mix in zip(grid, mixes, strict=True):
        rows = table[table["mix"] == mix]
        _latencies(left, rows[rows["part"] == "quantile"])
        _answers(right, rows[rows["part"] == "strategy"])
        left.set_title(_mix(rows))
        right.set_title("who answered")
    grid[0, 0].legend(frameon=False, fontsize=6.5, loc="upper left")
    figure.legend(
        *grid[0, 1].get_legend_handles_labels(),
        frameon=False,
        fontsize=6.5,
        ncols=len(_KINDS) + 1,
        loc="outside lower center",
    )
    figure.suptitle(_app.title(QUESTION, table, "requests", "requests"), fontsize=9)
    return figure


def _mix(rows: pd.DataFrame) -> str:
    """What the stream of some rows is made of."""
    kinds = {"repeats": "repeats", "paraphrases": "paraphrases", "near_misses": "near misses"}
    found = rows.dropna(subset=list(kinds))
    if found.empty:
        return f"stream {rows['mix'].iloc[0]}"
    return ", ".join(f"{100 * found[name].iloc[0]:.0f} % {text}" for name, text in kinds.items())


def _latencies(axes: Axes, rows: pd.DataFrame) -> None:
    for name, (label, colour, line) in _lines(rows).items():
        own = rows[rows["strategy"] == name].sort_values("share")
        if not own.empty:
            axes.plot(
                1e3 * own["latency_s"], own["share"], line, color=OKABE_ITO[colour], label=label
            )
    axes.set(xscale="log", xlabel="time of a request (ms)", ylabel="share of requests")


def _answers(axes: Axes, rows: pd.DataFrame) -> None:
    names = [name for name in _lines(rows) if (rows["strategy"] == name).any()]
    rows = rows.drop_duplicates("strategy").set_index("strategy").loc[names]
    places = range(len(names))
    left = pd.Series(0.0, index=names)
    for kind, (label, colour, hatch) in _KINDS.items():
        share = rows[f"{kind}_answers"] / rows["requests"]
        axes.barh(
            places,
            share,
            left=left,
            color=OKABE_ITO[colour],
            hatch=hatch,
            edgecolor="white",
            linewidth=0.6,
            height=0.55,
            label=label,
        )
        left += share
    wrong = rows["wrong_answers"] / rows["requests"]
    axes.barh(
        [place + 0.36 for place in places],
        wrong,
        color=OKABE_ITO["vermilion"],
        height=0.14,
        label="wrong",
    )
    for place, (name, share) in enumerate(wrong.items()):
        count = rows.loc[name, "wrong_answers"]
        axes.text(share + 0.01, place + 0.36, f"{count:.0f} wrong", fontsize=6, va="center")
    axes.set(
        xlim=(0, 1),
        xlabel="share of the answers",
        yticks=places,
        yticklabels=[_label(name, rows.loc[name]) for name in names],
    )
    axes.invert_yaxis()


def _lines(rows: pd.DataFrame) -> dict[str, tuple[str, str, str]]:
    """Label, colour and line of each strategy; one that is not known has a plain line."""
    spare = {
        name: (label, colour, "-")
        for name, (label, colour, _) in _variants.looks(_STRATEGIES, rows["strategy"]).items()
    }
    return spare | _STRATEGIES


def _label(name: str, row: pd.Series) -> str:
    """Name of a strategy with its speed-up over the model alone, and the interval if known."""
    label = _STRATEGIES[name][0] if name in _STRATEGIES else name.replace("_", " ")
    if pd.isna(row["speedup"]):
        return label
    text = f"{label}\n{row['speedup']:.2f}x"
    if pd.notna(row["speedup_ci_low"]):
        text += f" [{row['speedup_ci_low']:.2f}, {row['speedup_ci_high']:.2f}]"
    return text
