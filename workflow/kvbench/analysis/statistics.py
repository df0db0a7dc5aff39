"""Intervals for medians and ratios from a few noisy repeats, and the test that they can be trusted.

Samples come as *replicates* (fresh processes) of *iterations* (repeats inside one process). The
interval follows the hierarchy: what varies is the process, so the unit that is resampled is the
replicate (Kalibera and Jones, 2013, "Rigorous benchmarking in reasonable time"); only where there
is a single replicate, the iteration. Times are positive and skewed, so everything happens on the
logarithm, where a ratio is a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np

from kvbench.errors import InputError

#: A cell is unstable when the standard deviation reaches this share of the mean (pyperf's bound).
SPREAD_BOUND = 0.10
#: ... or when more than this share of its samples was disturbed by something else on the machine.
DISTURBED_BOUND = 0.20

#: Resamples per interval; the error of a 2.5 % quantile of 2000 draws is far below its own width.
_RESAMPLES = 2000
_TAILS = (0.025, 0.975)
_NORMAL = 1.959963984540054
#: A single replicate shorter than this says nothing about its own autocorrelation.
_SHORTEST_SERIES = 8

Samples = Sequence[Sequence[float]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval; the ends are NaN when nothing is known."""

    value: float
    low: float
    high: float

    def as_tuple(self) -> tuple[float, float]:
        """Return ``(low, high)``."""
        return self.low, self.high


@dataclass(frozen=True)
class _Arm:
    """The units of one side of a comparison: bootstrap deviations of its estimate from itself."""

    deviations: np.ndarray
    freedom: int
    unit_variance: float

    @property
    def variance(self) -> float:
        return float(np.var(self.deviations))


@cache
def _draws(units: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Resampled positions and standard normal noise, ``(_RESAMPLES, units)`` each."""
    generator = np.random.default_rng((seed, units))
    shape = (_RESAMPLES, units)
    return generator.integers(0, units, shape), generator.standard_normal(shape)


def _clean(samples: Samples, name: str) -> list[np.ndarray]:
    replicates = [np.asarray(replicate, dtype=float) for replicate in samples]
    replicates = [replicate for replicate in replicates if replicate.size]
    if not replicates:
        raise InputError(f"{name}: there are no samples")
    if not all(np.isfinite(replicate).all() for replicate in replicates):
        raise InputError(f"{name}: a sample is not a finite number")
    return replicates


def _inflation(series: np.ndarray) -> float:
    """Widening for a series whose neighbours resemble each other: ``sqrt((1 + r)/(1 - r))``.

    ``r`` is the lag-1 autocorrelation, freed of its bias of ``-(1 + 3r)/n`` (Marriott and Pope,
    1954) and raised by one standard error, since too low an estimate is the worse mistake.
    """
    n = series.size
    if n < _SHORTEST_SERIES:
        return 1.0
    centred = series - series.mean()
    power = float(centred @ centred)
    if power == 0.0:
        return 1.0
    r = float(centred[1:] @ centred[:-1]) / power
    r = (n * r + 1) / max(n - 3, 1)
    r += 1.0 / math.sqrt(n)
    r = min(max(r, 0.0), 0.9)
    # Independent samples often show a little of it by chance; that alone widens nothing.
    if r < 2.0 / math.sqrt(n):
        return 1.0
    return math.sqrt((1 + r) / (1 - r))


def _arm(rows: Sequence[Sequence[np.ndarray]], seed: int) -> _Arm:
    """Bootstrap the mean over ``rows`` (turns) of their location over units.

    With two replicates or more the units are the replicates' medians and the location is their
    mean; with one replicate they are its iterations and the location is their median. Rows share
    the resampling, because the turns of one process share whatever disturbed it.

    A smoothed bootstrap: noise with the standard error's spread is added to each resampled unit,
    which undoes the shrinkage by ``sqrt((n-1)/n)`` and spreads the few values that the median of a
    handful can take (Silverman and Young, 1987; Hesterberg, 2015).
    """
    single = any(len(replicates) == 1 for replicates in rows)
    if single:
        length = min(min(map(len, replicates)) for replicates in rows)
        table = np.stack([replicates[0][:length] for replicates in rows])
    else:
        length = min(map(len, rows))
        table = np.array([[np.median(r) for r in replicates[:length]] for replicates in rows])
    units = table.mean(axis=0)
    spread = units.std(ddof=1) if length > 1 else math.nan
    if length == 1:
        return _Arm(np.zeros(_RESAMPLES), 0, math.nan)
    positions, noise = _draws(length, seed)
    if single:
        widths = np.array([_robust_spread(row) for row in table])
        drawn = table[:, positions] + (widths / math.sqrt(length))[:, None, None] * noise
        located = np.median(drawn, axis=2) - np.median(table, axis=1)[:, None]
        deviations = located.mean(axis=0) * _inflation(units)
    else:
        drawn = units[positions] + spread / math.sqrt(length) * noise
        deviations = drawn.mean(axis=1) - units.mean()
    return _Arm(deviations, length - 1, float(spread**2))


def _robust_spread(values: np.ndarray) -> float:
    """Return the smaller of the standard deviation and the scaled interquartile range."""
    quarters = np.percentile(values, (25, 75))
    return min(float(values.std(ddof=1)), float(quarters[1] - quarters[0]) / 1.349)


def _location(replicates: Sequence[np.ndarray]) -> float:
    return float(np.mean([np.median(replicate) for replicate in replicates]))


def _widened(estimate: float, arms: Sequence[_Arm], signs: Sequence[float]) -> tuple[float, float]:
    """Ends of the percentile interval of ``sum(sign * arm)``, widened for few units.

    The 2.5 and 97.5 % quantiles of the deviations are stretched by ``t / z``, Student's quantile
    over the normal one (a variant of Hesterberg's expanded interval, 2015), with the degrees of freedom of
    Satterthwaite (1946) over the independent arms.
    """
    parts = [(sign**2 * arm.variance, arm.freedom) for sign, arm in zip(signs, arms, strict=True)]
    total = sum(variance for variance, _ in parts)
    if total == 0.0:
        return estimate, estimate
    weight = sum(variance**2 / freedom for variance, freedom in parts if freedom)
    freedom = total**2 / weight if weight else math.inf
    stretch = _student(round(freedom, 1)) / _NORMAL
    deviations = sum(sign * arm.deviations for sign, arm in zip(signs, arms, strict=True))
    low, high = np.quantile(deviations, _TAILS)
    return estimate + stretch * float(low), estimate + stretch * float(high)


@cache
def _student(freedom: float) -> float:
    # scipy.special alone, and only here: planning and measuring import this module.
    from scipy.special import stdtrit

    return _NORMAL if math.isinf(freedom) else float(stdtrit(freedom, _TAILS[1]))


def median_interval(samples: Samples, seed: int = 0) -> Interval:
    """Estimate the median of a cell, with its 95 % interval.

    Parameters
    ----------
    samples:
        Replicates of iterations, of any lengths; empty replicates are left out.
    seed:
        Seed of the bootstrap; the same samples and seed give the same interval.

    Returns
    -------
    Interval
        ``value`` is the median of each replicate, averaged geometrically over replicates (with one
        replicate: its median). Values that are not all positive are averaged as they are. The ends
        are NaN if there is one sample only. With one replicate the interval speaks of that process
        alone, and fewer than eight iterations cannot show whether they resemble their neighbours;
        three replicates or more have neither limit. What is covered is the median that a replicate
        of this length gives: with three iterations of a very skewed time that is a little above
        the median of endless ones.

    Raises
    ------
    InputError
        If there is no sample, or one is not finite.
    """
    replicates = _clean(samples, "median_interval")
    positive = all((replicate > 0).all() for replicate in replicates)
    if positive:
        replicates = [np.log(replicate) for replicate in replicates]
    back: Callable[[float], float] = math.exp if positive else float
    estimate = _location(replicates)
    arm = _arm([replicates], seed)
    if not arm.freedom:
        return Interval(back(estimate), math.nan, math.nan)
    low, high = _widened(estimate, [arm], [1.0])
    return Interval(back(estimate), back(low), back(high))


def ratio_interval(
    numerator: Mapping[Hashable, Samples], denominator: Mapping[Hashable, Samples], seed: int = 0
) -> Interval:
    """Estimate how many times larger the numerator is, paired by key, with its 95 % interval.

    The estimate is the geometric mean, over the keys both sides have, of the ratio of medians: the
    only mean of ratios that does not depend on which side is the reference (Fleming and Wallace,
    1986). Keys are the cases compared, not a sample of cases, and are therefore not resampled.

    Parameters
    ----------
    numerator, denominator:
        Key to replicates of iterations. With keys ``(scenario, turn)``, the turns of one scenario
        are resampled together, since one process measured them; scenarios and sides are
        independent, since the order of the processes is drawn at random (:func:`interleave`).
        A side measured once in a scenario borrows the relative spread of the others.

    Raises
    ------
    InputError
        If no key is shared, or a sample is missing, not finite or not positive.
    """
    keys = [key for key in numerator if key in denominator]
    if not keys:
        raise InputError("ratio_interval: the two sides share no scenario and turn")
    logs: list[dict[Hashable, list[np.ndarray]]] = []
    for name, side in (("numerator", numerator), ("denominator", denominator)):
        cleaned = {key: _clean(side[key], f"{name} {key}") for key in keys}
        for key, replicates in cleaned.items():
            if any((replicate <= 0).any() for replicate in replicates):
                raise InputError(f"{name} {key}: a ratio needs positive samples")
        logs.append({key: [np.log(r) for r in rs] for key, rs in cleaned.items()})
    estimate = float(np.mean([_location(logs[0][k]) - _location(logs[1][k]) for k in keys]))

    groups: dict[Hashable, list[Hashable]] = {}
    for key in keys:
        groups.setdefault(key[0] if isinstance(key, tuple) and key else key, []).append(key)
    arms, signs = [], []
    for number, group in enumerate(groups.values()):
        for side, sign in ((0, 1.0), (1, -1.0)):
            # A seed of its own, so that no two arms share their resampling.
            arms.append(_arm([logs[side][key] for key in group], seed + 2 * number + side))
            signs.append(sign * len(group) / len(keys))
    known = [arm.unit_variance for arm in arms if arm.freedom]
    if not known:
        return Interval(math.exp(estimate), math.nan, math.nan)
    borrowed = math.sqrt(float(np.mean(known)))
    for number, arm in enumerate(arms):
        if not arm.freedom:
            noise = _draws(1, seed + number)[1][:, 0]
            arms[number] = _Arm(borrowed * noise, min(a.freedom for a in arms if a.freedom), 0.0)
    low, high = _widened(estimate, arms, signs)
    return Interval(math.exp(estimate), math.exp(low), math.exp(high))


def differs(interval: Interval) -> bool:
    """Whether the interval of a ratio excludes 1; an unknown interval (NaN) never does."""
    return interval.low > 1.0 or interval.high < 1.0


def geometric_mean(values: Iterable[float]) -> float:
    """Return ``exp(mean(log(values)))``.

    Raises
    ------
    InputError
        If there is no value, or one is not positive.
    """
    numbers = np.asarray(list(values), dtype=float)
    if not numbers.size or not (numbers > 0).all():
        raise InputError("geometric_mean: values must be positive, and at least one")
    return float(np.exp(np.log(numbers).mean()))


def stability(samples: Samples, disturbed_share: float = 0.0) -> bool:
    """Return True if a cell is unstable.

    It is when the standard deviation of all its samples reaches :data:`SPREAD_BOUND` of their mean
    (the warning of pyperf), or when more than :data:`DISTURBED_BOUND` of them were disturbed.
    """
    pooled = np.concatenate(_clean(samples, "stability"))
    spread = float(pooled.std(ddof=1)) if pooled.size > 1 else 0.0
    return spread >= SPREAD_BOUND * abs(float(pooled.mean())) > 0 or (
        disturbed_share > DISTURBED_BOUND
    )


def interleave(
    cells: Iterable[Item], seed: int, replicate: Callable[[Item], Any] | None = None
) -> list[Item]:
    """Order cells at random, so that a drifting machine favours none of them.

    Parameters
    ----------
    replicate:
        Cell to its replicate. When given, each replicate is finished before the next begins, and
        the order inside it is drawn anew; a run that is cut short then has whole replicates.
    """
    generator = np.random.default_rng(seed)
    blocks: dict[Any, list[Item]] = {}
    for cell in cells:
        blocks.setdefault(replicate(cell) if replicate else None, []).append(cell)
    order = sorted(blocks) if replicate else list(blocks)
    return [blocks[key][i] for key in order for i in generator.permutation(len(blocks[key]))]
