"""The test of the instrument itself: does it call equal things different, does it see 5 %?

A block measures one strategy several times, some of its cells slowed by a known share. Every two of
its cells are compared as any two strategies are, paired within rounds. Equal cells that "differ"
are false alarms; slowed ones that do not are misses. Long blocks are cut into stretches of fewer
rounds, which says how many rounds, and how many seconds, it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.analysis import intervals, metrics, paired
from kvbench.analysis.metrics import Evidence, Repeats
from kvbench.analysis.paired import Paired
from kvbench.records.identity import HERE

if TYPE_CHECKING:
    import pandas as pd

SAME, SLOWED = "same", "slowed"

#: What the test aims at: at most this share of false alarms, at least that of slowdowns found.
FALSE_ALARMS, FOUND = 0.05, 0.90
#: Lengths that a block is cut into, as far as it reaches.
ROUNDS = (10, 15, 20, 30, 45, 60, 90, 120, 180, 240)
#: Half-width at which a comparison of one block rests: the precision of the default configuration.
PRECISION = 0.02
#: Blocks that one comparison is put together from.
BLOCKS = (1, 2, 3)

COLUMNS = {
    "machine": "`here`, or the name of a recorded machine",
    "arm": "same: a strategy against itself; slowed: against itself with the injected slowdown",
    "slowdown": "slowdown that was asked for, as a share",
    "injected": "slowdown that was truly injected, as a share, median over turns; empty for equal "
    "cells and for records that do not say",
    "cells": "processes that were measured in this arm, in all blocks",
    "blocks": "blocks that one comparison is put together from",
    "rounds": "rounds of each of these blocks in one comparison",
    "measuring_s": "time that both cells of a comparison take for them (s), median",
    "comparisons": "comparisons made",
    "independent": "of these, comparisons that share no cell",
    "differs": "comparisons whose interval excludes 1",
    "share": "the same as a share: false alarms, or slowdowns found",
    "share_ci_low": "lower end of its 95 % interval, by the independent comparisons (exact binomial)",
    "share_ci_high": "upper end of its 95 % interval",
    "ratio_median": "median of the estimated ratios",
    "stopped_rounds": "rounds after which a comparison of one block has reached the precision of "
    f"{PRECISION:g} and rests, as strategies do in a block; median",
    "stopped_share": "share of the comparisons that differ when each ends by that rule: false alarms, "
    "or slowdowns found",
    "stopped_ci_low": "lower end of its 95 % interval, by the comparisons that share no cell",
    "stopped_ci_high": "upper end of its 95 % interval",
    "smallest_slowdown": "slowdown of one side that nine out of ten of these comparisons would have "
    "found, as a share; by equal cells only",
}


def evaluate(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Compare the cells of every block with each other, and count.

    Parameters
    ----------
    records:
        Machine to the records of its test, each with ``cell.slowdown``. Those that name no block
        come from processes that ran one after the other; nothing can be paired, and they are left
        out.
    """
    import pandas as pd

    rows = []
    for machine, found in sorted(records.items()):
        blocks = _blocks(found)
        arms = sorted({one for block in blocks for one in block})
        shared = {one: {"injected": _injected(found, one)} | _stopped(blocks, one) for one in arms}
        for count, length in product(BLOCKS, ROUNDS):
            for slowdown in arms:
                row = _row(blocks, slowdown, count, length)
                if row is not None:
                    rows.append({"machine": machine} | shared[slowdown] | row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _blocks(records: Iterable[Mapping[str, Any]]) -> list[dict[float, list[Repeats]]]:
    """For each block its cells by slowdown."""
    found: dict[str, dict[float, list[Repeats]]] = {}
    ordered = sorted(
        (record for record in records if record["status"] == "ok"),
        key=lambda record: (record["cell"]["slowdown"], record["cell"]["replicate"]),
    )
    for record in ordered:
        cell = metrics.repeats(record)
        if cell.block is not None:
            found.setdefault(cell.block, {}).setdefault(record["cell"]["slowdown"], []).append(cell)
    return [found[name] for name in sorted(found)]


def _injected(records: Iterable[Mapping[str, Any]], slowdown: float) -> float:
    """Share of their own time by which the turns of the slowed cells were really lengthened."""
    shares = [
        sample["injected_s"] / (sample["e2e_s"] - sample["injected_s"])
        for record in records
        if record["cell"]["slowdown"] == slowdown
        for turn in record["turns"]
        for sample in turn["samples"]
        if "injected_s" in sample
    ]
    return float(np.median(shares)) if shares else math.nan


def _stopped(
    blocks: Sequence[Mapping[float, Sequence[Repeats]]], slowdown: float
) -> dict[str, float]:
    """What becomes of the comparisons when each goes on until its precision is reached."""
    found = []
    for block in blocks:
        for pair in _pairs(block, slowdown):
            logs = metrics.log_ratios(*pair)
            ends = range(paired.FEWEST_ROUNDS, logs.size)
            rest = (n for n in ends if paired.reached([logs[:n]], PRECISION))
            found.append(paired.ratio([logs[: next(rest, logs.size)]]) if logs.size else None)
    known = [one for one in found if one is not None]
    if not known:
        return {}
    share = float(np.mean([paired.differs(one) for one in known]))
    ends = _interval(share, sum(_apart(block, slowdown) for block in blocks))
    return {
        "stopped_rounds": float(np.median([one.rounds for one in known])),
        "stopped_share": share,
        "stopped_ci_low": ends[0],
        "stopped_ci_high": ends[1],
    }


def _interval(share: float, independent: int) -> tuple[float, float]:
    """Interval of a share of comparisons that share cells: as if only those apart had been made."""
    return (
        intervals.share(math.floor(share * independent), independent)[0],
        intervals.share(math.ceil(share * independent), independent)[1],
    )


def _pairs(block: Mapping[float, Sequence[Repeats]], slowdown: float) -> list[tuple]:
    """Cells of a block to compare: every two equal ones, or every slowed one with every equal one."""
    same = block.get(0.0, [])
    if not slowdown:
        return list(combinations(same, 2))
    return list(product(block.get(slowdown, []), same))


def _apart(block: Mapping[float, Sequence[Repeats]], slowdown: float) -> int:
    """How many of a block's pairs share no cell."""
    same = len(block.get(0.0, []))
    return min(len(block.get(slowdown, [])), same) if slowdown else same // 2


def _row(
    blocks: Sequence[Mapping[float, Sequence[Repeats]]], slowdown: float, count: int, length: int
) -> dict[str, Any] | None:
    """One row of the table, or None where there is nothing to compare at this length."""
    found: list[Paired] = []
    seconds: list[float] = []
    independent = 0
    for start in range(0, len(blocks) - count + 1, count):
        group = blocks[start : start + count]
        series = [
            [(metrics.log_ratios(*pair), _seconds(*pair)) for pair in _pairs(block, slowdown)]
            for block in group
        ]
        pairs = min(map(len, series))
        if not pairs:
            continue
        windows = min(logs.size for block in series for logs, _ in block) // length
        # Other rounds of the same processes are no other comparison: what tells two processes of one
        # block apart stays with them.
        independent += min(_apart(block, slowdown) for block in group) if windows else 0
        for number in range(pairs):
            for window in range(windows):
                cut = slice(window * length, (window + 1) * length)
                found.append(paired.ratio([block[number][0][cut] for block in series]))
                seconds.append(sum(length * block[number][1] for block in series))
    if not found or not independent:
        return None
    verdicts = [paired.differs(one) for one in found]
    share = float(np.mean(verdicts))
    ends = _interval(share, independent)
    # A slowdown shifts a ratio by itself and widens nothing: it would have been found where it lifts
    # the lower end above 1.
    lifts = [max(0.0, 1 / one.interval.low - 1) for one in found]
    return {
        "arm": SLOWED if slowdown else SAME,
        "slowdown": slowdown,
        "cells": sum(len(block.get(slowdown, [])) for block in blocks),
        "blocks": count,
        "rounds": length,
        "measuring_s": float(np.median(seconds)),
        "comparisons": len(found),
        "independent": independent,
        "differs": sum(verdicts),
        "share": share,
        "share_ci_low": ends[0],
        "share_ci_high": ends[1],
        "ratio_median": float(np.median([one.value for one in found])),
        "smallest_slowdown": math.nan if slowdown else float(np.quantile(lifts, FOUND)),
    }


def _seconds(one: Repeats, other: Repeats) -> float:
    """What a round of both cells takes, median over rounds (s)."""
    return sum(float(np.median(side.e2e_s.sum(axis=0))) for side in (one, other))


def machine_of(table: pd.DataFrame) -> str | None:
    """The machine whose test is told: this one, or else the first recorded one; None without any.

    Half a test, of equal cells only or slowed ones only, is none.
    """
    whole = [
        machine
        for machine, rows in table.groupby("machine", sort=True)
        if {SAME, SLOWED} <= set(rows["arm"])
    ]
    return HERE if HERE in whole else next(iter(whole), None)


def evidence(table: pd.DataFrame, machine: str) -> Evidence:
    """Rounds and blocks that a verdict needs on a machine.

    The fewest from which on no length tested had more false alarms than 5 %, by the lower end of
    its interval; of the machine's own test, or without one of the first recorded machine's, or
    without any of the simulated ones (:data:`paired.FEWEST_ROUNDS`). Where even the longest had
    more, twice that.
    """
    rows = table[table["arm"] == SAME]
    own = rows[rows["machine"] == machine]
    if own.empty:
        told = machine_of(table)
        own = rows[rows["machine"] == told] if told else rows
    if own.empty:
        return Evidence()
    for blocks, part in own.groupby("blocks", sort=True):
        ordered = part.sort_values("rounds", ascending=False)
        fewest = None
        for row in ordered.to_dict("records"):
            if row["share_ci_low"] > FALSE_ALARMS:
                break
            fewest = int(row["rounds"]) * int(blocks)
        if fewest is not None:
            return Evidence(max(fewest, paired.FEWEST_ROUNDS), int(blocks))
    return Evidence(2 * int((own["rounds"] * own["blocks"]).max()), int(own["blocks"].max()))


def told_differences(summary: Iterable[Mapping[str, Any]]) -> str | None:
    """One line on what a run could see, from the rows of its ``kv_summary``; None without any.

    Parameters
    ----------
    summary:
        Rows with ``machine``, ``strategy``, ``smallest_difference`` and ``not_judged``, as numbers
        or as the words of the CSV.
    """
    found = []
    for row in summary:
        told = str(row.get("smallest_difference") or "")
        judged = str(row.get("not_judged") or "") in ("", "nan")
        if row["machine"] == HERE and judged and told not in ("", "nan"):
            found.append(float(told))
    if not found:
        return None
    middle, widest = (100 * float(value) for value in (np.median(found), max(found)))
    text = f"this run could tell differences from {middle:.1f} % on"
    return f"{text} ({widest:.1f} % in the widest of {len(found)} comparisons)"
