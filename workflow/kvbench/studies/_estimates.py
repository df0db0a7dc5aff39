"""Intervals and named values that several studies derive from their tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from kvbench.paper.values import Value


def mean_interval(samples: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Return mean and 95 % Student interval; the interval is None with fewer than two samples."""
    from scipy import stats

    data = np.asarray(samples, dtype=float)
    mean = float(data.mean())
    if len(data) < 2:
        return mean, None
    half = float(stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data)))
    return mean, (mean - half, mean + half)


def median_interval(samples: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Return median and its distribution-free 95 % interval from order statistics.

    The interval is None with fewer than six samples, where no such interval reaches 95 %.
    """
    data = np.sort(np.asarray(samples, dtype=float))
    count = len(data)
    median = float(np.median(data))
    if count < 6:
        return median, None
    # The smallest rank with P(Binomial(n, 1/2) <= rank) >= 2.5 %, in whole numbers.
    rank, term, total = 0, 1, 1
    while 40 * total < 2**count:
        term = term * (count - rank) // (rank + 1)
        rank += 1
        total += term
    return median, (float(data[rank - 1]), float(data[count - rank]))


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], seed: int, draws: int = 2000
) -> tuple[float, tuple[float, float] | None]:
    """Return the ratio of two medians and its 95 % bootstrap interval (percentiles)."""
    top, bottom = np.asarray(numerator, float), np.asarray(denominator, float)
    ratio = float(np.median(top) / np.median(bottom))
    if min(len(top), len(bottom)) < 6:
        return ratio, None
    rng = np.random.default_rng(seed)
    drawn = np.median(rng.choice(top, (draws, len(top))), axis=1) / np.median(
        rng.choice(bottom, (draws, len(bottom))), axis=1
    )
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ratio, (float(low), float(high))


def mean_value(samples: Iterable[float], unit: str = "", digits: int = 2) -> Value:
    """Return the mean of the finite ``samples`` as a value, or an empty one if there is none."""
    data = [float(sample) for sample in samples if sample is not None and math.isfinite(sample)]
    if not data:
        return Value(None, unit=unit, digits=digits)
    mean, interval = mean_interval(data)
    return Value(mean, interval, unit, digits)


def share_value(samples: Iterable[float], digits: int = 1) -> Value:
    """Return the mean of shares in ``[0, 1]`` in percent; its interval keeps to that range too."""
    mean = mean_value((100 * sample for sample in samples), "%", digits)
    if mean.ci is None:
        return mean
    return Value(mean.value, (max(0.0, mean.ci[0]), min(100.0, mean.ci[1])), "%", digits)


def single_value(samples: Iterable[object], unit: str = "", digits: int = 2) -> Value:
    """Return the first of ``samples`` that is there as a value, or an empty one."""
    for sample in samples:
        if sample is None or (isinstance(sample, float) and math.isnan(sample)):
            continue
        return Value(sample.item() if hasattr(sample, "item") else sample, None, unit, digits)
    return Value(None, unit=unit, digits=digits)


def interval_value(
    centre: float | None, low: float | None, high: float | None, unit: str = "", digits: int = 2
) -> Value:
    """Return a value from three columns of a table, any of which may be missing."""
    numbers = [None if n is None or math.isnan(n) else float(n) for n in (centre, low, high)]
    if numbers[0] is None:
        return Value(None, unit=unit, digits=digits)
    ends = None if None in numbers[1:] else (numbers[1], numbers[2])
    return Value(numbers[0], ends, unit, digits)
