"""What a broken cache server costs a request, what warming up buys, and how errors get stuck."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies._estimates import summary_columns
from kvbench.studies._values import first, milliseconds, number

if TYPE_CHECKING:
    import pandas as pd

FAULTS = ("up", "refused", "black_hole", "out_of_memory", "corrupt", "wrong_type", "slow")
CLIENTS = ("default", "short_timeout", "breaker")
#: The client that the others are compared with: it waits for no fault without end.
_REFERENCE = "short_timeout"
ERROR_POLICIES = ("cache_all", "skip_errors", "negative_ttl")

OPTIONS = option.schema(
    faults=option.choices("What is wrong with the cache server.", FAULTS),
    clients=option.choices(
        "redis-py as it comes, with short timeouts, or with a breaker as well.", CLIENTS
    ),
    requests=option.integer(
        "Requests per fault and client: rounds, in each of which every client asks once.",
        20,
        minimum=5,
    ),
    keys=option.integer("Different requests among them.", 5, minimum=1),
    service_ms=option.number(
        "Fixed service time of the source, in ms; not a model.", 5, minimum=0.1
    ),
    timeout_ms=option.number("Timeout of the clients that have a short one, in ms.", 50, minimum=1),
    slow_ms=option.number("Delay of each answer of the slow server, in ms.", 100, minimum=1),
    breaker_failures=option.integer("Failures in a row that open the breaker.", 3, minimum=1),
    breaker_reset_s=option.number(
        "Seconds after which an open breaker lets one call through.", 5, above=0
    ),
    give_up_s=option.number(
        "Seconds after which a client that still waits is left to itself and recorded as blocked. "
        "redis-py as it comes needs about 7 s where connections are refused and 2 minutes where "
        "nobody answers; then the request is answered.",
        9,
        minimum=0.5,
        maximum=600,
    ),
    preload_shares=option.numbers(
        "Shares of the keys, most popular first, generated before the start.",
        [0, 0.01, 0.05, 0.2],
        minimum=0,
        maximum=1,
    ),
    warm_requests=option.integer("Requests of a day in the test of warming up.", 2000, minimum=500),
    warm_keys=option.integer("Different requests that a day draws from.", 500, minimum=10),
    warm_window=option.integer(
        "Requests at the start of the day in which the hit ratio is reported.", 500, minimum=50
    ),
    exponent=option.number(
        "Zipf exponent of the popularity in the tests of warming up and errors.",
        0.9,
        minimum=0,
        maximum=3,
    ),
    seeds=option.integer("Days that the test of warming up averages over.", 3, minimum=2),
    error_rates=option.numbers(
        "Shares of generations that fail in the test of errors.",
        [0, 0.05, 0.2],
        minimum=0,
        maximum=1,
    ),
    error_policies=option.choices(
        "Which answers are stored: all, no errors, or errors for a second.", ERROR_POLICIES
    ),
    error_requests=option.integer("Requests in the test of errors.", 2000, minimum=100),
)


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell for all clients, and one untimed cell each for warming up and for errors."""
    fallback = (
        "faults",
        "clients",
        "requests",
        "keys",
        "service_ms",
        "timeout_ms",
        "slow_ms",
        "breaker_failures",
        "breaker_reset_s",
        "give_up_s",
    )
    warm = ("preload_shares", "warm_requests", "warm_keys", "warm_window", "exponent", "seeds")
    errors = ("error_rates", "error_policies", "error_requests", "warm_keys", "exponent")
    cells = {
        "fallback": Cell({"kind": "fallback", **{name: options[name] for name in fallback}}),
    }
    cells["warm-up"] = Cell(
        {"kind": "warm_up", **{name: options[name] for name in warm}}, timed=False
    )
    cells["errors"] = Cell(
        {"kind": "errors", **{name: options[name] for name in errors}}, timed=False
    )
    return cells


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows, with what each client adds beyond the reference in the same rounds.

    Most requests under a fault take nearly no time or a whole timeout, of which the ratio of a round
    says nothing: means are compared, by their difference. In older records each client was measured
    by itself, so that nothing is compared; and a request on which the study gave up counts there as not
    answered, where it counts neither as answered nor as failed.
    """
    arms = record["samples"].get("arms", {})
    rows = [dict(row) for row in record["rows"]]
    for row in rows:
        if row.get("blocked"):
            row["success_rate"] = math.nan
        if row["kind"] == "fallback" and row["client"] != _REFERENCE:
            ends = (f"{name}-{row['fault']}" for name in (row["client"], _REFERENCE))
            row |= _paired.difference("added_gap_s", arms, *ends, "added_s")
    return rows


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return added latencies per fault and client, the gain of warming up, and stuck errors."""
    named: dict[str, Value] = {}
    fallback = table[table["kind"] == "fallback"]
    for client in CLIENTS:
        of_client = fallback[fallback["client"] == client]
        for fault in FAULTS:
            row = first(of_client[of_client["fault"] == fault])
            prefix = f"resilience_{client}_{fault}"
            named[f"{prefix}_added_p50_ms"] = milliseconds(row, "added_p50_s", 2)
            if client != _REFERENCE:
                told = _paired.value(row, "added_gap_s")
                named[f"{prefix}_added_gap_ms"] = replace(
                    milliseconds(row, "added_gap_s", 2),
                    rounds=told.rounds,
                    not_judged=told.not_judged,
                )
            named[f"{prefix}_added_max_ms"] = number(row, "added_max_s", "ms", 1, 1000)
            named[f"{prefix}_success"] = number(row, "success_rate", "%", 0, 100)
            named[f"{prefix}_blocked"] = Value(None if row is None else bool(row["blocked"]))
        # Of the requests that were waited for: those answered, over all faults.
        known = of_client["success_rate"].dropna()
        named[f"resilience_{client}_success_min"] = Value(
            None if known.empty else float(known.min() * 100), unit="%", digits=0
        )
        named[f"resilience_{client}_blocked_faults"] = Value(
            None if of_client.empty else int(of_client["blocked"].astype(bool).sum()), digits=0
        )
        named[f"resilience_{client}_wrong"] = Value(
            None if of_client.empty else int(of_client["wrong_answers"].sum()), digits=0
        )
    corrupt = fallback[fallback["fault"] == "corrupt"]
    named["resilience_corrupt_refused"] = Value(
        None if corrupt.empty else int(corrupt["corrupt_entries_refused"].sum()), digits=0
    )

    warm = table[table["kind"] == "warm_up"]
    most = warm[warm["preload_share"] == warm["preload_share"].max()]
    for today in ("same", "shifted"):
        row = first(most[most["popularity"] == today])
        cold = first(warm[(warm["popularity"] == today) & (warm["preload_share"] == 0)])
        named[f"resilience_warm_{today}_hit_ratio"] = number(row, "hit_ratio_window", "%", 1, 100)
        named[f"resilience_cold_{today}_hit_ratio"] = number(cold, "hit_ratio_window", "%", 1, 100)
        named[f"resilience_warm_{today}_generations"] = number(row, "generations", "", 0)
        named[f"resilience_cold_{today}_generations"] = number(cold, "generations", "", 0)
    named["resilience_preload_percent"] = number(first(most), "preload_share", "%", 0, 100)
    named["resilience_window"] = number(first(most), "window", "", 0)

    errors = table[table["kind"] == "errors"]
    worst = errors[errors["error_rate"] == errors["error_rate"].max()]
    named["resilience_error_rate"] = number(first(worst), "error_rate", "%", 0, 100)
    named["resilience_error_requests"] = number(first(worst), "requests", "", 0)
    for policy in ERROR_POLICIES:
        row = first(worst[worst["policy"] == policy])
        named[f"resilience_{policy}_errors_served"] = number(row, "errors_served", "", 0)
        named[f"resilience_{policy}_errors_from_cache"] = number(row, "errors_from_cache", "", 0)
        named[f"resilience_{policy}_source_errors"] = number(row, "source_errors", "", 0)
    return named


STUDY = Study(
    name="resilience",
    question="What does a request cost when the cache server is broken, cold or full of errors?",
    options=OPTIONS,
    plan=plan,
    columns={
        "kind": "fallback (a broken server), warm_up (preloading) or errors (failing source)",
        "fault": "what is wrong with the server",
        "client": "redis-py as it comes, with short timeouts, or with a circuit breaker as well",
        "requests": "requests sent",
        "answered": "requests that got an answer before the study gave up",
        "success_rate": "answered per request; empty where the study gave up on a request",
        "wrong_answers": "answers that belong to a different request or are damaged",
        "hits": "requests answered from the cache",
        "corrupt_entries_refused": "entries of wrong checksum, key or type, treated as misses",
        "backend_errors": "calls of the server that failed",
        "blocked": "whether a request still waited when the study gave up on it",
        **summary_columns("added", "time of a request beyond the service time"),
        "added_max_s": "longest time of a request beyond the service time (s)",
        **_paired.meanings(
            "added_gap_s", "mean time of a request beyond that of short_timeout, same fault (s)"
        ),
        "popularity": "whether today asks like yesterday (same) or not at all (shifted)",
        "preload_share": "share of the keys generated before the day begins",
        "window": "requests at the start of the day that the window columns count",
        "unique_requests": "different requests of the day, mean over days",
        "preloaded": "answers generated before the day, mean over days",
        "generations": "calls of the source, preloading included",
        "hit_ratio_window": "hits per request in the window, mean over days",
        "hit_ratio": "hits per request over the whole day, mean over days",
        "lost_hits": "hits fewer than if the whole day were like its last quarter, mean over days",
        "hits_window_min": "fewest hits in the window over the days",
        "hits_window_max": "most hits in the window over the days",
        "saved_hits_limit": "expected first misses that preloading the true top could save",
        "policy": "which answers are stored: all, no errors, or errors for one second",
        "error_rate": "share of the source's calls that fail",
        "source_errors": "calls of the source that failed",
        "errors_served": "errors that users got",
        "errors_from_cache": "errors that users got from the cache",
    },
    values=values,
    aggregate=aggregate,
)
