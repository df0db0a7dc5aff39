"""How long may an answer be kept, and how is it taken back when the truth has changed?"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching import expiry
from kvbench.errors import Unsupported
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study, _estimates

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Event

    import pandas as pd

    from kvbench.caching.server import Server

#: Classes of queries and how often the truth behind an answer changes, per second.
CLASSES = {"static": 0.0, "daily": 1 / 86_400, "volatile": 1 / 30}

#: Times to live by class for the policy that tells them apart, seconds.
CLASS_TTL_S = {"static": 3600.0, "daily": 3600.0, "volatile": 10.0}

LIFETIMES = ("fixed", "jittered", "sliding", "by_class")
METHODS = ("ttl", "event", "tag", "pattern", "version", "flush")

#: Times to live of the paper's tables, seconds.
SHOWN_TTL_S = (10, 60, 3600)
SPREAD = 0.2

OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "lifetimes": {
            "type": "array",
            "items": {"enum": list(LIFETIMES)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(LIFETIMES),
            "description": "Expiry policies, simulated on a virtual clock.",
        },
        "ttl_s": {
            "type": "array",
            "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e7},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(SHOWN_TTL_S),
            "description": "Times to live, seconds; by_class has its own.",
        },
        "rate_per_s": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1e6,
            "default": 0.1,
            "description": "Requests for one key, per second (Poisson).",
        },
        "requests": {
            "type": "integer",
            "minimum": 100,
            "maximum": 100_000_000,
            "default": 40_000,
            "description": "Simulated requests per combination.",
        },
        "burst_entries": {
            "type": "integer",
            "minimum": 1,
            "maximum": 10_000_000,
            "default": 10_000,
            "description": "Entries stored at once, to see how many expire together.",
        },
        "invalidations": {
            "type": "array",
            "items": {"enum": list(METHODS)},
            "uniqueItems": True,
            "default": list(METHODS),
            "description": "Invalidation methods, on a real server; an empty list skips them.",
        },
        "invalidation_keys": {
            "type": "array",
            "items": {"type": "integer", "minimum": 100, "maximum": 10_000_000},
            "minItems": 1,
            "uniqueItems": True,
            "default": [1_000, 10_000],
            "description": "Entries on the server.",
        },
        "parts": {
            "type": "integer",
            "minimum": 1,
            "maximum": 1_000,
            "default": 10,
            "description": "Entries that depend on one entity.",
        },
        "updates": {
            "type": "integer",
            "minimum": 2,
            "maximum": 100_000,
            "default": 40,
            "description": "Entities changed and invalidated per method.",
        },
    },
}

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
    "invalidate_p50_us": "median time of an invalidation, microseconds",
    "invalidate_p99_us": "99th percentile, microseconds",
    "read_p50_us": "median time of a read, microseconds",
    "fill_us": "time to store one entry in a batch, microseconds",
    "bystander_p50_us": "median read of another client meanwhile, microseconds",
    "bystander_p99_us": "99th percentile, microseconds",
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


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run one cell; see :func:`plan` for the kinds."""
    if factors["kind"] == "ttl":
        return _ttl(factors, context)
    return _invalidation(factors, context)


def _lifetime(name: str, query_class: str, ttl_s: float, seed: int) -> expiry.Lifetime:
    if name == "fixed":
        return expiry.Fixed(ttl_s)
    if name == "sliding":
        return expiry.Sliding(ttl_s)
    if name == "jittered":
        return expiry.Jittered(ttl_s, SPREAD, seed)
    return expiry.ByClass(lambda key: query_class, CLASS_TTL_S)


def _predict(name: str, rate: float, change_rate: float, ttl_s: float) -> expiry.Prediction:
    if name == "sliding":
        return expiry.predict_sliding(rate, change_rate, ttl_s)
    if name == "jittered":
        return expiry.predict_jittered(rate, change_rate, ttl_s, SPREAD)
    return expiry.predict_fixed(rate, change_rate, ttl_s)


def _ttl(factors: Mapping[str, Any], context: Context) -> Outcome:
    rows = []
    rate = factors["rate_per_s"]
    for name in factors["lifetimes"]:
        for query_class, change_rate in CLASSES.items():
            times = [CLASS_TTL_S[query_class]] if name == "by_class" else factors["ttl_s"]
            for ttl_s in times:
                clock = expiry.VirtualClock()
                cache = expiry.TTLCache(_lifetime(name, query_class, ttl_s, context.seed), clock)
                seen = expiry.observe(
                    cache, clock, "key", rate, change_rate, factors["requests"], context.seed
                )
                predicted = _predict(name, rate, change_rate, ttl_s)
                rows.append(
                    {
                        "kind": "ttl",
                        "policy": name,
                        "query_class": query_class,
                        "change_rate_per_s": change_rate,
                        "rate_per_s": rate,
                        "ttl_s": ttl_s,
                        "requests": seen.requests,
                        "hit_ratio": seen.hit_ratio,
                        "predicted_hit_ratio": predicted.hit_ratio,
                        "hit_z": _z(seen.hit_ratio, predicted.hit_ratio, seen.hit_error),
                        "stale_share": seen.stale_share,
                        "predicted_stale_share": predicted.stale_share,
                        "stale_z": _z(seen.stale_share, predicted.stale_share, seen.stale_error),
                    }
                )
    for name in ("fixed", "jittered"):
        lifetime = _lifetime(name, "static", 60.0, context.seed)
        rows.append(
            {
                "kind": "burst",
                "policy": name,
                "ttl_s": 60.0,
                "entries": factors["burst_entries"],
                "most_expiries_per_s": expiry.most_expiries_per_second(
                    lifetime, factors["burst_entries"], 60.0 * (1 + SPREAD) + 1
                ),
            }
        )
    return Outcome(rows)


def _z(seen: float, predicted: float, error: float | None) -> float | None:
    return None if error is None else (seen - predicted) / error


def _invalidation(factors: Mapping[str, Any], context: Context) -> Outcome:
    from kvbench.caching.server import running

    rows, samples = [], {}
    with running(context.server_url, context.scratch) as server:
        if not server.private:
            raise Unsupported(
                "invalidation flushes the server and measures a scan of all its keys, so it needs "
                "a private one: remove app.server_url and REDIS_URL"
            )
        for name in factors["methods"]:
            server.client().flushall()
            row, times = _invalidate(name, factors, context, server)
            rows.append(row)
            samples[name] = times
    return Outcome(rows, samples)


def _value(version: int) -> bytes:
    return b"%d " % version + b"x" * 500


def _invalidate(
    name: str, factors: Mapping[str, Any], context: Context, server: Server
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    from kvbench.caching import invalidation

    client, parts = server.client(), factors["parts"]
    entities = [str(number) for number in range(max(2, factors["keys"] // parts))]
    method = invalidation.build(name, client, server.namespace, parts, ttl_s=3600)
    rng = np.random.default_rng(context.seed)
    versions = dict.fromkeys(entities, 0)
    # A flush empties everything, so each of its updates needs a full cache first.
    updates = min(3, factors["updates"]) if name == "flush" else factors["updates"]
    times: dict[str, list[float]] = {"invalidate": [], "read": []}
    started = time.perf_counter()
    _fill(method, versions)
    fill_s = time.perf_counter() - started
    client.set(f"{server.namespace}bystander", _value(0))
    stale = reads = gone = looked_at = 0
    # Another process, so that the interpreter lock is no part of what the other client waits for.
    processes = multiprocessing.get_context("fork")
    stop = processes.Event()
    here, there = processes.Pipe(duplex=False)
    bystander = processes.Process(
        target=_read_on, args=(server, f"{server.namespace}bystander", stop, there), daemon=True
    )
    bystander.start()
    try:
        for update in range(updates):
            if name == "flush" and update:
                _fill(method, versions)
            entity = entities[int(rng.integers(len(entities)))]
            versions[entity] += 1
            started = time.perf_counter()
            method.invalidate(entity)
            times["invalidate"].append(time.perf_counter() - started)
            for part in range(parts):
                started = time.perf_counter()
                found = method.get(entity, part)
                times["read"].append(time.perf_counter() - started)
                reads += 1
                if found is None:
                    method.put(entity, part, _value(versions[entity]))
                else:
                    stale += int(found.split()[0]) != versions[entity]
            for other in rng.choice(len(entities), size=min(5, len(entities)), replace=False):
                if entities[other] != entity:
                    looked_at += 1
                    gone += method.get(entities[other], 0) is None
    finally:
        stop.set()
        meanwhile = here.recv() if here.poll(10.0) else []
        bystander.join(10.0)
        if bystander.is_alive():
            bystander.kill()
    garbage = method.garbage()
    pipe = client.pipeline(transaction=False)
    for key in garbage:
        pipe.memory_usage(key, samples=0)
    row = {
        "kind": "invalidation",
        "policy": name,
        "ttl_s": 3600.0,
        "entries": len(entities) * parts,
        "promises_fresh": method.promises_fresh,
        "updates": updates,
        "reads": reads,
        "stale_reads": stale,
        "invalidate_p50_us": _percentile(times["invalidate"], 50),
        "invalidate_p99_us": _percentile(times["invalidate"], 99),
        "read_p50_us": _percentile(times["read"], 50),
        "fill_us": 1e6 * fill_s / (len(entities) * parts),
        "bystander_p50_us": _percentile(meanwhile, 50),
        "bystander_p99_us": _percentile(meanwhile, 99),
        "collateral_share": gone / looked_at if looked_at else None,
        "garbage_keys": len(garbage),
        "garbage_bytes": sum(pipe.execute()) if garbage else 0,
    }
    return row, times


def _fill(method: Any, versions: Mapping[str, int]) -> None:
    entries = [
        (entity, part, _value(version))
        for entity, version in versions.items()
        for part in range(method.parts)
    ]
    for first in range(0, len(entries), 1000):
        method.put_many(entries[first : first + 1000])


def _read_on(server: Server, key: str, stop: Event, answer: Connection) -> None:
    """Read one key about a thousand times a second until told to stop; send the times back."""
    client = server.client()
    taken = []
    while not stop.is_set():
        started = time.perf_counter()
        client.get(key)
        taken.append(time.perf_counter() - started)
        time.sleep(0.001)
    answer.send(taken)


def _percentile(seconds: list[float], percent: int) -> float | None:
    return 1e6 * float(np.percentile(seconds, percent)) if seconds else None


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return shares by policy and class, distances to theory, bursts, and invalidation."""
    found: dict[str, Value] = {}
    ttl = table[table["kind"] == "ttl"]
    for policy in LIFETIMES:
        for ttl_s in SHOWN_TTL_S if policy != "by_class" else (None,):
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
        found[f"expiry_burst_{policy}"] = _estimates.single_value(own["most_expiries_per_s"], "", 0)
    found["expiry_burst_entries"] = _estimates.single_value(burst["entries"], "", 0)
    server = table[table["kind"] == "invalidation"]
    largest = server[server["entries"] == server["entries"].max()]
    smallest = server[server["entries"] == server["entries"].min()]
    found["expiry_invalidation_entries"] = _estimates.single_value(largest["entries"], "", 0)
    found["expiry_invalidation_fewest_entries"] = _estimates.single_value(
        smallest["entries"], "", 0
    )
    for method in METHODS:
        own = largest[largest["policy"] == method]
        prefix = f"expiry_{method}"
        for column, scale, unit, digits in (
            ("stale_reads", 1, "", 0),
            ("reads", 1, "", 0),
            ("invalidate_p50_us", 1, "us", 0),
            ("invalidate_p99_us", 1, "us", 0),
            ("read_p50_us", 1, "us", 0),
            ("bystander_p99_us", 1, "us", 0),
            ("collateral_share", 100, "%", 0),
            ("garbage_keys", 1, "", 0),
            ("garbage_bytes", 1 / 1024, "KiB", 1),
        ):
            found[f"{prefix}_{column}"] = _estimates.single_value(scale * own[column], unit, digits)
        own = smallest[smallest["policy"] == method]
        found[f"{prefix}_invalidate_p50_us_fewest"] = _estimates.single_value(
            own["invalidate_p50_us"], "us", 0
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
            found[f"{name}_{query_class}_{column}"] = _estimates.single_value(
                100 * own[column], "%", 1
            )
    complete = set(rows["query_class"]) == set(CLASSES)
    hits = rows["hit_ratio"].mean() if complete else math.nan
    stale = (rows["hit_ratio"] * rows["stale_share"]).mean() if complete else math.nan
    found[f"{name}_hit_ratio"] = _estimates.single_value([100 * hits], "%", 1)
    found[f"{name}_stale_share"] = _estimates.single_value(
        [100 * stale / hits if hits else math.nan], "%", 1
    )
    return found


STUDY = Study(
    name="expiry",
    question="How long may an answer be kept, and how is it taken back when the truth changes?",
    options=OPTIONS,
    plan=plan,
    measure=measure,
    columns=COLUMNS,
    values=values,
)
