"""Loss of the embedded model during its training, and the share of replies it knows by heart."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from kvbench.figures import _kv, style

TABLES = ("training_loss",)

QUESTION = "How did the embedded model learn its replies?"

#: Steps over which the drawn line is averaged; each step sees other examples.
WINDOW = 25
#: The share of replies that the project asks for.
WANTED = 0.95

_SHARE = "exact_share_"


def draw(loss: pd.DataFrame) -> Figure:
    """Draw the loss above and the share of exact replies below, over the steps.

    Parameters
    ----------
    loss:
        ``training/loss.csv`` of the checkpoint: ``step``, ``loss`` (nats a token), and one column
        ``exact_share_<new tokens>`` for each length checked, empty between checks.
    """
    if loss.empty:
        return _kv.empty(QUESTION, "the table of losses has no row")
    shares = [name for name in loss.columns if name.startswith(_SHARE)]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(style.COLUMN_WIDTH, 3.2), sharex=True, height_ratios=[3, 2]
    )
    blue = style.OKABE_ITO["blue"]
    sns.lineplot(
        loss, x="step", y="loss", ax=above, color=blue, alpha=0.3, linewidth=0.5, label="one step"
    )
    smooth = np.exp(np.log(loss["loss"]).rolling(WINDOW, center=True, min_periods=1).mean())
    above.plot(loss["step"], smooth, color=blue, linewidth=1.2, label=f"mean of {WINDOW} steps")
    above.set_yscale("log")
    above.set_ylabel("loss (nats per token)")
    above.legend(frameon=False)
    colours = [style.OKABE_ITO[name] for name in ("vermilion", "green", "purple", "orange")]
    for number, name in enumerate(shares):
        checked = loss[["step", name]].dropna()
        sns.lineplot(
            x=checked["step"],
            y=100 * checked[name],
            ax=below,
            color=colours[number % len(colours)],
            marker="os^D"[number % 4],
            markersize=3,
            linewidth=1,
            label=f"{name.removeprefix(_SHARE)} new tokens a turn",
        )
    below.axhline(100 * WANTED, color=style.OKABE_ITO["grey"], linewidth=0.8, linestyle=":")
    below.set_ylim(-3, 103)
    below.set_ylabel("exact replies (%)")
    below.set_xlabel("step of training")
    if shares:
        below.legend(frameon=False)
    figure.suptitle(f"{QUESTION}\nn = {loss['step'].nunique():,} steps", fontsize=9)
    return figure
