"""What every column of every table means: the one list behind README and data package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvbench import studies
from kvbench.analysis import capacity, claims, instrument, tables
from kvbench.traffic import columns as traffic_columns


def described(study_names: Iterable[str], traffic: bool) -> dict[str, Mapping[str, str]]:
    """File name, seen from ``results/tables``, to its columns and what each means.

    Parameters
    ----------
    study_names:
        Studies whose tables are there.
    traffic:
        Whether the tables of replayed logs are there.
    """
    found: dict[str, Mapping[str, str]] = {
        "kv_samples.csv": tables.SAMPLE_COLUMNS,
        "kv_summary.csv": tables.SUMMARY_COLUMNS,
        "kv_rounds.csv": tables.ROUND_COLUMNS,
        "kv_replies.csv": tables.REPLY_COLUMNS,
        "kv_quality.csv": tables.QUALITY_COLUMNS,
        "kv_profile.csv": tables.PROFILE_COLUMNS,
        "aa_test.csv": instrument.COLUMNS,
        "capacity.csv": capacity.COLUMNS,
        "../claims/claims.csv": claims.COLUMNS,
    }
    for name in study_names:
        found[f"app_{name}.csv"] = {**tables.APP_COLUMNS, **studies.get(name).columns}
    if traffic:
        found |= {f"{name}.csv": own for name, own in traffic_columns.described().items()}
    return found
