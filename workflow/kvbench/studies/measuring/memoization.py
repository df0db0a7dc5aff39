"""What does memoising a recursive function save, and do the ways to do it differ?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from kvbench.caching import memo
from kvbench.studies import Context, Outcome, _estimates
from kvbench.studies.measuring._rounds import Log, with_controls

#: The ways that all others are compared with.
_REFERENCES = ("plain", "lru_cache", "lru_128")


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Time fresh functions in rounds; a way that takes long has fewer turns than the others."""
    n = factors["n"]
    slow = {"lru_1"} if n > factors["recount_max_n"] else set()
    variants = [name for name in factors["variants"] if name not in slow]
    log = Log(context.known)
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    answer = memo.fibonacci(n)
    # Where even one call takes long there are too few rounds for a control to say anything.
    references = [name for name in _REFERENCES if name != "plain" or n <= factors["recount_max_n"]]
    doing = with_controls(variants, *references)
    for number, arm in log.turns(doing, factors["repeats"], context.seed):
        if sum(log.of(arm, "cold_s")) > factors["variant_limit_s"]:
            continue
        name = doing[arm]
        function = memo.build(name)
        taken: dict[str, float] = {}
        for state in ("cold", "warm"):
            started = time.perf_counter_ns()
            result = function.call(n)
            taken[f"{state}_s"] = (time.perf_counter_ns() - started) / 1e9
            if result != answer:
                raise AssertionError(f"{name}({n}) is {result}, not {answer}")
            counted = function.counts()
            if counted is None:
                # Nothing is kept, so a second call would be the first one again.
                break
            counts[name, state] = counted
        log.add(arm, number, **taken)
    if "plain" in variants and n <= factors["recount_max_n"]:
        counts["plain", "cold"] = (memo.counted_calls(n), 0)
    rows = [
        _row(n, name, state, log.of(name, f"{state}_s"), counts)
        for name in variants
        for state in ("cold", "warm")
        if log.of(name, f"{state}_s")
    ]
    return Outcome(rows, {"arms": log.arms()})


def _row(
    n: int,
    name: str,
    state: str,
    samples: list[float],
    counts: Mapping[tuple[str, str], tuple[int, int]],
) -> dict[str, Any]:
    median, interval = _estimates.median_interval(samples)
    low, high = interval or (None, None)
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [None] * 3
    misses, hits = counts.get((name, state), (None, None))
    expected = (None, None)
    if name == "plain":
        expected = (memo.plain_calls(n), 0)
    elif name in {"cache", "lru_cache", "lru_128", "lru_3", "dict"}:
        expected = memo.ideal_counts(n, 1 if state == "cold" else 2)
    return {
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
