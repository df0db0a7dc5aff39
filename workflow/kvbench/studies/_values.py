"""Named values for the paper and the claims, made of rows of a study's table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies._estimates import mean_interval

if TYPE_CHECKING:
    import pandas as pd


def in_seconds(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a record with seconds in place of the microseconds of older records."""
    return {
        f"{key.removesuffix('_us')}_s" if key.endswith("_us") else key: (
            held / 1e6 if key.endswith("_us") and held is not None else held
        )
        for key, held in row.items()
    }


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


def with_interval(
    row: Mapping[str, Any] | None, column: str, unit: str, digits: int, scale: float = 1.0
) -> Value:
    """Return a column with the interval of its ``_ci_`` columns, where it has one."""
    value = number(row, column, unit, digits, scale)
    if value.value is None:
        return value
    ends = [row.get(f"{column}_ci_{end}") for end in ("low", "high")]
    if any(end is None or not math.isfinite(end) for end in ends):
        return value
    return Value(value.value, (float(ends[0]) * scale, float(ends[1]) * scale), unit, digits)


def milliseconds(row: Mapping[str, Any] | None, column: str, digits: int = 3) -> Value:
    """Return a column in seconds as milliseconds, with its interval."""
    return with_interval(row, column, "ms", digits, 1000)
