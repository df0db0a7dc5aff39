"""Speed-up over no cache and over the dynamic cache as a forest plot, with the published ratios."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvbench import strategies
from kvbench.analysis import published, selection
from kvbench.figures import _kv, style

QUESTION = "How much faster is each strategy, and how sure are we?"

BASES = {"speedup_vs_none": "none", "speedup_vs_dynamic": strategies.REFERENCE}

#: Quotients of the source document's single runs, by column and strategy.
PUBLISHED = {
    "speedup_vs_none": {one: published.ratio(one, "none") for one in ("dynamic", "static")},
    "speedup_vs_dynamic": {"static": published.ratio("static", "dynamic")},
}

AXES = {
    "speedup_vs_none": "speed-up over no cache\n(ratio of E2E)",
    "speedup_vs_dynamic": "speed-up over the dynamic cache\n(ratio of E2E)",
}


def draw(summary: pd.DataFrame, samples: pd.DataFrame, *, model: str | None = None) -> Figure:
    """Draw one row per machine: a line per strategy, a marker with interval per scenario.

    Beside the reference stands its ratio to its own second run in the same rounds, which is 1 but for
    chance. A ratio from which nothing may be concluded has no interval.

    The headline scenario is that of the model nearest to the published one, the others are those of
    the model with the most ratios.

    Parameters
    ----------
    summary:
        The table ``kv_summary``; ``samples`` is not used (a ratio has no single samples).
    model:
        Show this model only.
    """
    chosen = []
    for machine in selection.machines(summary):
        columns = [
            group
            for column in PUBLISHED
            if (group := selection.broadest(summary, machine, column, model=model))
        ]
        if columns:
            chosen.append(columns[0])
    if not chosen:
        return _kv.empty(QUESTION, "no two strategies have been measured on the same scenario yet")
    names, tables = [], []
    for group in chosen:
        rows, name = selection.rows_of(summary, group), _kv.heading(group)
        headline = selection.nearest_to_published(summary, group.machine)
        if headline is not None and model is None and headline != group:
            # The published ratios stand beside the model nearest to theirs, not the widest one.
            own = selection.rows_of(summary, headline, selection.HEADLINE_SCENARIO)
            rows = pd.concat([rows[rows["scenario"] != selection.HEADLINE_SCENARIO], own])
            name += (
                f"; {_kv.called(selection.HEADLINE_SCENARIO)}: "
                f"{_kv.called(headline.model)}, {headline.dtype}"
            )
        rows = selection.measured(rows)
        tables.append(rows[rows[list(PUBLISHED)].notna().any(axis=1)])
        names.append(f"{name} · {_rounds(tables[-1])}")
    heights = [
        2 * sum(_places(rows, selection.in_order(rows["strategy"]))[1].values()) for rows in tables
    ]
    figure, axes = _kv.bands(names, heights, columns=2, margin=0.9)
    seen: dict[str, list[float]] = {column: [1.0] for column in PUBLISHED}
    for line, rows in zip(axes, tables, strict=True):
        order = selection.in_order(rows["strategy"])
        centres, halves = _places(rows, order)
        for ax, column in zip(line, PUBLISHED, strict=True):
            seen[column] += _panel(ax, rows, order, centres, halves, column)
        compiled = rows.drop_duplicates("strategy").set_index("strategy")["compiled"]
        starred = rows.loc[rows["unstable"].isin([True, "True"]), "strategy"].unique()
        line[0].set_yticks(
            [centres[name] for name in order],
            [
                style.label(name, compiled[name]) + (" *" if name in starred else "")
                for name in order
            ],
        )
        line[0].set_ylim(
            centres[order[-1]] + halves[order[-1]], centres[order[0]] - halves[order[0]]
        )
    for place, (column, numbers) in enumerate(seen.items()):
        _kv.scale_column([line[place] for line in axes], numbers, AXES[column])
        for line in axes:
            line[place].axvline(1.0, color="0.4", linewidth=0.8, linestyle=(0, (4, 3)))
    figure.suptitle(QUESTION, fontsize=9)
    handles = [
        Line2D([], [], color="0.3", marker="o", ms=4, linewidth=1.4),
        Line2D([], [], color="0.3", marker="o", ms=4, mfc="white", linewidth=1.4),
        Line2D([], [], color=style.OKABE_ITO["black"], marker="|", ms=7, mew=1.6, linewidth=0),
    ]
    meanings = [
        f"{_kv.called(selection.HEADLINE_SCENARIO)}, 95 % interval",
        "other conversation, 95 % interval",
        "published",
    ]
    if any(rows["unstable"].isin([True, "True"]).any() for rows in tables):
        handles.append(Line2D([], [], linewidth=0, marker="$*$", color="0.3", ms=5))
        meanings.append("unstable in a scenario")
    figure.legend(handles, meanings, loc="outside lower center", ncols=4, frameon=False)
    return figure


#: Height of a marker, in rows of text.
_MARK = 0.22


def _places(rows: pd.DataFrame, order: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Middle and half height of each strategy's band, in rows of text."""
    centres, halves, top = {}, {}, 0.0
    for name in order:
        height = _MARK * rows.loc[rows["strategy"] == name, "scenario"].nunique() + 0.3
        height += 0.6 * any(name in ratios for ratios in PUBLISHED.values())
        height = max(1.0, height)
        centres[name], halves[name] = top + height / 2, height / 2
        top += height
    return centres, halves


def _rounds(rows: pd.DataFrame) -> str:
    """How many rounds the ratios of a machine rest on, one run where a cell has no rounds."""
    low, high = (
        int(number) for number in rows["rounds"].fillna(1).clip(lower=1).agg(["min", "max"])
    )
    if low == high:
        return f"n = {low} round{'s' if low > 1 else ''}"
    return f"n = {low} to {high} rounds"


def _panel(
    ax: Axes,
    rows: pd.DataFrame,
    order: list[str],
    centres: dict[str, float],
    halves: dict[str, float],
    column: str,
) -> list[float]:
    """Draw one column of one machine; return the numbers that the axis has to hold."""
    seen: list[float] = []
    for band, name in enumerate(order):
        look = style.look(name)
        if band % 2:
            ax.axhspan(
                centres[name] - halves[name], centres[name] + halves[name], color="0.965", lw=0
            )
        own = rows[(rows["strategy"] == name) & rows[column].notna()].sort_values("scenario")
        drawn = column
        if name == BASES[column]:
            # A reference is drawn by its own second run, where there was one.
            drawn = "control_ratio"
            twice = name == strategies.REFERENCE and drawn in own
            own = own[own[drawn].notna()] if twice else own.iloc[:0]
            if own.empty:
                ax.text(
                    *(1.0, centres[name], "  = 1"),
                    fontsize=6.5,
                    va="center",
                    color="0.45",
                    style="italic",
                )
        printed = PUBLISHED[column].get(name)
        offsets = _MARK * (np.arange(len(own)) - (len(own) - 1) / 2) + (0.3 if printed else 0)
        for offset, (_, row) in zip(offsets, own.iterrows(), strict=True):
            place, centre = centres[name] + offset, float(row[drawn])
            stem = drawn.removesuffix("_ratio")
            low, high = row.get(f"{stem}_ci_low"), row.get(f"{stem}_ci_high")
            # The reference's second run carries a verdict where its ratios do.
            why_not = row.get("not_judged" if drawn != column else selection.NOT_JUDGED[column])
            if pd.notna(low) and pd.notna(high) and pd.isna(why_not):
                ax.plot([low, high], [place, place], color=look.colour, linewidth=1.2)
                seen.extend([float(low), float(high)])
            headline = row["scenario"] == selection.HEADLINE_SCENARIO
            ax.plot(
                centre,
                place,
                marker=look.marker,
                mfc=look.colour if headline else "white",
                mec=look.colour,
                ms=(4.2 if headline else 3.4) * look.size,
                mew=0.8,
            )
            seen.append(centre)
        if printed is not None:
            place = centres[name] - halves[name] + 0.45
            ax.plot(printed, place, "|", color="black", ms=7, mew=1.6)
            ax.annotate(
                f"{printed:.2f}×",
                (printed, place),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=6,
                va="center",
            )
            seen.append(printed)
    return seen
