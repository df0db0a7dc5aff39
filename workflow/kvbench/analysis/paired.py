"""Ratios of cells that took turns: paired within rounds, so that the machine's drift cancels.

Cells of a block work in rounds, one turn each, in an order drawn anew every round. What two cells
took in the same round stands under nearly the same weather, so the logarithm of its ratio is free
of the drift that spoils the ratio of two medians (Abedi and Brecht, 2017, "randomised multiple
interleaved trials"). The mean of these logarithms over rounds, and of the blocks' means over
blocks, is the logarithm of the geometric-mean ratio. An interval also allows for what no round of a
block can show: that its processes are not the only ones there could have been. numpy only until an
interval is asked for: measuring children call this every few rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from kvbench.analysis.statistics import Interval
from kvbench.errors import InputError

#: A verdict needs at least this many rounds: fewer do not show their own spread, and a rule that stops
#: at a precision would stop on luck (shown by simulation in tests/unit/test_paired.py).
FEWEST_ROUNDS = 10
#: Rounds that follow the one at which a precision is reached, before a block may stop: a rule that
#: stops at a width stops on a narrow streak more often than on a wide one, and these put it right
#: (the few further samples of Simons, 1968, after the rule of Chow and Robbins, 1965).
CONFIRMING_ROUNDS = 5
#: Where an A/A test has shown a machine to need more, that number takes its place.
FEWEST_BLOCKS = 1

#: Share of the rounds that is cut off at either end, from ten rounds on: an interruption of one slot
#: moves no result, and nearly nothing is lost where there is none.
TRIMMED = 0.1
#: What the ratio of two processes differs by beyond its rounds, as a standard deviation of its logarithm:
#: equal processes side by side were measured to differ by 0.9 % each. And how many blocks that
#: expectation is worth. Chosen so that simulated processes that differ so are covered as promised; the A/A
#: tests of the recorded machines show what it is worth there.
PROCESSES_APART, _WORTH_OF_PROCESSES = 0.009 * math.sqrt(2), 8
#: The same for blocks of which two or more are seen, which say something about it themselves: chosen so
#: that simulated blocks that differ by 2 % are covered as promised, two as well as five.
BLOCKS_APART, _WORTH = 0.011, 5
#: Chance of a false alarm, and of finding the smallest difference that is told.
_ALPHA, _POWER = 0.05, 0.90


@dataclass(frozen=True)
class Paired:
    """A paired ratio with what is known about it.

    ``error`` is the standard error of its logarithm and ``freedom`` the degrees of freedom of that
    error; NaN and 0 where a single round says nothing about them.
    """

    value: float
    error: float
    freedom: float
    rounds: int
    blocks: int

    @property
    def interval(self) -> Interval:
        """The ratio with the ends of its 95 % interval; NaN ends for a single round."""
        if not self.freedom:
            return Interval(self.value, math.nan, math.nan)
        reach = _student(1 - _ALPHA / 2, self.freedom) * self.error
        return Interval(self.value, self.value * math.exp(-reach), self.value * math.exp(reach))

    @property
    def half_width(self) -> float:
        """Half the width of the interval relative to the ratio; infinite for a single round."""
        if not self.freedom:
            return math.inf
        return math.expm1(_student(1 - _ALPHA / 2, self.freedom) * self.error)

    @property
    def smallest_difference(self) -> float:
        """Relative difference that would have been found nine times out of ten; NaN if unknown.

        ``(t(0.975) + t(0.90)) * error`` on the logarithm: the usual approximation of the power of
        Student's test (Cohen, 1988, section 2.5), near enough from ten rounds on.
        """
        return math.expm1(found_from(self.error, self.freedom)) if self.freedom else math.nan


def found_from(error: float, freedom: float) -> float:
    """From where on a difference is found nine times out of ten, by its standard error; in its unit."""
    return (_student(1 - _ALPHA / 2, freedom) + _student(_POWER, freedom)) * error


@cache
def _quantile(share: float, freedom: float) -> float:
    # scipy.special alone: scipy.stats takes half a second to import in every measuring process.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


def _student(share: float, freedom: float) -> float:
    return _quantile(share, round(freedom, 1) or 0.1)


def log_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """One round's logarithm of the ratio: the mean over its turns.

    Parameters
    ----------
    numerator, denominator:
        Seconds of the round's turns, in the same order on both sides.

    Raises
    ------
    InputError
        The sides differ in length, are empty, or hold a time that is not positive and finite.
    """
    above, below = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if above.shape != below.shape or not above.size:
        raise InputError("a round needs the same turns on both sides, and at least one")
    both = np.concatenate((above, below))
    if not (np.isfinite(both).all() and (both > 0).all()):
        raise InputError("a ratio needs times that are positive and finite")
    return float(np.mean(np.log(above) - np.log(below)))


@cache
def _cosines(rounds: int) -> np.ndarray:
    """The cosines of the discrete transform but the constant one, ``(rounds - 1, rounds)``."""
    order = np.arange(1, rounds)[:, None]
    return math.sqrt(2 / rounds) * np.cos(math.pi * order * (np.arange(rounds) + 0.5) / rounds)


@dataclass(frozen=True)
class _Block:
    """One block's mean, and the variance of that mean by slow and by all frequencies."""

    mean: float
    slow: float
    overall: float
    freedom_slow: float
    freedom: float


def _block(logs: np.ndarray) -> _Block:
    """Summarise the log ratios of one block.

    The mean is trimmed and its variance that of the winsorised rounds (Tukey and McLaughlin, 1963).
    Neighbouring rounds may resemble each other, for instance when the two cells suffer unequally
    from what else runs on the machine. The variance of a mean is the power of the series at
    frequency zero; it is estimated from the lowest ``0.4 n^(2/3)`` cosines (Lazarus, Lewis, Stock
    and Watson, 2018), averaged half and half with the power at all frequencies.
    """
    n = logs.size
    cut = int(TRIMMED * n)
    ordered = np.sort(logs)
    mean = float(ordered[cut : n - cut].mean())
    if n < 2:
        return _Block(mean, math.nan, math.nan, 0.0, 0.0)
    held = np.clip(logs, ordered[cut], ordered[n - cut - 1])
    kept = n - 2 * cut
    power = (_cosines(n) @ held) ** 2
    lowest = min(n - 1, max(2, round(0.4 * n ** (2 / 3))))
    # The winsorised variance over (n - 1), as a variance of the mean of the `kept` middle rounds.
    scale = (n - 1) / (kept * (kept - 1))
    overall = float(power.mean()) * scale
    slow = (float(power[:lowest].mean()) * scale + overall) / 2
    return _Block(mean, slow, overall, min(2.0 * lowest, kept - 1.0), kept - 1.0)


def _within(blocks: Sequence[_Block]) -> tuple[float, float]:
    """Variance of the mean over blocks by their rounds alone, with its degrees of freedom.

    The slow frequencies count where they have more power than all together: where rounds are
    independent, as after an order drawn anew, nearly nothing is lost by looking. The freedom is that
    of Satterthwaite (1946).
    """
    slow, overall = (np.array([getattr(b, n) for b in blocks]) for n in ("slow", "overall"))
    correlated = slow.sum() > overall.sum()
    variances = slow if correlated else overall
    freedoms = np.array([b.freedom_slow if correlated else b.freedom for b in blocks])
    total = float(variances.sum())
    if total == 0.0:
        return 0.0, float(freedoms.sum())
    return total / len(blocks) ** 2, total**2 / float((variances**2 / freedoms).sum())


def _of_one_block(within: float, freedom: float) -> tuple[float, float]:
    """Variance of one block's mean, with its degrees of freedom, when another block's would differ.

    What two processes differ by stays with them through all their rounds, so that no number of these
    shows it: it is expected to be :data:`PROCESSES_APART`. Variances add, and the freedom is that of
    Satterthwaite (1946).
    """
    between = PROCESSES_APART**2
    variance = within + between
    return variance, variance**2 / (within**2 / freedom + between**2 / _WORTH_OF_PROCESSES)


def _over_blocks(
    within: float, freedom: float, between: float, count: int, apart: float
) -> tuple[float, float]:
    """Variance of the mean over blocks, with its degrees of freedom, when blocks may differ.

    Whether they do cannot be seen in two or three of them: an interval that forgets the question
    when they happen to agree covers 83 % instead of 95 % (simulated). So the variance between them
    is drawn towards an expectation, in the manner of Smyth (2004, "moderated t"): what their rounds
    explain, and ``apart`` besides. Blocks that differ by far more than that speak for
    themselves, with the degrees of freedom of Satterthwaite (1946); the wider of both counts.

    Parameters
    ----------
    within, between:
        Variance of the mean by the rounds alone, and by the difference between blocks alone.
    freedom:
        Degrees of freedom of ``within``.
    count:
        Blocks.
    apart:
        What blocks are expected to differ by, as a standard deviation of the ratio's logarithm.
    """
    seen = count - 1
    expected = within + apart**2 / count
    found = [((_WORTH * expected + seen * between) / (_WORTH + seen), float(_WORTH + seen))]
    if between > within:
        excess = between - within
        found.append((between, between**2 / (within**2 / freedom + excess**2 / seen)))
    return max(found, key=lambda one: _student(1 - _ALPHA / 2, one[1]) * math.sqrt(one[0]))


def ratio(blocks: Iterable[Sequence[float]], one_process: bool = False) -> Paired:
    """Estimate a ratio from the log ratios of its rounds, block by block.

    Parameters
    ----------
    blocks:
        For each block the logarithms of the ratio, one per round, in the order of the rounds. A
        round in which either side was disturbed is left out by the caller (:mod:`metrics`).
    one_process:
        Both sides worked in one process: there is nothing that two processes could differ by.

    Returns
    -------
    Paired
        The geometric mean over rounds, a tenth trimmed off at either end, and over blocks. Blocks
        count alike; by how much they differ among themselves is part of the interval
        (:func:`_over_blocks`), and for a single one what it is expected to be.

    Raises
    ------
    InputError
        There is no round, or a logarithm is not finite.
    """
    series = [np.asarray(block, dtype=float) for block in blocks]
    series = [block for block in series if block.size]
    if not series:
        raise InputError("there is no round to compare in")
    if not all(np.isfinite(block).all() for block in series):
        raise InputError("a round's log ratio is not a finite number")
    rounds, count = sum(block.size for block in series), len(series)
    parts = [_block(block) for block in series]
    means = [part.mean for part in parts]
    value = math.exp(float(np.mean(means)))
    between = float(np.var(means, ddof=1)) / count if count > 1 else math.nan
    known = [part for part in parts if part.freedom]
    if not known:
        # Blocks of one round each: nothing but the difference between them is known.
        return Paired(value, math.sqrt(between), count - 1.0, rounds, count)
    variance, freedom = _within(known)
    # A block of a single round is taken to be as noisy as the others.
    variance *= len(known) / count
    if count > 1:
        apart = 0.0 if one_process else BLOCKS_APART
        variance, freedom = _over_blocks(variance, freedom, between, count, apart)
    elif not one_process:
        variance, freedom = _of_one_block(variance, freedom)
    return Paired(value, math.sqrt(variance), freedom, rounds, count)


def half_width(rounds: Sequence[float]) -> float:
    """Half-width of one block's ratio relative to it, by its rounds; infinite below ten of them.

    More rounds make it narrower without end: what other processes would have shown is not in it. What
    a run may show while it goes on; when to stop says :func:`reached`.

    Parameters
    ----------
    rounds:
        :func:`log_ratio` of every round so far that counts.
    """
    return math.inf if len(rounds) < FEWEST_ROUNDS else ratio([rounds], one_process=True).half_width


def reached(ratios: Iterable[Sequence[float]], precision: float) -> bool:
    """Whether a block may stop: every ratio had a half-width by its rounds of at most ``precision``.

    It must have had it :data:`CONFIRMING_ROUNDS` rounds ago. Ask as often as you like.

    Parameters
    ----------
    ratios:
        For each cell that is compared with the reference its log ratios so far.
    precision:
        For example 0.03 for 3 %.
    """
    return all(half_width(rounds[:-CONFIRMING_ROUNDS]) <= precision for rounds in ratios)


def beyond(value: float, precision: float) -> bool:
    """Whether a ratio lies further from 1 than a precision, upwards or downwards alike."""
    return abs(math.log(value)) > math.log1p(precision)


def off(control: Interval, precision: float) -> bool:
    """Whether a block's control says that its rounds cannot be trusted to the precision.

    The reference over its own second run lies further from 1 than the precision allows
    (:func:`beyond`), and its interval excludes 1. The value alone lies there by chance in every other
    block that is short: such a block is measured further (:mod:`kvbench.measurement.stopping`), and
    what it does not know then is in its intervals.
    """
    return beyond(control.value, precision) and (control.low > 1 or control.high < 1)


def differs(found: Paired, rounds: int = FEWEST_ROUNDS, blocks: int = FEWEST_BLOCKS) -> bool:
    """Whether a ratio may be called different from 1: enough rounds, and its interval excludes 1."""
    ends = found.interval
    return found.rounds >= rounds and found.blocks >= blocks and not ends.low <= 1.0 <= ends.high
