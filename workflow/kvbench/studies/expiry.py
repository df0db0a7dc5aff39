"""How long may an answer be kept, and how is it taken back when the truth has changed?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies import _values as named

if TYPE_CHECKING:
    import pandas as pd


#: Classes of queries, by how often the truth behind an answer changes.
CLASSES = ("static", "daily", "volatile")

LIFETIMES = ("fixed", "jittered", "sliding", "by_class", "guide")
METHODS = ("ttl", "event", "tag", "pattern", "version", "flush")

#: Expiry policies with times to live of their own; ``guide`` has the caching guide's (300 s for what
#: changes, 86,400 s for facts, 3,600 s otherwise).
_BY_TYPE = ("by_class", "guide")

#: Times to live of the paper's tables, seconds.
SHOWN_TTL_S = (10, 60, 3600)

OPTIONS = option.schema(
    lifetimes=option.choices("Expiry policies, simulated on a virtual clock.", LIFETIMES),
    ttl_s=option.numbers(
        "Times to live, seconds; by_class and guide have their own.",
        SHOWN_TTL_S,
        maximum=1e7,
        above=0,
    ),
    rate_per_s=option.number(
        "Requests for one key, per second (Poisson).", 0.1, maximum=1e6, above=0
    ),
    requests=option.integer(
        "Simulated requests per combination.", 20_000, minimum=100, maximum=100_000_000
    ),
    burst_entries=option.integer(
        "Entries stored at once, to see how many expire together.",
        10_000,
        minimum=1,
        maximum=10_000_000,
    ),
    invalidations=option.choices(
        "Invalidation methods, on a real server; an empty list skips them.", METHODS, empty=True
    ),
    invalidation_keys=option.integers(
        "Entries on the server.", [1000, 5000], minimum=100, maximum=10_000_000
    ),
    parts=option.integer("Entries that depend on one entity.", 10, minimum=1, maximum=1000),
    updates=option.integer(
        "Rounds; in each, every method takes back one entity (flush in ten of them).",
        40,
        minimum=2,
        maximum=100_000,
    ),
)


COLUMNS = {
    "kind": "ttl (virtual clock), burst (entries that expire together) or invalidation (server)",
    "policy": "expiry policy or invalidation method",
    "query_class": "how often the truth changes: static, daily or volatile",
    "change_rate_per_s": "changes of the truth per second",
    "rate_per_s": "requests for one key per second",
    "ttl_s": "time to live, seconds",
    "requests": "requests counted",
    "hit_ratio": "hits per request",
    "predicted_hit_ratio": "by renewal theory",
    "hit_z": "difference to theory in standard errors",
    "stale_share": "stale hits per hit",
    "predicted_stale_share": "by renewal theory",
    "stale_z": "difference to theory in standard errors",
    "entries": "entries stored at once (burst) or on the server (invalidation)",
    "most_expiries_per_s": "entries that expired within the worst second",
    "promises_fresh": "nothing outdated may be read after the acknowledgement",
    "updates": "entities changed and invalidated",
    "reads": "reads of the changed entities' entries right after the acknowledgement",
    "stale_reads": "of these, reads that returned the old value",
    "invalidate_p50_s": "median time of an invalidation (s)",
    "invalidate_p99_s": "99th percentile (s)",
    **_paired.meanings("over_event", "time of an invalidation over that of event"),
    "read_p50_s": "median time of a read (s)",
    "fill_s": "time to store one entry in a batch (s)",
    "bystander_p50_s": "median read of another client meanwhile (s)",
    "bystander_p99_s": "99th percentile (s)",
    "collateral_share": "entries of other entities that were gone after an invalidation",
    "garbage_keys": "entries left that can never be read again",
    "garbage_bytes": "memory they take until they expire, bytes",
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """Return one cell for all expiry policies, and one per number of keys for invalidation."""
    simulated = ("lifetimes", "ttl_s", "rate_per_s", "requests", "burst_entries")
    cells = {
        "ttl": Cell({"kind": "ttl", **{name: options[name] for name in simulated}}, timed=False)
    }
    if options["invalidations"]:
        for keys in options["invalidation_keys"]:
            cells[f"invalidation-{keys}"] = Cell(
                {
                    "kind": "invalidation",
                    "methods": options["invalidations"],
                    "keys": keys,
                    "parts": options["parts"],
                    "updates": options["updates"],
                }
            )
    return cells


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows, with what each method took over ``event`` in the same rounds.

    Older records hold microseconds, and methods that ran one after the other.
    """
    rows = [named.in_seconds(row) for row in record["rows"]]
    samples = record.get("samples") or {}
    for row in rows:
        policy = row.get("policy")
        mine = samples.get(policy, {}) if row["kind"] == "invalidation" else {}
        if policy != "event" and "round" in mine:
            row |= _paired.compare("over_event", samples, policy, "event", reference="event")
    return rows


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return shares by policy and class, distances to theory, bursts, and invalidation."""
    found: dict[str, Value] = {}
    ttl = table[table["kind"] == "ttl"]
    for policy in LIFETIMES:
        for ttl_s in SHOWN_TTL_S if policy not in _BY_TYPE else (None,):
            own = ttl[ttl["policy"] == policy]
            name = f"expiry_{policy}"
            if ttl_s is not None:
                own = own[own["ttl_s"] == ttl_s]
                name += f"_{ttl_s}s"
            found.update(_shares(name, own))
    for column in ("hit", "stale"):
        distances = ttl[f"{column}_z"].abs()
        found[f"expiry_{column}_largest_z"] = Value(
            float(distances.max()) if distances.notna().any() else None, digits=1
        )
    distances = ttl[["hit_z", "stale_z"]].stack().abs()
    found["expiry_comparisons"] = Value(len(distances) or None, digits=0)
    # Of many comparisons the largest is expected beyond 2; the bound is for all of them together.
    found["expiry_beyond_3_sigma"] = Value(
        int((distances > 3).sum()) if len(distances) else None, digits=0
    )
    burst = table[table["kind"] == "burst"]
    for policy in ("fixed", "jittered"):
        own = burst[burst["policy"] == policy]
        found[f"expiry_burst_{policy}"] = named.single_value(own["most_expiries_per_s"], "", 0)
    found["expiry_burst_entries"] = named.single_value(burst["entries"], "", 0)
    server = table[table["kind"] == "invalidation"]
    largest = server[server["entries"] == server["entries"].max()]
    smallest = server[server["entries"] == server["entries"].min()]
    found["expiry_invalidation_entries"] = named.single_value(largest["entries"], "", 0)
    found["expiry_invalidation_fewest_entries"] = named.single_value(smallest["entries"], "", 0)
    for method in METHODS:
        own = largest[largest["policy"] == method]
        prefix = f"expiry_{method}"
        for column, scale, unit, digits in (
            ("stale_reads", 1, "", 0),
            ("reads", 1, "", 0),
            ("collateral_share", 100, "%", 0),
            ("garbage_keys", 1, "", 0),
            ("garbage_bytes", 1 / 1024, "KiB", 1),
        ):
            found[f"{prefix}_{column}"] = named.single_value(scale * own[column], unit, digits)
        for column in ("invalidate_p50", "invalidate_p99", "read_p50", "bystander_p99"):
            found[f"{prefix}_{column}_us"] = named.number(
                named.first(own), f"{column}_s", "us", 0, 1e6
            )
        found[f"{prefix}_over_event"] = _paired.value(named.first(own), "over_event", digits=1)
        fewest = named.first(smallest[smallest["policy"] == method])
        found[f"{prefix}_invalidate_p50_us_fewest"] = named.number(
            fewest, "invalidate_p50_s", "us", 0, 1e6
        )
    promised = server[server["promises_fresh"].fillna(False).astype(bool)]
    found["expiry_broken_promises"] = Value(
        int(promised["stale_reads"].sum()) if len(promised) else None, digits=0
    )
    return found


def _shares(name: str, rows: pd.DataFrame) -> dict[str, Value]:
    """Return hits per request and stale hits per hit, by class and over equal traffic of all."""
    found = {}
    for query_class in CLASSES:
        own = rows[rows["query_class"] == query_class]
        for column in ("hit_ratio", "stale_share"):
            found[f"{name}_{query_class}_{column}"] = named.single_value(100 * own[column], "%", 1)
    complete = set(rows["query_class"]) == set(CLASSES)
    hits = rows["hit_ratio"].mean() if complete else math.nan
    stale = (rows["hit_ratio"] * rows["stale_share"]).mean() if complete else math.nan
    found[f"{name}_hit_ratio"] = named.single_value([100 * hits], "%", 1)
    found[f"{name}_stale_share"] = named.single_value(
        [100 * stale / hits if hits else math.nan], "%", 1
    )
    return found


STUDY = Study(
    name="expiry",
    question="How long may an answer be kept, and how is it taken back when the truth changes?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
    aggregate=aggregate,
)
