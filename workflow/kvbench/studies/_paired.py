"""Ratios of arms that took turns in one cell, paired within rounds, as columns of a study's table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kvbench.analysis import paired
from kvbench.paper.values import Value
from kvbench.studies._estimates import mean_interval


def log_ratios(
    above: Mapping[str, Sequence], below: Mapping[str, Sequence], measured: str = "seconds"
) -> list[float]:
    """Return the logarithm of ``above / below`` for every round in which both arms had a turn.

    Parameters
    ----------
    above, below:
        Turns of an arm as :class:`kvbench.studies.measuring._rounds.Log` keeps them.
    measured:
        Which of their lists is compared; it must be positive.
    """
    one, other = _by_round(above, measured), _by_round(below, measured)
    return [math.log(one[n] / other[n]) for n in sorted(one.keys() & other.keys())]


def _by_round(arm: Mapping[str, Sequence], measured: str) -> dict[int, float]:
    """Return the mean of each round; an arm may have several turns in one."""
    held: dict[int, list[float]] = {}
    for number, value in zip(arm.get("round", ()), arm.get(measured, ()), strict=True):
        held.setdefault(number, []).append(value)
    return {number: sum(values) / len(values) for number, values in held.items()}


def difference(
    name: str, more: Mapping[str, Sequence], less: Mapping[str, Sequence]
) -> dict[str, float]:
    """Return the mean difference of two arms over rounds, as the columns of :func:`columns_of`.

    Its interval is Student's over the rounds' differences.
    """
    one, other = _by_round(more, "seconds"), _by_round(less, "seconds")
    gaps = [one[n] - other[n] for n in sorted(one.keys() & other.keys())]
    if not gaps:
        return {}
    mean, ends = mean_interval(gaps)
    row = {name: mean, f"{name}_rounds": len(gaps)}
    if ends is not None and len(gaps) >= paired.FEWEST_ROUNDS:
        error = float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps))
        row |= {
            f"{name}_ci_low": ends[0],
            f"{name}_ci_high": ends[1],
            f"{name}_smallest_difference": paired.found_from(error, len(gaps) - 1.0),
        }
    return row


def columns_of(name: str, logs: Iterable[float]) -> dict[str, float]:
    """Return the ratio as ``<name>`` with ``_ci_low``, ``_ci_high``, ``_smallest_difference``, ``_rounds``.

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
    """Return what the columns of a ratio mean, for a study's ``columns``."""
    return {
        name: f"{meaning}, paired within rounds",
        f"{name}_ci_low": f"lower end of the 95 % interval of {name}; empty below ten rounds",
        f"{name}_ci_high": f"upper end of the 95 % interval of {name}; empty below ten rounds",
        f"{name}_smallest_difference": f"what {name} would have shown nine times out of ten, "
        f"{'in its unit' if name.endswith('_s') else 'as a share'}; empty below ten rounds",
        f"{name}_rounds": f"rounds that {name} was computed from",
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
    )


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
