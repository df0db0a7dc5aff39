"""Figure: time to the first token and goodput of an endpoint against the load put on it."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv
from kvbench.figures._app_rows import one_machine
from kvbench.figures.style import OKABE_ITO, PAGE_WIDTH

QUESTION = "How much load does an endpoint bear?"

_SERVERS = {
    "transformers_serve": ("transformers serve", OKABE_ITO["blue"], "o"),
    "proxy": ("proxy before it", OKABE_ITO["green"], "s"),
    "vllm_serve": ("vLLM's server", OKABE_ITO["purple"], "^"),
    "configured": ("configured server", OKABE_ITO["vermilion"], "D"),
}
_LOADS = {"closed": "open conversations", "open": "conversations that begin in a second (1/s)"}
_PARTS = (
    ("ttft_p50_s", "time to first token (ms)", 1000.0),
    ("good_share", "share within the service level", 1.0),
)


def draw(table: pd.DataFrame) -> Figure:
    """Draw median time to first token (with interval) and the good share, a column a kind of load."""
    rows = one_machine(table)
    kinds = [kind for kind in _LOADS if (rows["load"] == kind).any()]
    if not kinds:
        return _kv.empty(QUESTION, "the study has not been measured yet")
    figure, grid = plt.subplots(
        len(_PARTS),
        len(kinds),
        figsize=(PAGE_WIDTH, 4.2),
        sharex="col",
        sharey="row",
        squeeze=False,
    )
    for column, kind in enumerate(kinds):
        for line, (name, label, scale) in enumerate(_PARTS):
            axes = grid[line][column]
            for server, (title, colour, marker) in _SERVERS.items():
                part = rows[(rows["server"] == server) & (rows["load"] == kind)]
                part = part.sort_values("level").dropna(subset=[name])
                if part.empty:
                    continue
                axes.plot(
                    part["level"], scale * part[name], color=colour, marker=marker, label=title
                )
                if f"{name}_ci_low" in part:
                    axes.vlines(
                        part["level"],
                        scale * part[f"{name}_ci_low"],
                        scale * part[f"{name}_ci_high"],
                        color=colour,
                        lw=2.5,
                        alpha=0.4,
                    )
            if column == 0:
                axes.set_ylabel(label)
            axes.grid(axis="y", lw=0.4, alpha=0.6)
        grid[0][column].set_yscale("log")
        grid[1][column].set_ylim(-0.03, 1.05)
        grid[1][column].set_xlabel(_LOADS[kind])
    grid[0][0].legend(frameon=False)
    figure.suptitle(QUESTION)
    return figure
