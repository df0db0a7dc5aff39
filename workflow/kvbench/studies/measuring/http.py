"""HTTP clients against a loopback origin: who obeys it, and how long a page takes that comes again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvbench.caching import http
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome, _estimates
from kvbench.studies.measuring._rounds import SPARE, Log, with_controls


def required_requests(behaviour: str, requests: int) -> int:
    """Return the fewest requests to the origin that RFC 9111 allows for a run of ``requests``.

    Within a run the content is fresh throughout, and ``vary`` alternates between two languages.
    """
    return {"max_age": 1, "vary": min(2, requests)}.get(behaviour, requests)


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Try every client for correctness, then time them in rounds with nothing running beside."""
    clients = list(factors["clients"])
    for name in clients:
        _available(name)
    rows, samples = [], {}
    for behaviour in factors["behaviours"]:
        correct = _who_is_right(behaviour, clients)
        for requests in factors["requests"]:
            log, reached = _rounds(behaviour, requests, factors, context)
            samples[f"{behaviour}-{requests}"] = log.arms()
            rows += [
                _row(name, behaviour, requests, factors, log, reached[name], correct[name])
                for name in clients
            ]
    return Outcome(rows, {"arms": samples})


def _who_is_right(behaviour: str, clients: list[str]) -> dict[str, bool]:
    with ThreadPoolExecutor(len(clients)) as pool:
        found = pool.map(lambda name: http.is_correct(name, behaviour), clients)
        return dict(zip(clients, found, strict=True))


def _rounds(
    behaviour: str, requests: int, factors: Mapping[str, Any], context: Context
) -> tuple[Log, dict[str, http.Counts]]:
    """Ask the page as often as wanted with every client in turn; each run has an empty cache."""
    log, reached = Log(context.known), {}
    spent_s, current = 0.0, 0
    doing = with_controls(factors["clients"], "none")
    rounds = factors["repeats"]
    for number, arm in log.turns(doing, rounds, context.seed, spare=rounds // SPARE):
        if number != current and spent_s > factors["count_limit_s"]:
            break
        current = number
        taken, reached[arm] = _run(doing[arm], behaviour, requests, factors)
        later = statistics.median(taken[1:]) if taken[1:] else None
        log.add(arm, number, seconds=sum(taken), first_s=taken[0], later_s=later)
        # The limit says how many rounds of the clients there are, with or without a control.
        spent_s += sum(taken) if arm in factors["clients"] else 0.0
    return log, reached


def _row(
    name: str,
    behaviour: str,
    requests: int,
    factors: Mapping[str, Any],
    log: Log,
    counts: http.Counts,
    correct: bool,
) -> dict[str, Any]:
    walls = log.of(name, "seconds")
    wall, ends = _estimates.median_interval(walls)
    required = required_requests(behaviour, requests)
    reuses = max(0, required - counts.requests)
    return {
        "behaviour": behaviour,
        "client": name,
        "requests": requests,
        "runs": len(walls),
        "service_ms": factors["service_ms"],
        "wall_s": wall,
        "wall_s_ci_low": None if ends is None else ends[0],
        "wall_s_ci_high": None if ends is None else ends[1],
        "first_s": statistics.median(log.of(name, "first_s")),
        "later_median_s": statistics.median(log.of(name, "later_s")) if requests > 1 else None,
        "origin_requests": counts.requests,
        "not_modified": counts.not_modified,
        "body_bytes": counts.body_bytes,
        "required_requests": required,
        "forbidden_reuses": reuses,
        "rfc_correct": correct and reuses == 0,
    }


def _available(name: str) -> None:
    """Raise before anything is timed if a client's library is missing."""
    try:
        import requests  # noqa: F401
    except ModuleNotFoundError as error:
        raise Unsupported("requests is not installed") from error
    with http.client(name):
        pass


def _run(
    name: str, behaviour: str, requests: int, factors: Mapping[str, Any]
) -> tuple[list[float], http.Counts]:
    taken = []
    with (
        http.origin(factors["service_ms"] / 1000, factors["body_bytes"]) as source,
        http.client(name) as fetch,
    ):
        url = f"{source.url}/{behaviour}"
        for number in range(requests):
            odd = behaviour == "vary" and number % 2
            headers = {"Accept-Language": "pt" if odd else "en"}
            started = time.perf_counter()
            fetch(url, headers)
            taken.append(time.perf_counter() - started)
        return taken, source.counts
