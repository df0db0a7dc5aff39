"""What does a client-side HTTP cache save, and does it obey the origin?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from kvbench.caching import http
from kvbench.errors import Unsupported
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study, _estimates

if TYPE_CHECKING:
    import pandas as pd

#: Request counts of the guides' table; the claims are decided at the largest.
COUNTS = (1, 10, 100, 500)

_COUNTS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 1, "maximum": 100_000},
    "minItems": 1,
    "uniqueItems": True,
}

OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "clients": {
            "type": "array",
            "items": {"enum": list(http.CLIENTS)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(http.CLIENTS),
            "description": "HTTP clients to compare.",
        },
        "behaviours": {
            "type": "array",
            "items": {"enum": list(http.BEHAVIOURS)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(http.BEHAVIOURS),
            "description": "Caching rules of the origin.",
        },
        "requests": {
            **_COUNTS_SCHEMA,
            "default": list(COUNTS),
            "description": "Requests of one run against the origin that allows reuse (max_age).",
        },
        "requests_others": {
            **_COUNTS_SCHEMA,
            "default": [50],
            "description": "Requests of one run against the other origins.",
        },
        "service_ms": {
            "type": "number",
            "minimum": 0,
            "maximum": 10_000,
            "default": 1,
            "description": "Fixed service time of the origin (a sleep), milliseconds.",
        },
        "body_bytes": {
            "type": "integer",
            "minimum": 64,
            "maximum": 10_000_000,
            "default": 4096,
            "description": "Size of a full answer, bytes.",
        },
        "repeats": {
            "type": "integer",
            "minimum": 1,
            "maximum": 1_000,
            "default": 1,
            "description": "Runs of each combination, each with an empty cache.",
        },
    },
}

COLUMNS = {
    "behaviour": "caching rule of the origin",
    "client": "HTTP client",
    "requests": "requests of the run",
    "repeat": "number of the run",
    "service_ms": "fixed service time of the origin, milliseconds",
    "wall_s": "time of the whole run, seconds",
    "first_s": "time of the first request, seconds",
    "later_median_s": "median time of the other requests, seconds",
    "origin_requests": "requests that reached the origin",
    "not_modified": "of these, answered 304 without a body",
    "body_bytes": "bytes of answer bodies the origin sent",
    "required_requests": "fewest requests to the origin that RFC 9111 allows",
    "forbidden_reuses": "answers reused although RFC 9111 forbids it",
    "rfc_correct": "no forbidden reuse here, and none in a trial where the content changes",
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """Return one cell per behaviour of the origin."""
    shared = {key: options[key] for key in ("clients", "service_ms", "body_bytes", "repeats")}
    return {
        behaviour: Cell(
            {
                "behaviour": behaviour,
                "requests": options["requests" if behaviour == "max_age" else "requests_others"],
                **shared,
            }
        )
        for behaviour in options["behaviours"]
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


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return wall times where reuse is allowed, what reached the origin, and who obeys it."""
    found: dict[str, Value] = {
        "http_service_ms": _estimates.single_value(table["service_ms"], "ms", 0)
    }
    reusable = table[table["behaviour"] == "max_age"]
    for name in http.CLIENTS:
        own = reusable[reusable["client"] == name]
        for count in COUNTS:
            rows = own[own["requests"] == count]
            found[f"http_{name}_{count}_s"] = _estimates.mean_value(rows["wall_s"], "s", 4)
        longest = own[own["requests"] == COUNTS[-1]]
        found[f"http_{name}_origin_requests"] = _estimates.mean_value(
            longest["origin_requests"], "", 0
        )
        found[f"http_{name}_later_us"] = _estimates.mean_value(
            1e6 * longest["later_median_s"], "us", 1
        )
        for behaviour in http.BEHAVIOURS:
            rows = table[(table["client"] == name) & (table["behaviour"] == behaviour)]
            found[f"http_{name}_{behaviour}_correct"] = Value(
                bool(rows["rfc_correct"].astype(bool).all()) if len(rows) else None
            )
            found[f"http_{name}_{behaviour}_reuses"] = _estimates.single_value(
                rows.sort_values("requests", ascending=False)["forbidden_reuses"], "", 0
            )
            found[f"http_{name}_{behaviour}_body_kib"] = _estimates.single_value(
                rows.sort_values("requests", ascending=False)["body_bytes"] / 1024, "KiB", 0
            )
        verdicts = [
            found[f"http_{name}_{behaviour}_correct"].value for behaviour in http.BEHAVIOURS
        ]
        found[f"http_{name}_correct"] = Value(
            None if all(verdict is None for verdict in verdicts) else verdicts.count(True), digits=0
        )
        slow, fast = found["http_none_500_s"].value, found[f"http_{name}_500_s"].value
        found[f"http_{name}_speedup"] = Value(slow / fast if slow and fast else None, None, "x", 0)
    found["http_behaviours"] = Value(table["behaviour"].nunique() or None, digits=0)
    return found


STUDY = Study(
    name="http",
    question="What does a client-side HTTP cache save, and does it obey the origin?",
    options=OPTIONS,
    plan=plan,
    measure=measure,
    columns=COLUMNS,
    values=values,
)
