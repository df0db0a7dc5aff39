"""What does memoising a recursive function save, and do the ways to do it differ?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.caching import memo
from kvbench.paper.values import Value
from kvbench.studies import Cell, Study
from kvbench.studies import _option as option
from kvbench.studies import _values as named

if TYPE_CHECKING:
    import pandas as pd

#: The n of the guides' table, at which the claims are decided.
CLAIMED_N = 35

OPTIONS = option.schema(
    n=option.integers(
        "Fibonacci numbers to compute. Without a cache each costs 1.6 times the one before.",
        [10, 20, 30, 35],
        minimum=2,
        maximum=40,
    ),
    variants=option.choices("Ways to compute the number.", memo.VARIANTS),
    repeats=option.integer("Fresh functions timed per variant.", 200, minimum=1, maximum=10_000),
    variant_limit_s=option.number(
        "A variant that has taken this long is not repeated further, seconds.",
        0.3,
        maximum=600,
        above=0,
    ),
    recount_max_n=option.integer(
        "Largest n for which the slowest ways are run: the calls without a cache "
        "are counted one by one, and lru_cache with room for one is timed.",
        30,
        minimum=2,
        maximum=40,
    ),
)


COLUMNS = {
    "n": "which Fibonacci number",
    "variant": "how it was computed",
    "state": "cold (first call of a fresh function) or warm (the same call again)",
    "samples": "fresh functions timed",
    "first_s": "time of the very first call in this process, seconds",
    "median_s": "median time of a call, seconds",
    "median_s_ci_low": "lower end of its 95 % interval, seconds",
    "median_s_ci_high": "upper end of its 95 % interval, seconds",
    "p25_s": "first quartile, seconds",
    "p75_s": "third quartile, seconds",
    "misses": "calls computed, up to and including this call",
    "hits": "calls answered from the cache, up to and including this call",
    "expected_misses": "misses by theory, where it says something",
    "expected_hits": "hits by theory, where it says something",
    "ratio_to_lru_cache": "median time over that of lru_cache(maxsize=None), same state",
    "ratio_ci_low": "lower end of its 95 % bootstrap interval",
    "ratio_ci_high": "upper end of its 95 % bootstrap interval",
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """Return one cell per n."""
    rest = {key: value for key, value in options.items() if key != "n"}
    return {f"n{n}": Cell({"n": n, **rest}) for n in options["n"]}


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return times at n = 35 (the claims), the counts, and cache over lru_cache."""
    found: dict[str, Value] = {}

    def row(variant: str, state: str = "cold", n: int = CLAIMED_N):
        own = table[(table["variant"] == variant) & (table["state"] == state) & (table["n"] == n)]
        return None if own.empty else own.iloc[0]

    def number(chosen, column: str, unit: str = "", digits: int = 0, scale: float = 1.0) -> Value:
        if chosen is None:
            return Value(None, unit=unit, digits=digits)
        return named.single_value([scale * chosen[column]], unit, digits)

    def median(chosen, unit: str, digits: int, scale: float) -> Value:
        if chosen is None:
            return Value(None, unit=unit, digits=digits)
        columns = ("median_s", "median_s_ci_low", "median_s_ci_high")
        return named.interval_value(*(scale * chosen[c] for c in columns), unit, digits)

    for variant in memo.VARIANTS:
        cold, warm = row(variant), row(variant, "warm")
        prefix = f"memoization_{variant}"
        found[f"{prefix}_s"] = median(cold, "s", 6, 1.0)
        found[f"{prefix}_us"] = median(cold, "us", 2, 1e6)
        found[f"{prefix}_warm_us"] = median(warm, "us", 2, 1e6)
        found[f"{prefix}_first_us"] = number(cold, "first_s", "us", 1, 1e6)
        found[f"{prefix}_samples"] = number(cold, "samples")
        found[f"{prefix}_misses"] = number(cold, "misses")
        found[f"{prefix}_hits"] = number(cold, "hits")
    ratio = row("cache")
    found["memoization_cache_over_lru_cache"] = (
        Value(None, digits=3)
        if ratio is None
        else named.interval_value(
            ratio["ratio_to_lru_cache"], ratio["ratio_ci_low"], ratio["ratio_ci_high"], "", 3
        )
    )
    plain, cached = found["memoization_plain_s"].value, found["memoization_cache_s"].value
    found["memoization_speedup"] = Value(plain / cached if plain and cached else None, None, "x", 0)
    found["memoization_plain_calls_expected"] = Value(
        memo.plain_calls(CLAIMED_N) if len(table) else None, digits=0
    )
    checked = table[table["misses"].notna() & table["expected_misses"].notna()]
    wrong = (checked["misses"] != checked["expected_misses"]) | (
        checked["hits"] != checked["expected_hits"]
    )
    found["memoization_counts_checked"] = Value(len(checked) or None, digits=0)
    found["memoization_counts_wrong"] = Value(int(wrong.sum()) if len(checked) else None, digits=0)
    return found


STUDY = Study(
    name="memoization",
    question="What does memoising a recursive function save, and do the ways to do it differ?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
)
