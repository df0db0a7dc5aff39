"""Figure: hits by class of question over the threshold, and recall against false hits, by language."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv, _variants
from kvbench.figures.style import OKABE_ITO, PAGE_WIDTH

QUESTION = "Which similarity is enough to serve a stored answer, and how often is it wrong?"

#: Label, colour and dashes of each class of question.
_CLASSES = {
    "paraphrase": ("paraphrases (right)", "green", "-"),
    "near_negation": ("negation", "vermilion", "--"),
    "near_direction": ("direction", "orange", (0, (1, 1))),
    "near_number": ("number", "purple", "-."),
    "near_temporal": ("temporal", "black", (0, (5, 1, 1, 1, 1, 1))),
    "near_action": ("action", "sky", (0, (3, 1))),
    "near_entity": ("entity", "blue", (0, (7, 3))),
    "never_cached": ("never cached", "grey", (0, (1, 3))),
}

#: Label, colour and marker of each policy; each guards against one thing more.
_POLICIES = {
    "static": ("threshold only", "black", "o"),
    "context": ("+ context", "blue", "s"),
    "numbers": ("+ numbers", "purple", "^"),
    "names": ("+ names", "orange", "D"),
    "polarity": ("+ polarity", "green", "v"),
    "margin": ("+ margin", "vermilion", "X"),
}

#: Policies of the study's stream, which answers other questions.
_OTHERS = ("guarded", "learned", "learned_guarded")


def draw(table: pd.DataFrame) -> Figure:
    """Draw a row of both panels per language of the questions, from the study's report half."""
    table = one_machine(table)
    report = table[table["half"] == "report"]
    if report.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    spoken = _app.languages(report)
    figure, grid = plt.subplots(
        len(spoken),
        2,
        figsize=(PAGE_WIDTH, 1.0 + 2.3 * len(spoken)),
        sharex="col",
        sharey=True,
        squeeze=False,
    )
    for (left, right), (name, rows) in zip(grid, spoken.items(), strict=True):
        _classes(left, rows[(rows["part"] == "threshold") & (rows["score"] == "cosine")])
        _frontier(right, rows)
        heading = _app.asked(name, rows[rows["part"] == "threshold"])
        for ax in (left, right):
            ax.set_title(heading, fontsize=8)
        left.set_ylabel("share answered from the cache")
        right.set_ylabel("recall of right answers")
        right.tick_params(labelleft=True)
    grid[-1][1].set_xlim(left=0)
    grid[-1][0].set_xlabel("threshold (cosine)")
    grid[-1][1].set_xlabel("false hits per request (bars: 95 % intervals)")
    entries: dict[str, object] = {}
    for ax in grid[0]:
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        frameon=False,
        fontsize=6.5,
        ncols=5,
        handlelength=2.6,
        loc="outside lower center",
        title="left: right hits solid, false hits broken; "
        "right: marks tuned on one half of the questions and measured on the other",
        title_fontsize=6.5,
    )
    figure.suptitle(_app.title(QUESTION, report), fontsize=9)
    return figure


def _classes(axes: Axes, sweep: pd.DataFrame) -> None:
    for name, (label, colour, line) in _CLASSES.items():
        rows = sweep[sweep["query_class"] == name].sort_values("threshold")
        if rows.empty:
            continue
        share = rows["correct_hits" if name == "paraphrase" else "hits"] / rows["queries"]
        axes.plot(
            rows["threshold"],
            share,
            linestyle=line,
            color=OKABE_ITO[colour],
            label=label,
            lw=2 if line == "-" else 1.1,
        )
    axes.set_ylim(-0.02, 1.02)


def _frontier(axes: Axes, report: pd.DataFrame) -> None:
    sweep = report[
        (report["part"] == "threshold")
        & (report["score"] == "cosine")
        & (report["query_class"] == "all")
    ].sort_values("threshold")
    axes.plot(
        sweep["false_hit_rate"],
        sweep["recall"],
        color=OKABE_ITO["grey"],
        lw=1,
        label="every threshold",
    )
    points = report[(report["part"] == "policy") & (report["query_class"] == "all")]
    points = points[~points["policy"].isin(_OTHERS)]
    for name, (label, colour, marker) in _variants.looks(_POLICIES, points["policy"]).items():
        for _, row in points[points["policy"] == name].iterrows():
            axes.errorbar(
                row["false_hit_rate"],
                row["recall"],
                xerr=_reach(row, "false_hit_rate"),
                yerr=_reach(row, "recall"),
                fmt=marker,
                ms=4.5,
                mfc="none" if marker in "sv" else OKABE_ITO[colour],
                color=OKABE_ITO[colour],
                elinewidth=0.8,
                label=label,
            )


def _reach(row: pd.Series, rate: str) -> list[list[float]] | None:
    """Return the arms of an error bar; none where the table has no interval."""
    low, high = row[f"{rate}_ci_low"], row[f"{rate}_ci_high"]
    if pd.isna(low) or pd.isna(high):
        return None
    return [[max(0.0, row[rate] - low)], [max(0.0, high - row[rate])]]
