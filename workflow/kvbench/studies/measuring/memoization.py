"""What does memoising a recursive function save, and do the ways to do it differ?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from kvbench.caching import memo
from kvbench.studies import Context, Outcome, _estimates


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
