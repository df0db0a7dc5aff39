"""Two records, two runs or two machines held against each other, and what may be concluded.

Two cells of one block took turns: their ratio is paired and gets a verdict. Two runs stood in
different weather, so their seconds are shown side by side and not judged; what is judged is each
strategy's paired ratio to the reference of its own block, which the weather does not move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvbench.analysis import metrics
from kvbench.analysis.paired import Paired
from kvbench.analysis.statistics import Interval
from kvbench.errors import InputError
from kvbench.records.identity import CONTROL
from kvbench.strategies import REFERENCE

#: Fields of a cell that must be equal for its times to be comparable.
_SAME = (
    "suite",
    "model",
    "scenario",
    "device",
    "dtype",
    "threads",
    "seed",
    "turns",
    "max_new_tokens",
)
#: The rest of what makes a cell, with which cells of two runs are matched.
_MATCHED = ("model", "scenario", "device", "dtype", "strategy")
_ALPHA = 0.05

FASTER, SLOWER = "faster", "slower"
NO_DIFFERENCE, NO_VERDICT = "no difference found", "no verdict"


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes
    ----------
    what:
        What was compared, in words.
    ratio:
        Time of the second over time of the first: below 1 the second is faster.
    interval:
        Its 95 % interval; NaN ends where there is none.
    verdict:
        Of the second: :data:`FASTER`, :data:`SLOWER`, :data:`NO_DIFFERENCE` or :data:`NO_VERDICT`.
    why:
        Why there is no verdict; otherwise the smallest difference that would have been found.
    p:
        Two-sided p value of "no difference"; NaN without a verdict.
    seconds:
        Median end-to-end latency of a turn on both sides (s).
    """

    what: str
    ratio: float
    interval: Interval
    verdict: str
    why: str
    p: float = math.nan
    seconds: tuple[float, float] = (math.nan, math.nan)


def records(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    reference: Mapping[str, Any] | None = None,
    control: Mapping[str, Any] | None = None,
) -> Result:
    """Compare two kv records.

    Parameters
    ----------
    first, second:
        The records.
    reference, control:
        Those of the reference and of its second run in the same block, where they are there: if
        these two differ, nothing is concluded.

    Raises
    ------
    InputError
        They cannot be compared: one failed, or they differ in more than the strategy.
    """
    for record, name in ((first, "first"), (second, "second")):
        if record["status"] != "ok":
            raise InputError(
                f"the {name} record is {record['status']} ({record['reason']}); "
                "only cells that ran can be compared"
            )
    for key in _SAME:
        ours, theirs = first["cell"].get(key), second["cell"].get(key)
        if ours != theirs:
            raise InputError(
                f"cell.{key} is {ours!r} in the first record and {theirs!r} in the second; "
                "times of different cells cannot be compared"
            )
    sides = [metrics.repeats(record) for record in (second, first)]
    if not _side_by_side(first, second):
        # Two runs of one configuration have blocks of the same name, which never took turns.
        sides[0] = replace(sides[0], block=None)
    found = metrics.compare([sides[0]], [sides[1]])
    what = f"{second['cell']['strategy']} over {first['cell']['strategy']}"
    seconds = (_median(sides[1]), _median(sides[0]))
    if found.paired is None:
        why = "not measured side by side: the two did not take turns in one block"
        return Result(what, found.value, found.interval, NO_VERDICT, why, seconds=seconds)
    known = [one for one in (reference, control) if one is not None and _side_by_side(first, one)]
    why = why_not(found, known[:1], known[1:])
    if why:
        return Result(what, found.value, found.interval, NO_VERDICT, why, seconds=seconds)
    return _judged(what, found.paired, seconds)


def why_not(
    found: metrics.Comparison,
    reference: Sequence[Mapping[str, Any]],
    control: Sequence[Mapping[str, Any]],
) -> str | None:
    """Why no verdict may rest on a comparison, in a few words; None when one may.

    Parameters
    ----------
    found:
        A paired comparison of cells of some blocks.
    reference, control:
        Records of the reference and of its second run in these blocks; empty where there are none.
    """
    beside, precision = None, metrics.PRECISION
    if reference and control:
        sides = [list(map(metrics.repeats, side)) for side in (reference, control)]
        beside = metrics.compare(*sides).interval
        stated = [record["block"].get("precision") for record in control if record.get("block")]
        precision = max((one for one in stated if one), default=precision)
    return metrics.why_not_judged(found.rounds, found.blocks, metrics.Evidence(), beside, precision)


def runs(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Compare two runs cell by cell, through each strategy's paired ratio to the reference.

    Raises
    ------
    InputError
        The two have no cell in common.
    """
    sides = [_cells(found) for found in (first, second)]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        raise InputError(
            "the two runs have no cell in common (model, scenario, device, dtype, strategy)"
        )
    return [_across(key, *(side for side in sides)) for key in sorted(common)]


def slower(results: Iterable[Result]) -> list[Result]:
    """The comparisons whose second side is slower, false alarms held at 5 % over all of them.

    By Holm's procedure (1979): a run of many comparisons has chance findings otherwise.
    """
    judged = sorted((r for r in results if not math.isnan(r.p)), key=lambda r: r.p)
    found = []
    for place, result in enumerate(judged):
        if result.p > _ALPHA / (len(judged) - place):
            break
        if result.verdict == SLOWER:
            found.append(result)
    return found


def _side_by_side(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two records come from one block of one run: the order of its rounds tells."""
    blocks = [record.get("block") or {} for record in (first, second)]
    return all(blocks[0].get(key) == blocks[1].get(key) for key in ("id", "order", "probe_s"))


def quotient(above: Paired, below: Paired) -> Paired:
    """The quotient of two independent paired ratios; degrees of freedom by Welch."""
    variance = above.error**2 + below.error**2
    freedom = 0.0
    if above.freedom and below.freedom:
        parts = above.error**4 / above.freedom + below.error**4 / below.freedom
        freedom = variance**2 / parts if parts else min(above.freedom, below.freedom)
    return Paired(
        above.value / below.value,
        math.sqrt(variance),
        freedom,
        min(above.rounds, below.rounds),
        min(above.blocks, below.blocks),
    )


def _cells(found: Iterable[Mapping[str, Any]]) -> dict[tuple, list[Mapping[str, Any]]]:
    cells: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in found:
        if record["status"] == "ok":
            key = tuple(record["cell"][name] for name in _MATCHED)
            cells.setdefault(key, []).append(record)
    return cells


def _across(key: tuple, first: Mapping[tuple, Any], second: Mapping[tuple, Any]) -> Result:
    """Compare one cell of two runs: the second's ratio to its reference over the first's."""
    strategy = key[-1]
    seconds = tuple(_median(metrics.repeats(side[key][0])) for side in (first, second))
    ratio = seconds[1] / seconds[0]
    what = " ".join(key[:1] + key[1:2] + key[-1:])
    bare = Interval(ratio, math.nan, math.nan)
    threads = {record["cell"]["threads"] for side in (first, second) for record in side[key]}
    if len(threads) > 1:
        why = f"measured with {' and '.join(map(str, sorted(threads)))} threads"
        return Result(what, ratio, bare, NO_VERDICT, why, seconds=seconds)
    if strategy == REFERENCE:
        why = "seconds of two runs are not judged: the machine's speed wanders between them"
        return Result(what, ratio, bare, NO_VERDICT, why, seconds=seconds)
    reference = (*key[:-1], REFERENCE)
    sides = []
    for side in (first, second):
        if reference not in side:
            why = f"one run has no {REFERENCE} to hold {strategy} against"
            return Result(what, ratio, bare, NO_VERDICT, why, seconds=seconds)
        found = metrics.compare(
            map(metrics.repeats, side[key]), map(metrics.repeats, side[reference])
        )
        why = why_not(found, side[reference], side.get((*key[:-1], CONTROL), ()))
        if found.paired is None or why:
            why = why or "not measured in rounds"
            return Result(what, ratio, bare, NO_VERDICT, why, seconds=seconds)
        sides.append(found.paired)
    return _judged(f"{what} (over {REFERENCE})", quotient(sides[1], sides[0]), seconds)


def _judged(what: str, found: Paired, seconds: tuple[float, float]) -> Result:
    interval = found.interval
    verdict = NO_DIFFERENCE
    if interval.low > 1:
        verdict = SLOWER
    elif interval.high < 1:
        verdict = FASTER
    return Result(
        what,
        found.value,
        interval,
        verdict,
        f"would have found {100 * found.smallest_difference:.1f} %",
        _p_value(found),
        seconds,
    )


def _p_value(found: Paired) -> float:
    if not found.freedom:
        return math.nan
    if found.error == 0:
        return 1.0 if found.value == 1 else 0.0
    from scipy.special import stdtr

    return float(2 * stdtr(found.freedom, -abs(math.log(found.value)) / found.error))


def _median(side: metrics.Repeats) -> float:
    values = sorted(side.conversations()["e2e_s"])
    if not values:
        return math.nan
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
