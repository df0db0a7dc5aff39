"""Ratios of arms that took turns in one cell, paired within rounds, as columns of a study's table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kvbench.analysis import metrics, paired
from kvbench.analysis.statistics import Interval
from kvbench.paper.values import Value
from kvbench.studies import control_of
from kvbench.studies._estimates import mean_interval

#: The turns of an arm, as :class:`kvbench.studies.measuring._rounds.Log` keeps them.
Arm = Mapping[str, Sequence]

#: Ends of the names of columns that stay empty where a comparison is not judged.
_ENDS = ("ci_low", "ci_high", "smallest_difference")


def _clean(above: Arm, below: Arm) -> list[int]:
    """Return the rounds in which both had turns that nothing disturbed; older records do not say."""
    marks = (
        zip(arm.get("round", ()), arm.get("disturbed", ()), strict=False) for arm in (above, below)
    )
    left_out = {number for arm in marks for number, marked in arm if marked}
    return [number for number in _common(above, below) if number not in left_out]


def _common(above: Arm, below: Arm) -> list[int]:
    return sorted(set(above.get("round", ())) & set(below.get("round", ())))


def _counted(above: Arm, below: Arm) -> list[int]:
    """Return the clean rounds, or all if there is none: what a value stands on that is not judged."""
    return _clean(above, below) or _common(above, below)


def _by_round(arm: Arm, measured: str) -> dict[int, float]:
    """Return the mean of each round; an arm may have several turns in one."""
    held: dict[int, list[float]] = {}
    for number, value in zip(arm.get("round", ()), arm.get(measured, ()), strict=True):
        held.setdefault(number, []).append(value)
    return {number: sum(values) / len(values) for number, values in held.items()}


def pairs(above: Arm, below: Arm, measured: str = "seconds") -> list[tuple[float, float]]:
    """Return what two arms took in the rounds that a comparison of them is computed from."""
    one, other = _by_round(above, measured), _by_round(below, measured)
    return [(one[number], other[number]) for number in _counted(above, below)]


def log_ratios(above: Arm, below: Arm, measured: str = "seconds") -> list[float]:
    """Return the logarithm of ``above / below`` for every round in which nothing disturbed either.

    Parameters
    ----------
    above, below:
        Turns of an arm.
    measured:
        Which of their lists is compared; it must be positive.
    """
    found = pairs(above, below, measured) if _clean(above, below) else []
    return [math.log(one / other) for one, other in found]


def compare(
    name: str,
    arms: Mapping[str, Arm],
    above: str,
    below: str,
    reference: str | None = None,
    measured: str = "seconds",
) -> dict[str, Any]:
    """Return the ratio of two arms' times as the columns of :func:`meanings`.

    Parameters
    ----------
    name:
        Of the ratio.
    arms:
        All arms of the cell, the control of the reference among them, if there was one.
    above, below:
        Whose time is divided by whose.
    reference:
        The one of the two that all are compared with; if not told, ``above``.
    measured:
        Which list of their turns is compared.
    """
    ends = arms.get(above, {}), arms.get(below, {})
    row = columns_of(name, [math.log(one / other) for one, other in pairs(*ends, measured)])
    return _judged(name, row, len(_clean(*ends)), _control(arms, reference or above, measured))


def _control(arms: Mapping[str, Arm], reference: str, measured: str) -> Interval | None:
    """Return the ratio of a reference to its own second turn of the same rounds, if it had one."""
    logs = log_ratios(arms.get(reference, {}), arms.get(control_of(reference), {}), measured)
    if not logs:
        return None
    found = paired.ratio([logs], one_process=True)
    if found.rounds < paired.FEWEST_ROUNDS:
        return Interval(found.value, math.nan, math.nan)
    return found.interval


def _judged(
    name: str, row: dict[str, Any], rounds: int, control: Interval | None
) -> dict[str, Any]:
    """Put the control beside a comparison and, where it is not judged, the reason for its interval.

    ``rounds`` are those that nothing disturbed; if there is none, the row is that of all rounds.
    """
    if not row:
        return row
    why_not = metrics.ALL_DISTURBED
    if rounds:
        why_not = metrics.why_not_judged(rounds, paired.FEWEST_BLOCKS, metrics.Evidence(), control)
    row = {**row, f"{name}_rounds": rounds}
    if control is not None:
        row[f"{name}_control_ratio"] = control.value
        if math.isfinite(control.low):
            row[f"{name}_control_ci_low"] = control.low
            row[f"{name}_control_ci_high"] = control.high
    if why_not is None:
        return row
    for end in _ENDS:
        row.pop(f"{name}_{end}", None)
    return {**row, f"{name}_not_judged": why_not}


def difference(
    name: str, arms: Mapping[str, Arm], more: str, less: str, measured: str = "seconds"
) -> dict[str, Any]:
    """Return the mean difference of two arms over rounds, as the columns of :func:`meanings`.

    Its interval is Student's over the rounds' differences; ``less`` is the reference.
    """
    ends = arms.get(more, {}), arms.get(less, {})
    gaps = [one - other for one, other in pairs(*ends, measured)]
    if not gaps:
        return {}
    mean, interval = mean_interval(gaps)
    row = {name: mean}
    if interval is not None:
        error = float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps))
        row |= {
            f"{name}_ci_low": interval[0],
            f"{name}_ci_high": interval[1],
            f"{name}_smallest_difference": paired.found_from(error, len(gaps) - 1.0),
        }
    return _judged(name, row, len(_clean(*ends)), _control(arms, less, measured))


def columns_of(name: str, logs: Iterable[float]) -> dict[str, float]:
    """Return a ratio as ``<name>`` with ``_ci_low``, ``_ci_high``, ``_smallest_difference``, ``_rounds``.

    Below :data:`kvbench.analysis.paired.FEWEST_ROUNDS` the ends stay empty: so few rounds do not
    show what their own spread is, and nothing may be concluded from them.
    """
    logs = list(logs)
    if not logs:
        return {}
    # All arms of a study work in this process.
    found = paired.ratio([logs], one_process=True)
    row = {name: found.value, f"{name}_rounds": found.rounds}
    return row | (_ends(name, found) if found.rounds >= paired.FEWEST_ROUNDS else {})


def _ends(name: str, found: paired.Paired) -> dict[str, float]:
    """The interval of a ratio, and what it would have shown nine times out of ten."""
    return {
        f"{name}_ci_low": found.interval.low,
        f"{name}_ci_high": found.interval.high,
        f"{name}_smallest_difference": found.smallest_difference,
    }


def of_streams(
    name: str, arms: Mapping[str, Arm], above: str, below: str, groups: Sequence[object]
) -> dict[str, Any]:
    """Return :func:`ratio_of_sums` of two arms whose rounds are requests; ``above`` is the reference.

    ``groups`` holds one entry for every turn of ``below``.
    """
    ends = arms.get(above, {}), arms.get(below, {})
    label = dict(zip(ends[1].get("round", ()), groups, strict=True))
    above_s, below_s = zip(*found, strict=True) if (found := pairs(*ends)) else ((), ())
    row = ratio_of_sums(name, above_s, below_s, [label[number] for number in _counted(*ends)])
    return _judged(name, row, len(_clean(*ends)), _control(arms, above, "seconds"))


def limit(arms: Mapping[str, Arm], above: str, below: str) -> float:
    """Return the most that the ratio of two arms can be: over the rounds that it is computed from.

    ``below`` holds a list ``limit`` of what each of its turns could gain; as the ratio itself, this
    is a geometric mean. NaN where they share no round.
    """
    most = _by_round(arms[below], "limit")
    counted = [math.log(most[number]) for number in _counted(arms.get(above, {}), arms[below])]
    return math.exp(sum(counted) / len(counted)) if counted else math.nan


def ratio_of_sums(
    name: str, above: Sequence[float], below: Sequence[float], groups: Sequence[object]
) -> dict[str, float]:
    """Return the same columns for the ratio of two sums over requests that were asked in turn.

    For a stream in which some requests are answered at once and others are generated, the mean of
    ratios says nothing; the ratio of the sums does. Its interval is that of a ratio estimator
    (Cochran, *Sampling Techniques*, section 6.4), with the residuals' variance taken within
    ``groups`` (hits and misses): the stream is fixed, the times are what is uncertain.
    """
    x, y = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    if not x.size:
        return {}
    ratio = float(x.sum() / y.sum())
    row = {name: ratio, f"{name}_rounds": int(x.size)}
    residuals = x - ratio * y
    labels = np.asarray([str(group) for group in groups])
    parts = [residuals[labels == label] for label in np.unique(labels)]
    freedom = sum(part.size - 1 for part in parts if part.size > 1)
    if x.size < paired.FEWEST_ROUNDS or freedom < 1:
        return row
    variance = sum(part.size * float(part.var(ddof=1)) for part in parts if part.size > 1)
    error = math.sqrt(variance) / float(x.sum())
    return row | _ends(name, paired.Paired(ratio, error, float(freedom), int(x.size), 1))


def meanings(name: str, meaning: str) -> dict[str, str]:
    """Return what the columns of a comparison mean, for a study's ``columns``."""
    unit = "in its unit" if name.endswith("_s") else "as a share"
    empty = f"empty where {name}_not_judged is not"
    return {
        name: f"{meaning}, paired within rounds",
        f"{name}_ci_low": f"lower end of the 95 % interval of {name}; {empty}",
        f"{name}_ci_high": f"upper end of the 95 % interval of {name}; {empty}",
        f"{name}_smallest_difference": f"what {name} would have shown nine times out of ten, {unit}; "
        f"{empty}",
        f"{name}_rounds": f"undisturbed rounds that {name} was computed from; 0: all were disturbed",
        f"{name}_control_ratio": f"the reference of {name} over its own second turn in the same rounds; "
        "empty without one",
        f"{name}_control_ci_low": "lower end of its 95 % interval; empty below ten rounds",
        f"{name}_control_ci_high": "upper end of its 95 % interval; empty below ten rounds",
        f"{name}_not_judged": f"why no verdict may rest on {name}; empty where one may",
    }


def value(
    row: Mapping[str, Any] | None,
    name: str,
    unit: str = "x",
    digits: int = 2,
    otherwise: float | None = None,
) -> Value:
    """Return a ratio as a named value; without an interval where there are too few rounds.

    ``otherwise`` is the ratio of two medians, which stands in where nothing took turns: a value
    without an interval, from which nothing is concluded.
    """
    held = None if row is None else row.get(name)
    if held is None or not math.isfinite(held):
        known = otherwise is not None and math.isfinite(otherwise)
        return Value(float(otherwise) if known else None, unit=unit, digits=digits)
    ends = tuple(row.get(f"{name}_ci_{end}", math.nan) for end in ("low", "high"))
    known = all(end is not None and math.isfinite(end) for end in ends)
    rounds, smallest = (row.get(f"{name}_{what}") for what in ("rounds", "smallest_difference"))
    return Value(
        float(held),
        (float(ends[0]), float(ends[1])) if known else None,
        unit,
        digits,
        rounds=int(rounds) if rounds is not None and math.isfinite(rounds) else None,
        smallest_difference=smallest if smallest is not None and math.isfinite(smallest) else None,
        not_judged=_text(row.get(f"{name}_not_judged")),
    )


def _text(held: object) -> str | None:
    """Return a cell of a table that holds text or nothing."""
    return held if isinstance(held, str) and held else None


def quotient(
    above: Mapping[str, Any] | None, below: Mapping[str, Any] | None, column: str
) -> float | None:
    """Return the ratio of one column of two rows, or None if either is missing."""
    ends = [None if row is None else row.get(column) for row in (above, below)]
    if any(end is None or not math.isfinite(end) for end in ends) or not ends[1]:
        return None
    return float(ends[0] / ends[1])


def beyond_limit(rows: Iterable[Mapping[str, Any]], name: str, limit: str) -> int:
    """Return in how many rows the whole interval of a ratio lies above its theoretical limit."""
    count = 0
    for row in rows:
        low, most = row.get(f"{name}_ci_low"), row.get(limit)
        if low is not None and most is not None and low > most:
            count += 1
    return count
