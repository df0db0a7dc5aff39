"""How often a value is loaded when many threads want it at once, and how long they wait."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvbench.caching.server import Server, running
from kvbench.caching.stampede import EXCLUSIVE, PROTECTIONS, protect
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study
from kvbench.studies._latency import first, milliseconds, number, summary, summary_columns

if TYPE_CHECKING:
    import pandas as pd

_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "protections": {
            "description": "Ways to load the value once; xfetch is run with every beta.",
            "type": "array",
            "items": {"enum": list(PROTECTIONS)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(PROTECTIONS),
        },
        "betas": {
            "description": "Eagerness of XFetch's early refresh; 1 is its authors' choice.",
            "type": "array",
            "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
            "minItems": 1,
            "uniqueItems": True,
            "default": [1],
        },
        "threads": {
            "description": "Threads that ask for the value.",
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 500},
            "minItems": 1,
            "uniqueItems": True,
            "default": [1, 10, 50],
        },
        "service_ms": {
            "description": "Fixed service time of one load, in ms; not a model.",
            "type": "number",
            "minimum": 1,
            "maximum": 10000,
            "default": 30,
        },
        "ttl_ms": {
            "description": "Life of a loaded value, in ms.",
            "type": "number",
            "minimum": 10,
            "default": 150,
        },
        "duration_ms": {
            "description": "How long the threads ask, in ms.",
            "type": "number",
            "minimum": 100,
            "default": 450,
        },
        "pause_ms": {
            "description": "Pause of a thread between two requests, in ms.",
            "type": "number",
            "minimum": 0.1,
            "default": 5,
        },
    },
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell per number of threads, and one for the protection that needs a server."""
    shared = {
        name: options[name] for name in ("betas", "service_ms", "ttl_ms", "duration_ms", "pause_ms")
    }
    local = [name for name in options["protections"] if name != "set_nx"]
    cells = {}
    if local:
        cells = {
            f"threads{threads}": Cell({"threads": [threads], "protections": local, **shared})
            for threads in options["threads"]
        }
    if "set_nx" in options["protections"]:
        cells["server"] = Cell({"threads": options["threads"], "protections": ["set_nx"], **shared})
    return cells


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
        "loads": len(source.loads),
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


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return loads and waiting times of every protection at the most threads."""
    named: dict[str, Value] = {}
    crowd = table[table["threads"] == table["threads"].max()]
    named["stampede_threads"] = number(first(crowd), "threads", "", 0)
    named["stampede_loads_minimum"] = number(first(crowd), "loads_minimum", "", 0)
    for name in PROTECTIONS:
        rows = crowd[crowd["protection"] == name]
        if name == "xfetch" and len(rows):
            # Its authors' choice of beta, or the nearest that was run.
            rows = rows.loc[[(rows["beta"] - 1).abs().idxmin()]]
        row = first(rows)
        named[f"stampede_{name}_loads"] = number(row, "loads", "", 0)
        named[f"stampede_{name}_loads_cold"] = number(row, "loads_cold", "", 0)
        named[f"stampede_{name}_loads_at_once"] = number(row, "loads_at_once", "", 0)
        named[f"stampede_{name}_wait_p99_ms"] = milliseconds(row, "wait_p99_s", 1)
        named[f"stampede_{name}_stale_share"] = number(row, "stale_share", "%", 1, 100)
    named["stampede_xfetch_beta"] = number(
        first(crowd[crowd["protection"] == "xfetch"]), "beta", "", 1
    )
    held = table[table["exclusive"].astype(bool)] if len(table) else table
    named["stampede_exclusive_loads_at_once"] = Value(
        None if held.empty else int(held["loads_at_once"].max()), digits=0
    )
    return named


STUDY = Study(
    name="stampede",
    question="How often is a value loaded when many threads want it at once?",
    options=_OPTIONS,
    plan=plan,
    measure=measure,
    columns={
        "protection": "how the load is protected",
        "beta": "eagerness of XFetch",
        "threads": "threads that ask",
        "exclusive": "whether the protection promises one load at a time",
        "requests": "requests of all threads",
        "loads": "calls of the source",
        "loads_minimum": "duration over (life + service time), rounded up: the fewest loads",
        "loads_cold": "loads that began before any had ended, with an empty cache",
        "loads_at_once": "most loads that ran together",
        "stale_share": "share of requests that got a value older than its life",
        **summary_columns("wait", "time of a request"),
        "wait_max_s": "longest time of a request (s)",
    },
    values=values,
)
