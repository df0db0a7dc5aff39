"""What does a client-side HTTP cache save, and does it obey the origin?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvbench.caching import http
from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies import _values as named
from kvbench.studies._values import first, number

if TYPE_CHECKING:
    import pandas as pd

#: Request counts of the guides' table; the claims are decided at the largest.
COUNTS = (1, 10, 100, 500)

#: The only caching rule under which a page may be reused without asking.
REUSABLE = "max_age"

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
        "Requests of one run against the other origins.", [10], minimum=1, maximum=100_000
    ),
    service_ms=option.number(
        "Fixed service time of the origin (a sleep), milliseconds.", 1, minimum=0, maximum=10_000
    ),
    body_bytes=option.integer(
        "Size of a full answer, bytes.", 4096, minimum=64, maximum=10_000_000
    ),
    repeats=option.integer(
        "Rounds of the origin that allows reuse; in each every client has a run, with an empty "
        "cache. The other origins are asked in one round, for what the clients do.",
        10,
        minimum=1,
        maximum=1_000,
    ),
    count_limit_s=option.number(
        "A number of requests that has taken this long gets no further round, seconds.",
        3,
        above=0,
        maximum=3_600,
    ),
)

COLUMNS = {
    "behaviour": "caching rule of the origin",
    "client": "HTTP client",
    "requests": "requests of the run",
    "runs": "runs, each with an empty cache; the times below are medians over them",
    "service_ms": "fixed service time of the origin, milliseconds",
    "wall_s": "time of the whole run, seconds",
    "wall_s_ci_low": "lower end of its 95 % interval; empty below six runs, seconds",
    "wall_s_ci_high": "upper end of its 95 % interval; empty below six runs, seconds",
    **_paired.meanings("speedup", "time without a cache over the time of this client"),
    "speedup_limit": "requests over requests that reached the origin, where some did not: the most "
    "that reuse can gain",
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
    """Return one cell for the origin that allows reuse, and one for all that do not."""
    shared = {key: options[key] for key in ("clients", "service_ms", "body_bytes", "count_limit_s")}
    others = [name for name in options["behaviours"] if name != REUSABLE]
    cells = {}
    if REUSABLE in options["behaviours"]:
        cells[REUSABLE] = Cell(
            {
                "behaviours": [REUSABLE],
                "requests": options["requests"],
                "repeats": options["repeats"],
                **shared,
            }
        )
    if others:
        cells["rules"] = Cell(
            {"behaviours": others, "requests": options["requests_others"], "repeats": 1, **shared}
        )
    return cells


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with their speed-up over the client without a cache, round by round."""
    arms = record["samples"].get("arms", {})
    rows = []
    for recorded in record["rows"]:
        row = {"runs": 1, **recorded}
        # Records made before there were rounds have one row per run.
        row.pop("repeat", None)
        taken = arms.get(f"{row['behaviour']}-{row['requests']}", {})
        if row["client"] != "none":
            row |= _paired.compare("speedup", taken, "none", row["client"])
            if row["origin_requests"] < row["requests"]:
                row["speedup_limit"] = row["requests"] / max(1, row["origin_requests"])
        rows.append(row)
    return rows


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return wall times where reuse is allowed, what reached the origin, and who obeys it."""
    found: dict[str, Value] = {
        "http_service_ms": named.single_value(table["service_ms"], "ms", 0),
        "http_behaviours": Value(table["behaviour"].nunique() or None, digits=0),
    }
    reusable = table[table["behaviour"] == REUSABLE]
    bare = reusable[reusable["client"] == "none"]
    for name in http.CLIENTS:
        own = reusable[reusable["client"] == name]
        for count in COUNTS:
            row = first(own[own["requests"] == count])
            base = first(bare[bare["requests"] == count])
            found[f"http_{name}_{count}_s"] = named.with_interval(row, "wall_s", "s", 4)
            found[f"http_{name}_{count}_speedup"] = _paired.value(
                row, "speedup", "x", 1, _paired.quotient(base, row, "wall_s")
            )
        longest = first(own[own["requests"] == COUNTS[-1]])
        found[f"http_{name}_speedup"] = replace(
            found[f"http_{name}_{COUNTS[-1]}_speedup"], digits=0
        )
        found[f"http_{name}_origin_requests"] = number(longest, "origin_requests", "", 0)
        found[f"http_{name}_later_us"] = number(longest, "later_median_s", "us", 1, 1e6)
        found |= _obedience(name, table[table["client"] == name])
    found["http_speedups_beyond_limit"] = Value(
        _paired.beyond_limit(reusable.to_dict("records"), "speedup", "speedup_limit")
        if len(reusable)
        else None,
        digits=0,
    )
    return found


def _obedience(name: str, rows: pd.DataFrame) -> dict[str, Value]:
    """Return what a client does with each caching rule."""
    found, verdicts = {}, []
    for behaviour in http.BEHAVIOURS:
        own = rows[rows["behaviour"] == behaviour].sort_values("requests", ascending=False)
        row, prefix = first(own), f"http_{name}_{behaviour}"
        verdict = bool(own["rfc_correct"].astype(bool).all()) if len(own) else None
        verdicts.append(verdict)
        found[f"{prefix}_correct"] = Value(verdict)
        found[f"{prefix}_reuses"] = number(row, "forbidden_reuses", "", 0)
        found[f"{prefix}_body_kib"] = number(row, "body_bytes", "KiB", 0, 1 / 1024)
        # Of a page in two languages: 2 where both variants are kept and told apart.
        found[f"{prefix}_requests"] = number(row, "origin_requests", "", 0)
    right = None if None in verdicts else verdicts.count(True)
    return found | {f"http_{name}_correct": Value(right, digits=0)}


STUDY = Study(
    name="http",
    question="What does a client-side HTTP cache save, and does it obey the origin?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
    aggregate=aggregate,
)
