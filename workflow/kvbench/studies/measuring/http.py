"""What does a client-side HTTP cache save, and does it obey the origin?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvbench.caching import http
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome

_COUNTS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 1, "maximum": 100_000},
    "minItems": 1,
    "uniqueItems": True,
}


def required_requests(behaviour: str, requests: int) -> int:
    """Return the fewest requests to the origin that RFC 9111 allows for a run of ``requests``.

    Within a run the content is fresh throughout, and ``vary`` alternates between two languages.
    """
    return {"max_age": 1, "vary": min(2, requests)}.get(behaviour, requests)


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Try every client for correctness, then time it with nothing running beside it."""
    behaviour, clients = factors["behaviour"], list(factors["clients"])
    for name in clients:
        _available(name)
    with ThreadPoolExecutor(len(clients)) as pool:
        correct = dict(
            zip(clients, pool.map(lambda c: http.is_correct(c, behaviour), clients), strict=True)
        )
    rows, samples = [], {}
    for repeat in range(factors["repeats"]):
        for requests in factors["requests"]:
            for name in clients:
                taken, counts = _run(name, behaviour, requests, factors)
                required = required_requests(behaviour, requests)
                reuses = max(0, required - counts.requests)
                samples[f"{name}-{requests}-{repeat}"] = taken
                rows.append(
                    {
                        "behaviour": behaviour,
                        "client": name,
                        "requests": requests,
                        "repeat": repeat,
                        "service_ms": factors["service_ms"],
                        "wall_s": sum(taken),
                        "first_s": taken[0],
                        "later_median_s": statistics.median(taken[1:]) if taken[1:] else None,
                        "origin_requests": counts.requests,
                        "not_modified": counts.not_modified,
                        "body_bytes": counts.body_bytes,
                        "required_requests": required,
                        "forbidden_reuses": reuses,
                        "rfc_correct": correct[name] and reuses == 0,
                    }
                )
    return Outcome(rows, samples)


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
