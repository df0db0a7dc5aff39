"""How a bench says whether its bound is met: by the interval, and not at all when that straddles it."""

from __future__ import annotations

import math

MET, NOT_MET, CANNOT_TELL = "met", "not met", "cannot tell"


def judge(low: float, high: float, least: float = -math.inf, most: float = math.inf) -> str:
    """Whether a value is within bounds, as far as its interval says.

    Parameters
    ----------
    low, high:
        Ends of the value's interval; NaN where it is unknown.
    least, most:
        The bounds, which are themselves allowed.

    Returns
    -------
    str
        :data:`MET` if the whole interval lies within, :data:`NOT_MET` if all of it lies outside, and
        otherwise :data:`CANNOT_TELL`.
    """
    if math.isnan(low) or math.isnan(high):
        return CANNOT_TELL
    if least <= low and high <= most:
        return MET
    return NOT_MET if high < least or low > most else CANNOT_TELL


def line(verdict: str, bound: str, found: str) -> str:
    """The line that a bench ends with, ``bound: <verdict>: <what was asked>; <what was found>``."""
    return f"bound: {verdict}: {bound}; {found}"
