"""How often a value is loaded when many threads want it at once, and how long they wait."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvbench.caching.server import Server, running
from kvbench.caching.stampede import EXCLUSIVE, protect
from kvbench.studies import Context, Outcome
from kvbench.studies._estimates import summary


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Let threads ask for one value under every protection, beginning with an empty cache."""
    if "set_nx" not in factors["protections"]:
        return _measure(factors, context, None)
    with running(context.server_url, context.scratch) as server:
        return _measure(factors, context, server)


def _measure(factors: Mapping[str, Any], context: Context, server: Server | None) -> Outcome:
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    for threads in factors["threads"]:
        for name in factors["protections"]:
            for beta in factors["betas"] if name == "xfetch" else [math.nan]:
                label = f"{name}-{threads}" + ("" if math.isnan(beta) else f"-{beta}")
                source = Source(factors["service_ms"] / 1000)
                get = protect(
                    name,
                    source.load,
                    factors["ttl_ms"] / 1000,
                    seed=context.seed,
                    beta=beta,
                    client=None if server is None else server.client(),
                    # A name of its own, so that no run finds the value of the one before.
                    namespace="" if server is None else f"{server.namespace}{label}:",
                )
                latency_s, age_s = _ask(get, threads, factors)
                row = {"protection": name, "beta": beta, "threads": threads}
                rows.append(row | _row(name, factors, source, latency_s, age_s))
                samples[label] = {"latency_s": latency_s, "loads": source.loads}
    return Outcome(rows, samples)


def _row(
    name: str,
    factors: Mapping[str, Any],
    source: Source,
    latency_s: list[float],
    age_s: list[float],
) -> dict[str, Any]:
    ttl_s = factors["ttl_ms"] / 1000
    return {
        "exclusive": name in EXCLUSIVE,
        "requests": len(latency_s),
        "loads": source.loads_within(factors["duration_ms"] / 1000),
        "loads_minimum": minimum_loads(
            factors["duration_ms"], factors["ttl_ms"], factors["service_ms"]
        ),
        "loads_cold": source.cold_loads(),
        "loads_at_once": source.most_at_once,
        "stale_share": sum(age > ttl_s for age in age_s) / len(age_s),
        **summary(latency_s, "wait"),
        "wait_max_s": max(latency_s),
    }


def minimum_loads(duration_ms: float, ttl_ms: float, service_ms: float) -> int:
    """Fewest loads that keep the value fresh: one per life plus load time, begun at once."""
    return math.ceil(duration_ms / (ttl_ms + service_ms))


class Source:
    """A load of fixed service time that writes down when it ran and beside how many others."""

    def __init__(self, service_s: float) -> None:
        self._service_s = service_s
        self._lock = threading.Lock()
        self._running = 0
        self.most_at_once = 0
        self.loads: list[tuple[float, float]] = []

    def load(self) -> dict[str, float]:
        """Wait out the service time; return the moment at which the value was made."""
        with self._lock:
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        begun = time.monotonic()
        time.sleep(self._service_s)
        ended = time.monotonic()
        with self._lock:
            self._running -= 1
            self.loads.append((begun, ended))
        return {"made": ended}

    def loads_within(self, duration_s: float) -> int:
        """Loads that began within ``duration_s`` of the first.

        A thread may come late, or be held up between its look at the clock and its request: what it
        loads after the time is over is no load of that time.
        """
        first = min(begun for begun, _ in self.loads)
        return sum(begun < first + duration_s for begun, _ in self.loads)

    def cold_loads(self) -> int:
        """Loads that began before any had ended."""
        first_end = min(ended for _, ended in self.loads)
        return sum(begun < first_end for begun, _ in self.loads)


def _ask(
    get: Callable[[], dict[str, float]], threads: int, factors: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    """Return the waiting time and the age of the value of every request of every thread."""
    latency_s: list[float] = []
    age_s: list[float] = []
    errors: list[BaseException] = []
    barrier = threading.Barrier(threads)
    pause_s = factors["pause_ms"] / 1000

    def ask() -> None:
        own_latency, own_age = [], []
        try:
            barrier.wait()
            end = time.monotonic() + factors["duration_ms"] / 1000
            while (started := time.monotonic()) < end:
                value = get()
                answered = time.monotonic()
                own_latency.append(answered - started)
                own_age.append(started - value["made"])
                time.sleep(pause_s)
        except BaseException as error:
            errors.append(error)
        latency_s.extend(own_latency)
        age_s.extend(own_age)

    running_threads = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in running_threads:
        thread.start()
    for thread in running_threads:
        thread.join()
    if errors:
        raise errors[0]
    return latency_s, age_s
