"""Figure: what one threshold means on different score scales."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv
from kvbench.figures._app_rows import one_machine
from kvbench.figures.style import OKABE_ITO, PAGE_WIDTH

QUESTION = "Is `distance < 1 - threshold` on squared L2 the cosine threshold that it looks like?"

_SCORES = {
    "cosine": ("cosine >= t", OKABE_ITO["green"], "-"),
    "l2_snippet": ("squared L2 < 1 - t", OKABE_ITO["vermilion"], "--"),
    "l2_unnormalised": ("squared L2 < 1 - t, not normalised", OKABE_ITO["orange"], ":"),
    "gptcache": ("GPTCache scale", OKABE_ITO["blue"], "-."),
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw the cosine that each rule asks for, and the paraphrases it finds."""
    table = one_machine(table)
    sweep = table[(table["part"] == "threshold") & (table["half"] == "report")]
    if sweep.empty:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE_WIDTH, 2.6))
    for score, (label, colour, line) in _SCORES.items():
        rows = sweep[(sweep["score"] == score) & (sweep["query_class"] == "paraphrase")]
        rows = rows.sort_values("threshold")
        if rows.empty:
            continue
        asked = rows["threshold"] if score == "cosine" else rows["cosine_asked"]
        if asked.notna().any():
            left.plot(rows["threshold"], asked, line, color=colour, label=label)
        right.plot(rows["threshold"], rows["recall"], line, color=colour, label=label)
    left.set(
        xlabel="threshold t as configured",
        ylabel="cosine that is asked for",
        title="One number, three meanings",
    )
    right.set(
        xlabel="threshold t as configured",
        ylabel="paraphrases answered rightly",
        ylim=(-0.02, 1.02),
        title="What the wrong scale costs or lets in",
    )
    right.legend(frameon=False, fontsize=6.5, loc="best")
    return figure
