"""How long may an answer be kept, and how is it taken back when the truth has changed?"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching import expiry
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome
from kvbench.studies.measuring._rounds import Log, with_controls

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

#: Rounds in which a flush takes part: as many as an interval needs, and each fills the cache anew.
_FLUSHES = 10


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
    """Let every method take back one entity a round, in an order drawn anew."""
    from kvbench.caching.server import running

    with running(context.server_url, context.scratch) as server:
        if not server.private:
            raise Unsupported(
                "invalidation flushes the server and measures a scan of all its keys, so it needs "
                "a private one: remove app.server_url and REDIS_URL"
            )
        server.client().flushall()
        arms = {
            arm: _Arm(name, number, factors, context, server)
            for number, (arm, name) in enumerate(with_controls(factors["methods"], "event").items())
        }
        log, meanwhile = Log(context.known), _Bystander(server, len(arms))
        # A flush empties everything, so that each of its turns needs a full cache first.
        seldom = {"flush": _FLUSHES}
        with meanwhile:
            for number, name in log.turns(arms, factors["updates"], context.seed, seldom):
                arm = arms[name]
                arm.prepare()
                with meanwhile.beside(name):
                    log.add(name, number, seconds=arm.update())
        rows = [arms[name].row(meanwhile.seconds(name)) for name in factors["methods"]]
        samples = {name: {**taken, "read": arms[name].read_s} for name, taken in log.arms().items()}
    return Outcome(rows, samples)


def _value(version: int) -> bytes:
    return b"%d " % version + b"x" * 500


class _Arm:
    """A method at work in a database of its own: a scan or a flush meets nobody else's entries."""

    def __init__(
        self, name: str, number: int, factors: Mapping[str, Any], context: Context, server: Server
    ) -> None:
        from kvbench.caching import invalidation

        self._name, self._parts = name, factors["parts"]
        self._client = server.client(db=number)
        self._entities = [str(one) for one in range(max(2, factors["keys"] // self._parts))]
        self._method = invalidation.build(
            name, self._client, server.namespace, self._parts, ttl_s=3600
        )
        self._rng = np.random.default_rng(context.seed)
        self._versions = dict.fromkeys(self._entities, 0)
        self._updates = self._stale = self._gone = self._looked_at = 0
        self._invalidate_s: list[float] = []
        self.read_s: list[float] = []
        started = time.perf_counter()
        _fill(self._method, self._versions)
        self._fill_s = time.perf_counter() - started

    def prepare(self) -> None:
        """Have everything stored again where an update takes all of it."""
        if self._name == "flush" and self._updates:
            _fill(self._method, self._versions)

    def update(self) -> float:
        """Change an entity, invalidate and read it; return the seconds of the invalidation."""
        entities, versions, method = self._entities, self._versions, self._method
        self._updates += 1
        entity = entities[int(self._rng.integers(len(entities)))]
        versions[entity] += 1
        started = time.perf_counter()
        method.invalidate(entity)
        seconds = time.perf_counter() - started
        self._invalidate_s.append(seconds)
        for part in range(self._parts):
            started = time.perf_counter()
            found = method.get(entity, part)
            self.read_s.append(time.perf_counter() - started)
            if found is None:
                method.put(entity, part, _value(versions[entity]))
            else:
                self._stale += int(found.split()[0]) != versions[entity]
        for other in self._rng.choice(len(entities), size=min(5, len(entities)), replace=False):
            if entities[other] != entity:
                self._looked_at += 1
                self._gone += method.get(entities[other], 0) is None
        return seconds

    def row(self, meanwhile: list[float]) -> dict[str, Any]:
        """The row of the method; ``meanwhile`` are the seconds of another client's reads."""
        garbage = self._method.garbage()
        pipe = self._client.pipeline(transaction=False)
        for key in garbage:
            pipe.memory_usage(key, samples=0)
        return {
            "kind": "invalidation",
            "policy": self._name,
            "ttl_s": 3600.0,
            "entries": len(self._entities) * self._parts,
            "promises_fresh": self._method.promises_fresh,
            "updates": self._updates,
            "reads": len(self.read_s),
            "stale_reads": self._stale,
            "invalidate_p50_s": _percentile(self._invalidate_s, 50),
            "invalidate_p99_s": _percentile(self._invalidate_s, 99),
            "read_p50_s": _percentile(self.read_s, 50),
            "fill_s": self._fill_s / (len(self._entities) * self._parts),
            "bystander_p50_s": _percentile(meanwhile, 50),
            "bystander_p99_s": _percentile(meanwhile, 99),
            "collateral_share": self._gone / self._looked_at if self._looked_at else None,
            "garbage_keys": len(garbage),
            "garbage_bytes": sum(pipe.execute()) if garbage else 0,
        }


class _Bystander:
    """Another client of the server, and how long its reads took while each method was at work.

    It is a process, so that the interpreter lock is no part of what it waits for.
    """

    def __init__(self, server: Server, database: int) -> None:
        processes = multiprocessing.get_context("fork")
        key = f"{server.namespace}bystander"
        server.client(db=database).set(key, _value(0))
        self._stop = processes.Event()
        self._here, there = processes.Pipe(duplex=False)
        self._process = processes.Process(
            target=_read_on, args=(server, database, key, self._stop, there), daemon=True
        )
        self._windows: dict[str, list[tuple[float, float]]] = {}
        self._taken: list[tuple[float, float]] = []

    def __enter__(self) -> _Bystander:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._taken = self._here.recv() if self._here.poll(10.0) else []
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Count what is read meanwhile as read beside a method."""
        begun = time.perf_counter()
        yield
        self._windows.setdefault(name, []).append((begun, time.perf_counter()))

    def seconds(self, name: str) -> list[float]:
        """How long the reads took that were under way beside a method."""
        windows = self._windows.get(name, [])
        return [
            seconds
            for begun, seconds in self._taken
            if any(begun < end and begun + seconds > start for start, end in windows)
        ]


def _fill(method: Any, versions: Mapping[str, int]) -> None:
    entries = [
        (entity, part, _value(version))
        for entity, version in versions.items()
        for part in range(method.parts)
    ]
    for first in range(0, len(entries), 1000):
        method.put_many(entries[first : first + 1000])


def _read_on(server: Server, database: int, key: str, stop: Event, answer: Connection) -> None:
    """Read one key about a thousand times a second until told to stop; send begin and seconds back."""
    client = server.client(db=database)
    taken = []
    while not stop.is_set():
        # The clock of the machine, which all of its processes share.
        started = time.perf_counter()
        client.get(key)
        taken.append((started, time.perf_counter() - started))
        time.sleep(0.001)
    answer.send(taken)


def _percentile(seconds: list[float], percent: int) -> float | None:
    return float(np.percentile(seconds, percent)) if seconds else None
