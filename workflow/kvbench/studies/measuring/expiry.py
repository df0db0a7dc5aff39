"""How long may an answer be kept, and how is it taken back when the truth has changed?"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching import expiry
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Event

    from kvbench.caching.server import Server

#: Classes of queries and how often the truth behind an answer changes, per second.
CLASSES = {"static": 0.0, "daily": 1 / 86_400, "volatile": 1 / 30}

#: Times to live by class for the policies that tell them apart, seconds.
CLASS_TTL_S = {
    "by_class": {"static": 3600.0, "daily": 3600.0, "volatile": 10.0},
    # The caching guide's: latest news, historical fact, and everything else.
    "guide": {"static": 86_400.0, "daily": 3600.0, "volatile": 300.0},
}
SPREAD = 0.2


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
    return expiry.ByClass(lambda key: query_class, CLASS_TTL_S[name])


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
            own = CLASS_TTL_S.get(name)
            times = factors["ttl_s"] if own is None else [own[query_class]]
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
        "invalidate_p50_s": _percentile(times["invalidate"], 50),
        "invalidate_p99_s": _percentile(times["invalidate"], 99),
        "read_p50_s": _percentile(times["read"], 50),
        "fill_s": fill_s / (len(entities) * parts),
        "bystander_p50_s": _percentile(meanwhile, 50),
        "bystander_p99_s": _percentile(meanwhile, 99),
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
    return float(np.percentile(seconds, percent)) if seconds else None
