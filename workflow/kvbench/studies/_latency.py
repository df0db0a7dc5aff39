"""Quantiles of measured latencies with distribution-free intervals, and values made of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.paper.values import Value

if TYPE_CHECKING:
    import pandas as pd


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


def first(rows: pd.DataFrame) -> Mapping[str, Any] | None:
    """Return the first of the selected rows of a table, or None if there is none."""
    return None if rows.empty else rows.iloc[0].to_dict()


def number(
    row: Mapping[str, Any] | None, column: str, unit: str, digits: int, scale: float = 1.0
) -> Value:
    """Return a column of a row, times ``scale``, as a value; None if missing or not finite."""
    held = None if row is None else row[column]
    if held is None or not math.isfinite(held):
        return Value(None, unit=unit, digits=digits)
    return Value(float(held) * scale, unit=unit, digits=digits)


def milliseconds(row: Mapping[str, Any] | None, column: str, digits: int = 3) -> Value:
    """Return a column in seconds as milliseconds, with the interval of its ``_ci_`` columns."""
    value = number(row, column, "ms", digits, 1000)
    if value.value is None:
        return value
    ends = (float(row[f"{column}_ci_low"]) * 1000, float(row[f"{column}_ci_high"]) * 1000)
    return Value(value.value, ci=ends, unit="ms", digits=digits)
