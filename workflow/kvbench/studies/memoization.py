"""What does memoising a recursive function save, and do the ways to do it differ?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.caching import memo
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study, _estimates

if TYPE_CHECKING:
    import pandas as pd

#: The n of the guides' table, at which the claims are decided.
CLAIMED_N = 35

OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "n": {
            "type": "array",
            "items": {"type": "integer", "minimum": 2, "maximum": 40},
            "minItems": 1,
            "uniqueItems": True,
            "default": [10, 20, 30, 35],
            "description": "Fibonacci numbers to compute. Without a cache each costs 1.6 times the "
            "one before.",
        },
        "variants": {
            "type": "array",
            "items": {"enum": list(memo.VARIANTS)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(memo.VARIANTS),
            "description": "Ways to compute the number.",
        },
        "repeats": {
            "type": "integer",
            "minimum": 1,
            "maximum": 10_000,
            "default": 200,
            "description": "Fresh functions timed per variant.",
        },
        "variant_limit_s": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 600,
            "default": 0.3,
            "description": "A variant that has taken this long is not repeated further, seconds.",
        },
        "recount_max_n": {
            "type": "integer",
            "minimum": 2,
            "maximum": 40,
            "default": 30,
            "description": "Largest n for which the slowest ways are run: the calls without a "
            "cache are counted one by one, and lru_cache with room for one is timed.",
        },
    },
}

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


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Time fresh functions in turn, so that a slow spell of the machine meets all variants."""
    n = factors["n"]
    slow = {"lru_1"} if n > factors["recount_max_n"] else set()
    variants = [name for name in factors["variants"] if name not in slow]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    answer = memo.fibonacci(n)
    for _ in range(factors["repeats"]):
        for name in variants:
            spent = times[name].get("cold", [])
            if spent and sum(spent) > factors["variant_limit_s"]:
                continue
            function = memo.build(name)
            for state in ("cold", "warm"):
                started = time.perf_counter_ns()
                result = function.call(n)
                taken = (time.perf_counter_ns() - started) / 1e9
                if result != answer:
                    raise AssertionError(f"{name}({n}) is {result}, not {answer}")
                times[name].setdefault(state, []).append(taken)
                counted = function.counts()
                if counted is None:
                    # Nothing is kept, so a second call would be the first one again.
                    break
                counts[name, state] = counted
        variants_left = any(
            sum(times[name]["cold"]) <= factors["variant_limit_s"] for name in variants
        )
        if not variants_left:
            break
    if "plain" in variants and n <= factors["recount_max_n"]:
        counts["plain", "cold"] = (memo.counted_calls(n), 0)
    rows = [
        _row(n, name, state, times, counts, context.seed)
        for name in variants
        for state in times[name]
    ]
    return Outcome(rows, {"times_s": times})


def _row(
    n: int,
    name: str,
    state: str,
    times: Mapping[str, Mapping[str, list[float]]],
    counts: Mapping[tuple[str, str], tuple[int, int]],
    seed: int,
) -> dict[str, Any]:
    samples = times[name][state]
    median, interval = _estimates.median_interval(samples)
    low, high = interval or (None, None)
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [None] * 3
    misses, hits = counts.get((name, state), (None, None))
    expected = (None, None)
    if name == "plain":
        expected = (memo.plain_calls(n), 0)
    elif name in {"cache", "lru_cache", "lru_128", "lru_3", "dict"}:
        expected = memo.ideal_counts(n, 1 if state == "cold" else 2)
    row = {
        "n": n,
        "variant": name,
        "state": state,
        "samples": len(samples),
        "first_s": samples[0],
        "median_s": median,
        "median_s_ci_low": low,
        "median_s_ci_high": high,
        "p25_s": quartiles[0],
        "p75_s": quartiles[2],
        "misses": misses,
        "hits": hits,
        "expected_misses": expected[0],
        "expected_hits": expected[1],
    }
    if state in times.get("lru_cache", {}):
        ratio, ends = _estimates.ratio_interval(samples, times["lru_cache"][state], seed)
        row["ratio_to_lru_cache"] = ratio
        row["ratio_ci_low"], row["ratio_ci_high"] = ends or (None, None)
    return row


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return times at n = 35 (the claims), the counts, and cache over lru_cache."""
    found: dict[str, Value] = {}

    def row(variant: str, state: str = "cold", n: int = CLAIMED_N):
        own = table[(table["variant"] == variant) & (table["state"] == state) & (table["n"] == n)]
        return None if own.empty else own.iloc[0]

    def number(chosen, column: str, unit: str = "", digits: int = 0, scale: float = 1.0) -> Value:
        if chosen is None:
            return Value(None, unit=unit, digits=digits)
        return _estimates.single_value([scale * chosen[column]], unit, digits)

    def median(chosen, unit: str, digits: int, scale: float) -> Value:
        if chosen is None:
            return Value(None, unit=unit, digits=digits)
        columns = ("median_s", "median_s_ci_low", "median_s_ci_high")
        return _estimates.interval_value(*(scale * chosen[c] for c in columns), unit, digits)

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
        else _estimates.interval_value(
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
    measure=measure,
    columns=COLUMNS,
    values=values,
)
