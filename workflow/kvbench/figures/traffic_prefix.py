"""Input tokens of a log that need no prefill, by memory of the prefix cache, policy and block size."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv, _traffic, style

TABLES = ("traffic_prefix", "traffic_summary")

QUESTION = "Your traffic: how much prefill does a prefix cache save?"

#: Units of the memory axis in GiB, the largest first.
_UNITS = {"GiB": 1.0, "MiB": 2.0**-10, "KiB": 2.0**-20}


def draw(table: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Draw reused tokens against the cache's memory, and against the block size."""
    rows = _traffic.one(table)
    if rows.empty:
        return _kv.empty(QUESTION, "the log does not show which prompts begin alike")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(style.PAGE_WIDTH, 2.8), width_ratios=[1.7, 1]
    )
    most = rows["capacity_gib"].max()
    unit = next((name for name, size in _UNITS.items() if most >= size), "KiB")
    rows = rows.assign(memory=rows["capacity_gib"] / _UNITS[unit])
    shared = rows[rows["sharing"] == "shared"]
    finest = shared[shared["block_tokens"] == shared["block_tokens"].min()]
    limit = finest.loc[finest["policy"] == "unlimited", "token_share"]
    _traffic.lines(left, finest[finest["policy"] != "unlimited"], "memory", "token_share")
    for level in limit.head(1):
        left.axhline(100 * level, color="black", linestyle=":", linewidth=1, label="unlimited")
    own = rows[(rows["sharing"] == "per_client") & (rows["policy"] == "unlimited")]
    for level in own["token_share"].head(1):
        left.axhline(
            100 * level,
            color=style.OKABE_ITO["grey"],
            linestyle="--",
            label="unlimited, per client",
        )
    fitting = finest.loc[finest["fits"].astype(bool) & (finest["policy"] == "lru"), "memory"]
    if len(fitting) and not finest["fits"].astype(bool).all():
        left.axvspan(left.get_xlim()[0], fitting.max(), color="#EEEEEE", zorder=0)
        left.annotate(
            "fits this machine",
            (fitting.max(), 0.03),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="bottom",
            fontsize=6.5,
        )
    left.set(
        xscale="log",
        xlabel=f"memory of the cache ({unit})",
        ylabel="input tokens without prefill (%)",
    )
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=6.5)
    sizes = shared[shared["policy"] == "unlimited"].sort_values("block_tokens")
    right.bar(
        [f"{tokens}" for tokens in sizes["block_tokens"]],
        100 * sizes["token_share"],
        color=style.OKABE_ITO["sky"],
    )
    right.set(xlabel="tokens of a block, unlimited cache", ylabel="without prefill (%)")
    figure.suptitle(_traffic.title(QUESTION, rows, summary))
    return figure
