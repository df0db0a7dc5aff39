"""The test of the instrument itself: does it call equal things different, does it see 5 %?

Many fresh processes measure the same strategy, half of them slowed by a known share. Pairs of cells
are then put together from processes at random, each cell with as many replicates as a real one or
more, and given the same verdict as any comparison in the tables. Equal cells that "differ" are false
alarms; slowed ones that do not are misses. Rows with more replicates say how many processes it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from kvbench.analysis import statistics
from kvbench.analysis.statistics import AATest, Interval

SAME, SLOWED = "same", "slowed"

COLUMNS = {
    "machine": "`here`, or the name of a recorded machine",
    "arm": "same: a strategy against itself; slowed: against itself with the injected slowdown",
    "slowdown": "injected slowdown, as a share",
    "processes": "fresh processes measured in this arm",
    "replicates": "processes per cell of a pair",
    "iterations": "timed iterations per process",
    "pairs": "pairs drawn",
    "differs": "pairs whose interval excludes 1",
    "share": "the same as a share: false alarms, or slowdowns found",
    "share_ci_low": "lower end of its 95 % interval (jackknife over processes)",
    "share_ci_high": "upper end of its 95 % interval",
    "ratio_median": "median of the pairs' estimated ratios",
}


def evaluate(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    replicates: Sequence[int],
    pairs: int,
    seed: int,
) -> pd.DataFrame:
    """Draw pairs, compare them, and count.

    Parameters
    ----------
    records:
        Machine to the records of its test, each with ``cell.slowdown``.
    replicates:
        Processes per cell; each number gives rows of its own.
    pairs:
        Pairs to draw for each arm.
    seed:
        Seed of the draws.
    """
    rows = []
    for machine, found in sorted(records.items()):
        good = [record for record in found if record["status"] == "ok"]
        arms = {
            slowdown: [_samples(r) for r in good if r["cell"]["slowdown"] == slowdown]
            for slowdown in sorted({record["cell"]["slowdown"] for record in good})
        }
        same = arms.get(0.0, [])
        for size, (slowdown, slowed) in product(sorted(replicates), arms.items()):
            needed = size * (1 if slowdown else 2)
            if len(slowed) < needed or len(same) < size:
                continue
            drawn = _draw(len(same), len(slowed), size, pairs, bool(slowdown), seed)
            ratios = [statistics.ratio_interval(_cell(slowed, b), _cell(same, a)) for a, b in drawn]
            verdicts = np.array([statistics.differs(ratio) for ratio in ratios])
            share = _jackknife(verdicts, drawn, bool(slowdown))
            rows.append(
                {
                    "machine": machine,
                    "arm": SLOWED if slowdown else SAME,
                    "slowdown": slowdown,
                    "processes": len(slowed),
                    "replicates": size,
                    "iterations": len(next(iter(slowed[0].values()))),
                    "pairs": len(drawn),
                    "differs": int(verdicts.sum()),
                    "share": share.value,
                    "share_ci_low": share.low,
                    "share_ci_high": share.high,
                    "ratio_median": float(np.median([ratio.value for ratio in ratios])),
                }
            )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _samples(record: Mapping[str, Any]) -> dict[tuple[str, int], list[float]]:
    return {
        (record["cell"]["scenario"], turn["turn"]): [
            sample["e2e_s"] for sample in turn["samples"] if not sample["disturbed"]
        ]
        or [sample["e2e_s"] for sample in turn["samples"]]
        for turn in record["turns"]
    }


def _cell(
    processes: Sequence[Mapping[tuple[str, int], list[float]]], chosen: Sequence[int]
) -> dict[tuple[str, int], list[list[float]]]:
    keys = processes[chosen[0]].keys()
    return {key: [processes[number][key] for number in chosen] for key in keys}


def _draw(
    same: int, other: int, replicates: int, pairs: int, slowed: bool, seed: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of process numbers; the two cells of a pair never share a process."""
    generator = np.random.default_rng((seed, int(slowed)))
    drawn = []
    for _ in range(pairs):
        if slowed:
            first = generator.choice(same, replicates, replace=False)
            second = generator.choice(other, replicates, replace=False)
        else:
            both = generator.choice(same, 2 * replicates, replace=False)
            first, second = both[:replicates], both[replicates:]
        drawn.append((tuple(map(int, first)), tuple(map(int, second))))
    return drawn


def _jackknife(
    verdicts: np.ndarray,
    drawn: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    slowed: bool,
) -> Interval:
    """Share of verdicts with an interval that knows that pairs share processes.

    The share is a U-statistic of the processes; leaving each one out in turn gives its variance
    (Arvesen, 1969, "Jackknifing U-statistics"). At 0 or 1, where that is nothing, the exact binomial
    bound for as many pairs as the processes could make without sharing takes its place.
    """
    share = float(verdicts.mean())
    members = [
        {("a", number) for number in first} | {("b" if slowed else "a", n) for n in second}
        for first, second in drawn
    ]
    processes = sorted(set().union(*members))
    left_out = np.array(
        [verdicts[[process not in member for member in members]].mean() for process in processes]
    )
    n = len(processes)
    error = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    width = float(stats.t.ppf(0.975, n - 1)) * error
    apart = max(1, n // len(members[0]))
    low, high = max(0.0, share - width), min(1.0, share + width)
    if share == 0.0:
        high = 1 - 0.025 ** (1 / apart)
    if share == 1.0:
        low = 0.025 ** (1 / apart)
    return Interval(share, low, high)


def as_tests(table: pd.DataFrame, machine: str) -> dict[int, dict[str, AATest]]:
    """The table's rows of one machine, by processes per cell and arm; half a test is left out."""
    rows = table[table["machine"] == machine]
    found: dict[int, dict[str, AATest]] = {}
    for row in rows.to_dict("records"):
        found.setdefault(int(row["replicates"]), {})[row["arm"]] = AATest(
            int(row["pairs"]),
            int(row["differs"]),
            Interval(row["share"], row["share_ci_low"], row["share_ci_high"]),
        )
    return {size: tests for size, tests in found.items() if {SAME, SLOWED} <= set(tests)}
