"""Figure: what one threshold means on different score scales."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.analysis.selection import one_machine
from kvbench.figures import _app, _kv
from kvbench.figures.style import OKABE_ITO, PAGE_WIDTH

QUESTION = "Is `distance < 1 - threshold` on squared L2 the cosine threshold that it looks like?"

_SCORES = {
    "cosine": ("cosine ≥ t", "green", "-"),
    "l2_snippet": ("squared L2 < 1 - t", "vermilion", "--"),
    "l2_unnormalised": ("squared L2 < 1 - t, not normalised", "orange", ":"),
    "gptcache": ("GPTCache scale", "blue", "-."),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw the cosine that each rule asks for, and the paraphrases it finds, by language."""
    table = one_machine(table)
    sweep = table[(table["part"] == "threshold") & (table["half"] == "report")]
    sweep = sweep[sweep["query_class"] == "paraphrase"]
    if sweep.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    spoken = _app.languages(sweep)
    figure, axes = plt.subplots(1, 1 + len(spoken), figsize=(PAGE_WIDTH, 2.7))
    # What a rule asks for has nothing to do with the language.
    first = next(iter(spoken.values()))
    for score, (label, colour, line) in _SCORES.items():
        rows = first[first["score"] == score].sort_values("threshold")
        asked = rows["threshold"] if score == "cosine" else rows["cosine_asked"]
        if asked.notna().any():
            axes[0].plot(rows["threshold"], asked, line, color=OKABE_ITO[colour], label=label)
    axes[0].set_ylabel("cosine that is asked for")
    axes[0].set_title("one number, three meanings", fontsize=7)
    for ax, (name, rows) in zip(axes[1:], spoken.items(), strict=True):
        for score, (label, colour, line) in _SCORES.items():
            own = rows[rows["score"] == score].sort_values("threshold")
            if len(own):
                ax.plot(own["threshold"], own["recall"], line, color=OKABE_ITO[colour], label=label)
        ax.set(ylabel="paraphrases answered rightly", ylim=(-0.02, 1.02))
        ax.set_title(_app.asked(name, rows), fontsize=7)
    for ax in axes:
        ax.set_xlabel("threshold t as configured")
    figure.legend(
        *axes[-1].get_legend_handles_labels(),
        frameon=False,
        fontsize=6.5,
        ncols=len(_SCORES),
        loc="outside lower center",
    )
    figure.suptitle(_app.title(QUESTION, table), fontsize=9)
    return figure
