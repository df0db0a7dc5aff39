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
from kvbench.studies._estimates import quantile, summary
from kvbench.studies.measuring._rounds import SPARE, Log, with_controls

#: What the waiting times of the others are compared with; it takes its turns in every cell.
_REFERENCE = "none"


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Let threads ask for one value under every protection in turn, each time with an empty cache."""
    if "set_nx" not in factors["protections"]:
        return _measure(factors, context, None)
    with running(context.server_url, context.scratch) as server:
        return _measure(factors, context, server)


def _measure(factors: Mapping[str, Any], context: Context, server: Server | None) -> Outcome:
    log = Log(context.known)
    # One client for all turns: only the first of them opens connections.
    client = None if server is None else server.client()
    named = dict.fromkeys([_REFERENCE, *factors["protections"]])
    ways = [
        (name, beta)
        for name in named
        for beta in (factors["betas"] if name == "xfetch" else [math.nan])
    ]
    rows: list[dict[str, Any]] = []
    for threads in factors["threads"]:
        arms = {_label(name, threads, beta): (name, beta) for name, beta in ways}
        reference = _label(_REFERENCE, threads, math.nan)
        doing = with_controls(arms, *([reference] if len(arms) > 1 else []))
        rounds = factors["rounds"]
        for number, label in log.turns(doing, rounds, context.seed, spare=rounds // SPARE):
            name, beta = arms[doing[label]]
            source = Source(factors["service_ms"] / 1000)
            get = protect(
                name,
                source.load,
                factors["ttl_ms"] / 1000,
                seed=context.seed + number,
                beta=beta,
                client=client,
                # A name of its own, so that no turn finds the value of the one before.
                namespace="" if server is None else f"{server.namespace}{label}:{number}:",
            )
            log.add(label, number, **_turn(get, source, threads, factors))
        rows += [
            {"protection": name, "beta": beta, "threads": threads} | _row(name, factors, log, label)
            for label, (name, beta) in arms.items()
            if name in factors["protections"]
        ]
    return Outcome(rows, {"arms": log.arms()})


def _label(name: str, threads: int, beta: float) -> str:
    return f"{name}-{threads}" + ("" if math.isnan(beta) else f"-{beta:g}")


def _turn(
    get: Callable[[], dict[str, float]], source: Source, threads: int, factors: Mapping[str, Any]
) -> dict[str, Any]:
    """Let the whole crowd ask once, and return what a turn is remembered by."""
    latency_s, age_s = _ask(get, threads, factors)
    source.settle()
    return {
        "wait_mean_s": sum(latency_s) / len(latency_s),
        "wait_p99_s": quantile(latency_s, 0.99)[0],
        "stale": sum(age > factors["ttl_ms"] / 1000 for age in age_s),
        "loads_within": source.loads_within(factors["duration_ms"] / 1000),
        "loads_cold": source.cold_loads(),
        "loads_at_once": source.most_at_once,
        "loads": source.loads,
        "latency_s": latency_s,
    }


def _row(name: str, factors: Mapping[str, Any], log: Log, label: str) -> dict[str, Any]:
    """All turns of a protection: what is counted is summed, and times are those of all requests."""
    rounds = len(log.of(label, "round"))
    latency_s = [second for turn in log.of(label, "latency_s") for second in turn]
    fewest = minimum_loads(factors["duration_ms"], factors["ttl_ms"], factors["service_ms"])
    return {
        "exclusive": name in EXCLUSIVE,
        "rounds": rounds,
        "requests": len(latency_s),
        "loads": sum(log.of(label, "loads_within")),
        "loads_minimum": rounds * fewest,
        "loads_cold": sum(log.of(label, "loads_cold")),
        "loads_at_once": max(log.of(label, "loads_at_once")),
        "stale_share": sum(log.of(label, "stale")) / len(latency_s),
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
        self._lock = threading.Condition()
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
            self._lock.notify_all()
        return {"made": ended}

    def settle(self) -> None:
        """Wait until no load runs: one in the background must not reach into the next turn."""
        with self._lock:
            self._lock.wait_for(lambda: not self._running)

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
