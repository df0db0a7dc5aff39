"""What the figures of studies share: the title with the machine and the number of repeats behind it."""

from __future__ import annotations

import pandas as pd

from kvbench.figures import _kv


def title(question: str, rows: pd.DataFrame, counted: str | None = None, what: str = "") -> str:
    """The question, and below it which machine answers it and on how many repeats.

    Parameters
    ----------
    question:
        The figure's title.
    rows:
        The rows that are drawn, all of one machine.
    counted:
        Column with the number of repeats behind a row; none where the panels say it themselves.
    what:
        What is counted, in the plural.
    """
    if rows.empty:
        return question
    parts = [_kv.called(str(rows["machine"].iloc[0]))]
    if counted is not None and (numbers := rows[counted].dropna().astype(int)).size:
        low, high = numbers.min(), numbers.max()
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        parts.append(f"n = {span} {what.removesuffix('s') if high == 1 else what}".rstrip())
    return "\n".join([question, " · ".join(parts)])


#: Languages that questions are asked in, as they are called in a figure.
_LANGUAGES = {"en": "questions in English", "pt": "questions in Portuguese"}


def languages(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each language, under its name; rows of old records, which name none, are English."""
    spoken = rows["language"].fillna("en") if "language" in rows else pd.Series("en", rows.index)
    return {_LANGUAGES.get(one, str(one)): rows[spoken == one] for one in sorted(spoken.unique())}


def asked(name: str, rows: pd.DataFrame) -> str:
    """The heading of a panel: a language, and how many questions in it the rows rest on."""
    numbers = rows["queries"].dropna()
    return f"{name} · n = {int(numbers.max()):,} questions" if len(numbers) else name


def not_told_apart(rows: pd.DataFrame, ratio: str) -> pd.Series:
    """Where a ratio that is paired within rounds does not differ from 1, or is not judged."""
    if ratio not in rows:
        return pd.Series(False, index=rows.index)
    above, below = rows[f"{ratio}_ci_low"] > 1, rows[f"{ratio}_ci_high"] < 1
    return rows[ratio].notna() & ~above & ~below
