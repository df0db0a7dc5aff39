"""Verdicts: where a claim's bound lies, and what an interval says about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvbench.analysis.statistics import Interval

REPRODUCED, REFUTED, INCONCLUSIVE = "reproduced", "refuted", "inconclusive"
MET, NOT_MET = "met", "not met"
NOT_ENOUGH, NOT_TESTED = "not enough rounds", "not tested"
#: Every verdict; of a target, a goal that its document sets, met and not met.
VERDICTS = (REPRODUCED, REFUTED, INCONCLUSIVE, MET, NOT_MET, NOT_ENOUGH, NOT_TESTED)
#: Verdicts that judge nothing; no expectation is disappointed by them.
OPEN = (NOT_ENOUGH, NOT_TESTED)

_OF_TARGET = {REPRODUCED: MET, REFUTED: NOT_MET}


@dataclass(frozen=True)
class Bound:
    """The numbers for which a claim holds: an interval, each end open or closed."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def verdict(self, interval: Interval) -> str:
        """Return reproduced (wholly inside), refuted (wholly outside) or inconclusive."""
        low, high = interval.low, interval.high
        if math.isnan(low) or math.isnan(high):
            return INCONCLUSIVE
        above = low > self.low or (low == self.low and not self.low_open)
        below = high < self.high or (high == self.high and not self.high_open)
        if above and below:
            return REPRODUCED
        if high < self.low or (high == self.low and self.low_open):
            return REFUTED
        if low > self.high or (low == self.high and self.high_open):
            return REFUTED
        return INCONCLUSIVE

    def text(self, unit: str = "") -> str:
        """The bound as a reader sees it: ``> 1x``, ``1.8 to 2.2 GiB``."""
        low, high = number_text(self.low), number_text(self.high)
        if self.low == self.high:
            return with_unit(f"= {low}", unit)
        if math.isinf(self.high):
            return with_unit(f"{'>' if self.low_open else '>='} {low}", unit)
        if math.isinf(self.low):
            return with_unit(f"{'<' if self.high_open else '<='} {high}", unit)
        return with_unit(f"{low} to {high}", unit)


def judge(
    bound: Bound, interval: Interval | None, *, target: bool = False, why_not: str | None = None
) -> str:
    """The verdict of a measurement.

    Parameters
    ----------
    bound:
        Where the value must lie for the claim to hold.
    interval:
        The measured value with its interval; None when nothing was measured.
    target:
        Whether the claim is a goal, which is met or not met, rather than a fact.
    why_not:
        Why nothing may be concluded from this measurement, if so: too few rounds.
    """
    if interval is None:
        return NOT_TESTED
    if why_not is not None or math.isnan(interval.low) or math.isnan(interval.high):
        return NOT_ENOUGH
    verdict = bound.verdict(interval)
    return _OF_TARGET.get(verdict, verdict) if target else verdict


def number_text(number: float | None) -> str:
    """A number with three significant figures, without an exponent where it can be avoided."""
    if number is None:
        return "-"
    if number == 0 or 1e-3 <= abs(number) < 1e6:
        digits = 0 if number == 0 else max(0, 2 - math.floor(math.log10(abs(number))))
        text = f"{number:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{number:.3g}"


def with_unit(text: str, unit: str) -> str:
    """Append a unit: ``5.36x``, ``10 ms``."""
    return f"{text}x" if unit == "x" else f"{text} {unit}".strip()
