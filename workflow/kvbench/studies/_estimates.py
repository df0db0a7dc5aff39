"""Medians, quantiles and their intervals, computed from the raw samples of a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvbench.analysis import intervals

#: The intervals that assume no distribution, for the measuring parts: median, and share of cases.
median_interval = intervals.median
share_interval = intervals.share


def mean_interval(samples: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Return mean and 95 % Student interval; the interval is None with fewer than two samples."""
    # scipy.special alone: scipy.stats takes half a second to import in every measuring process.
    from scipy.special import stdtrit

    data = np.asarray(samples, dtype=float)
    mean = float(data.mean())
    if len(data) < 2:
        return mean, None
    half = float(stdtrit(len(data) - 1, 0.975) * data.std(ddof=1) / math.sqrt(len(data)))
    return mean, (mean - half, mean + half)


def quantile(seconds: Sequence[float], share: float) -> tuple[float, float, float]:
    """Return a quantile and the ends of its 95 % interval, all in the unit of ``seconds``.

    The interval takes order statistics whose ranks bound the quantile's by the normal
    approximation to the binomial (Conover, *Practical Nonparametric Statistics*, section 3.2);
    near the extremes of a small sample it ends at the sample's own minimum or maximum.
    NaN for an empty sample.
    """
    ordered = np.sort(np.asarray(seconds, dtype=float))
    count = len(ordered)
    if count == 0:
        return math.nan, math.nan, math.nan
    spread = 1.96 * math.sqrt(count * share * (1 - share))
    low = max(0, math.floor(count * share - spread) - 1)
    high = min(count - 1, math.ceil(count * share + spread))
    return float(np.quantile(ordered, share)), float(ordered[low]), float(ordered[high])


#: Samples from which the largest one bounds the 95th percentile in 97.5 % of all cases.
_ENOUGH_FOR_P95 = 72


def p95(seconds: Sequence[float], name: str) -> dict[str, float]:
    """Return the 95th percentile as ``<name>``, with an interval where there are enough samples."""
    if not len(seconds):
        return {}
    middle, low, high = quantile(seconds, 0.95)
    row = {name: middle}
    if len(seconds) >= _ENOUGH_FOR_P95:
        row |= {f"{name}_ci_low": low, f"{name}_ci_high": high}
    return row


def p95_columns(name: str, meaning: str) -> dict[str, str]:
    """Return what the columns of :func:`p95` mean, for a study's ``columns``."""
    return {
        name: f"95th percentile of the {meaning} (s)",
        f"{name}_ci_low": f"lower end of its 95 % interval; empty below 72 samples ({meaning}, s)",
        f"{name}_ci_high": f"upper end of its 95 % interval; empty below 72 samples ({meaning}, s)",
    }


def summary(seconds: Sequence[float], prefix: str) -> dict[str, float]:
    """Return ``<prefix>_p50_s``, ``_p95_s`` and ``_p99_s``, with intervals for p50 and p99."""
    median, median_low, median_high = quantile(seconds, 0.5)
    tail, tail_low, tail_high = quantile(seconds, 0.99)
    return {
        f"{prefix}_p50_s": median,
        f"{prefix}_p50_s_ci_low": median_low,
        f"{prefix}_p50_s_ci_high": median_high,
        f"{prefix}_p95_s": quantile(seconds, 0.95)[0],
        f"{prefix}_p99_s": tail,
        f"{prefix}_p99_s_ci_low": tail_low,
        f"{prefix}_p99_s_ci_high": tail_high,
    }


def summary_columns(prefix: str, meaning: str) -> dict[str, str]:
    """Return what the columns of :func:`summary` mean, for a study's ``columns``."""
    return {
        f"{prefix}_p50_s": f"median {meaning} (s)",
        f"{prefix}_p50_s_ci_low": f"lower end of the 95 % interval of the median {meaning} (s)",
        f"{prefix}_p50_s_ci_high": f"upper end of the 95 % interval of the median {meaning} (s)",
        f"{prefix}_p95_s": f"95th percentile of the {meaning} (s)",
        f"{prefix}_p99_s": f"99th percentile of the {meaning} (s)",
        f"{prefix}_p99_s_ci_low": f"lower end of the 95 % interval of p99 of the {meaning} (s)",
        f"{prefix}_p99_s_ci_high": f"upper end of the 95 % interval of p99 of the {meaning} (s)",
    }
