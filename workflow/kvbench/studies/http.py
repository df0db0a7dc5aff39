"""What does a client-side HTTP cache save, and does it obey the origin?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.caching import http
from kvbench.paper.values import Value
from kvbench.studies import Cell, Study
from kvbench.studies import _option as option
from kvbench.studies import _values as named

if TYPE_CHECKING:
    import pandas as pd

#: Request counts of the guides' table; the claims are decided at the largest.
COUNTS = (1, 10, 100, 500)

OPTIONS = option.schema(
    clients=option.choices("HTTP clients to compare.", http.CLIENTS),
    behaviours=option.choices("Caching rules of the origin.", http.BEHAVIOURS),
    requests=option.integers(
        "Requests of one run against the origin that allows reuse (max_age).",
        COUNTS,
        minimum=1,
        maximum=100_000,
    ),
    requests_others=option.integers(
        "Requests of one run against the other origins.", [50], minimum=1, maximum=100_000
    ),
    service_ms=option.number(
        "Fixed service time of the origin (a sleep), milliseconds.", 1, minimum=0, maximum=10_000
    ),
    body_bytes=option.integer(
        "Size of a full answer, bytes.", 4096, minimum=64, maximum=10_000_000
    ),
    repeats=option.integer(
        "Runs of each combination, each with an empty cache.", 1, minimum=1, maximum=1000
    ),
)


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


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return wall times where reuse is allowed, what reached the origin, and who obeys it."""
    found: dict[str, Value] = {"http_service_ms": named.single_value(table["service_ms"], "ms", 0)}
    reusable = table[table["behaviour"] == "max_age"]
    for name in http.CLIENTS:
        own = reusable[reusable["client"] == name]
        for count in COUNTS:
            rows = own[own["requests"] == count]
            found[f"http_{name}_{count}_s"] = named.mean_value(rows["wall_s"], "s", 4)
        longest = own[own["requests"] == COUNTS[-1]]
        found[f"http_{name}_origin_requests"] = named.mean_value(longest["origin_requests"], "", 0)
        found[f"http_{name}_later_us"] = named.mean_value(1e6 * longest["later_median_s"], "us", 1)
        for behaviour in http.BEHAVIOURS:
            rows = table[(table["client"] == name) & (table["behaviour"] == behaviour)]
            found[f"http_{name}_{behaviour}_correct"] = Value(
                bool(rows["rfc_correct"].astype(bool).all()) if len(rows) else None
            )
            found[f"http_{name}_{behaviour}_reuses"] = named.single_value(
                rows.sort_values("requests", ascending=False)["forbidden_reuses"], "", 0
            )
            found[f"http_{name}_{behaviour}_body_kib"] = named.single_value(
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
    columns=COLUMNS,
    values=values,
)
