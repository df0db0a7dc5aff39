"""Intervals that assume no distribution: of a median, and of a share of counted cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np


def median(samples: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Return median and its distribution-free 95 % interval from order statistics.

    The interval is None with fewer than six samples, where no such interval reaches 95 %. It is that
    of ``scipy.stats.quantile_test``, counted in whole numbers here: measuring processes ask for it,
    and importing scipy's statistics takes them longer than most of what they measure.
    """
    data = np.sort(np.asarray(samples, dtype=float))
    count = len(data)
    centre = float(np.median(data))
    if count < 6:
        return centre, None
    # The smallest rank with P(Binomial(n, 1/2) <= rank) >= 2.5 %, in whole numbers.
    rank, term, total = 0, 1, 1
    while 40 * total < 2**count:
        term = term * (count - rank) // (rank + 1)
        rank += 1
        total += term
    return centre, (float(data[rank - 1]), float(data[count - rank]))


def share(
    found: int, cases: int, method: Literal["exact", "wilson"] = "exact"
) -> tuple[float, float]:
    """95 % interval of the share ``found`` of ``cases``.

    ``exact`` is that of Clopper and Pearson (1934), which holds for any share; ``wilson`` that of
    Wilson (1927), which is narrower and right on average. They are those of ``scipy.stats.binomtest``,
    from the functions under it: measuring processes ask for this too.
    """
    from scipy.special import betaincinv, ndtri

    if method == "exact":
        low = betaincinv(found, cases - found + 1, 0.025) if found else 0.0
        high = betaincinv(found + 1, cases - found, 0.975) if found < cases else 1.0
        return float(low), float(high)
    z = float(ndtri(0.975))
    middle = (found + z**2 / 2) / (cases + z**2)
    half = z / (cases + z**2) * math.sqrt(found * (cases - found) / cases + z**2 / 4)
    # Rounding must not leave the end beyond what was seen where nothing or everything was.
    return (middle - half if found else 0.0), (middle + half if found < cases else 1.0)
