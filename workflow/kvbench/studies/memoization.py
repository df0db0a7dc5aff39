"""What does memoising a recursive function save, and do the ways to do it differ?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.caching import memo
from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired, control_of
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
    repeats=option.integer(
        "Rounds; in each, every variant is timed once, as a fresh function.",
        200,
        minimum=1,
        maximum=10_000,
    ),
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


#: Ratio, the variant it is taken with, and what it says; ``speedup`` is turned upside down.
_RATIOS = (
    ("speedup", "plain", "time without a cache over the time of this way, same n"),
    ("ratio_to_lru_cache", "lru_cache", "time over that of lru_cache(maxsize=None), same state"),
    ("ratio_to_lru_128", "lru_128", "time over that of a bare lru_cache (128 places), same state"),
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
    **{
        column: meaning
        for name, reference, words in _RATIOS
        for column, meaning in _paired.meanings(name, words).items()
    },
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """Return one cell per n."""
    rest = {key: value for key, value in options.items() if key != "n"}
    return {f"n{n}": Cell({"n": n, **rest}) for n in options["n"]}


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with their ratios to other ways of the same round.

    Records made before there were rounds keep the ratio of medians, without an interval.
    """
    arms = record["samples"].get("arms", {})
    rows = []
    for recorded in record["rows"]:
        row = {key: held for key, held in recorded.items() if not key.startswith("ratio_ci")}
        for name, reference, _ in _RATIOS:
            if row["variant"] == reference:
                continue
            # Without a cache there is only one kind of call; it is compared with both kinds.
            kinds = dict.fromkeys(arms, f"{row['state']}_s")
            if name == "speedup":
                kinds |= dict.fromkeys((reference, control_of(reference)), "cold_s")
            taken = {
                arm: {**turns, "seconds": turns[kinds[arm]]}
                for arm, turns in arms.items()
                if kinds[arm] in turns
            }
            ends = (row["variant"], reference)
            if name == "speedup":
                ends = ends[::-1]
            row |= _paired.compare(name, taken, *ends, reference=reference)
        rows.append(row)
    return rows


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
        return named.with_interval(chosen, "median_s", unit, digits, scale)

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
    for reference in ("lru_cache", "lru_128"):
        plain_ratio = _paired.quotient(row("cache"), row(reference), "median_s")
        found[f"memoization_cache_over_{reference}"] = _paired.value(
            row("cache"), f"ratio_to_{reference}", "", 3, plain_ratio
        )
    for name, variant, state in (
        ("speedup", "cache", "cold"),
        ("lru_128_speedup", "lru_128", "cold"),
        ("repeated_speedup", "cache", "warm"),
    ):
        own = row(variant, state)
        plain_ratio = _paired.quotient(row("plain"), own, "median_s")
        found[f"memoization_{name}"] = _paired.value(own, "speedup", "x", 0, plain_ratio)
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
    aggregate=aggregate,
)
