"""Figure: hits by class of question over the threshold, and recall against false hits."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv
from kvbench.figures._app_rows import one_machine
from kvbench.figures.style import OKABE_ITO, PAGE_WIDTH

QUESTION = "Which similarity is enough to serve a stored answer, and how often is it wrong?"

_CLASSES = {
    "paraphrase": ("paraphrases (right)", OKABE_ITO["green"], "-"),
    "near_negation": ("negation", OKABE_ITO["vermilion"], "--"),
    "near_direction": ("direction", OKABE_ITO["orange"], "--"),
    "near_number": ("number", OKABE_ITO["purple"], "--"),
    "near_temporal": ("temporal", OKABE_ITO["black"], "--"),
    "near_action": ("action", OKABE_ITO["sky"], "--"),
    "near_entity": ("entity", OKABE_ITO["blue"], "--"),
    "never_cached": ("never cached", OKABE_ITO["grey"], ":"),
}

_POLICIES = {
    "static": ("threshold only", OKABE_ITO["black"], "o"),
    "context": ("+ context", OKABE_ITO["blue"], "s"),
    "numbers": ("+ numbers", OKABE_ITO["purple"], "^"),
    "names": ("+ names", OKABE_ITO["orange"], "D"),
    "polarity": ("+ polarity", OKABE_ITO["green"], "v"),
    "margin": ("+ margin", OKABE_ITO["vermilion"], "x"),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw both panels from the study's table (report half)."""
    table = one_machine(table)
    report = table[table["half"] == "report"]
    if report.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE_WIDTH, 2.9))
    _classes(left, report[(report["part"] == "threshold") & (report["score"] == "cosine")])
    _frontier(right, report)
    return figure


def _classes(axes: plt.Axes, sweep: pd.DataFrame) -> None:
    for name, (label, colour, line) in _CLASSES.items():
        rows = sweep[sweep["query_class"] == name].sort_values("threshold")
        if rows.empty:
            continue
        share = rows["correct_hits" if name == "paraphrase" else "hits"] / rows["queries"]
        axes.plot(
            rows["threshold"], share, line, color=colour, label=label, lw=1.2 if line != "-" else 2
        )
    axes.set(
        xlabel="threshold (cosine)",
        ylabel="share answered from the cache",
        ylim=(-0.02, 1.02),
        title="Right hits (solid) and false hits (broken)",
    )
    axes.legend(frameon=False, loc="lower left", handlelength=2.2, fontsize=6.5)


def _frontier(axes: plt.Axes, report: pd.DataFrame) -> None:
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
    for name, (label, colour, marker) in _POLICIES.items():
        for _, row in points[points["policy"] == name].iterrows():
            axes.errorbar(
                row["false_hit_rate"],
                row["recall"],
                xerr=_reach(row, "false_hit_rate"),
                yerr=_reach(row, "recall"),
                fmt=marker,
                ms=4.5,
                mfc="none" if marker in "sv" else colour,
                color=colour,
                elinewidth=0.8,
                label=label,
            )
    axes.set(
        xlabel="false hits per request",
        ylabel="recall of right answers",
        xlim=(0, None),
        ylim=(0, 1.02),
        title="Tuned on one half, measured on the other",
    )
    axes.legend(frameon=False, loc="lower right", fontsize=6.5)


def _reach(row: pd.Series, rate: str) -> list[list[float]] | None:
    """Return the arms of an error bar; none where the table has no interval."""
    low, high = row[f"{rate}_ci_low"], row[f"{rate}_ci_high"]
    if pd.isna(low) or pd.isna(high):
        return None
    return [[max(0.0, row[rate] - low)], [max(0.0, high - row[rate])]]
