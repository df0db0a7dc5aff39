"""What a private first level in front of a shared cache server gains, level by level."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching.layered import LayeredCache
from kvbench.caching.server import Server, running
from kvbench.caching.workload import zipf
from kvbench.errors import Unsupported
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study
from kvbench.studies._latency import first, milliseconds, number, quantile

if TYPE_CHECKING:
    import pandas as pd

CONFIGURATIONS = ("source", "l1", "l2", "l1_l2", "l1_l2_promotion")

#: Requests of the run without a cache: each takes the service time, and nothing else varies.
_UNCACHED_REQUESTS = 100
_TTL_S = 3600.0
_VALUE_BYTES = 2048

_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "service_ms": {
            "description": "Fixed service times of the source (L3), in ms; not a model.",
            "type": "array",
            "items": {"type": "number", "minimum": 0.1, "maximum": 10000},
            "minItems": 1,
            "uniqueItems": True,
            "default": [5],
        },
        "l1_share": {
            "description": "Capacities of L1, as shares of the keys.",
            "type": "array",
            "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0.1],
        },
        "workers": {
            "description": "Worker processes, each with an L1 of its own and one L2 for all.",
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 16},
            "minItems": 1,
            "uniqueItems": True,
            "default": [1, 2],
        },
        "requests": {
            "description": "Requests of each worker.",
            "type": "integer",
            "minimum": 50,
            "default": 600,
        },
        "keys": {
            "description": "Different requests that a stream draws from.",
            "type": "integer",
            "minimum": 2,
            "default": 100,
        },
        "exponent": {
            "description": "Zipf exponent of the popularity of requests.",
            "type": "number",
            "minimum": 0,
            "maximum": 3,
            "default": 0.9,
        },
    },
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell per service time and number of workers; the configurations share it."""
    shared = ("l1_share", "requests", "keys", "exponent")
    return {
        f"service{service_ms}ms-workers{workers}": Cell(
            {
                "service_ms": service_ms,
                "workers": workers,
                **{name: options[name] for name in shared},
            }
        )
        for service_ms in options["service_ms"]
        for workers in options["workers"]
    }


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Send the same streams through every configuration and record which level answered."""
    if factors["workers"] > 1 and "fork" not in multiprocessing.get_all_start_methods():
        raise Unsupported("worker processes are forked, which this system cannot do")
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    with running(context.server_url, context.scratch) as server:
        for configuration in CONFIGURATIONS:
            has_l1 = configuration.startswith("l1")
            for share in factors["l1_share"] if has_l1 else [0.0]:
                name = f"{configuration}-{share}" if has_l1 else configuration
                results = _run_workers(configuration, share, name, factors, context, server)
                samples[name] = [
                    {"level": levels, "latency_s": latency_s} for levels, latency_s, _ in results
                ]
                rows.append(_row(configuration, share, factors, context.seed, results))
    return Outcome(rows, samples)


#: What a worker reports: the level and the time of every request, and its wrong answers.
_Result = tuple[list[int], list[float], int]


def _run_workers(
    configuration: str,
    share: float,
    name: str,
    factors: Mapping[str, Any],
    context: Context,
    server: Server,
) -> list[_Result]:
    capacity = max(1, round(share * factors["keys"])) if share else 0

    def work(worker: int) -> _Result:
        # Made inside the worker: connections and L1 belong to one process.
        client = server.client() if "l2" in configuration else None
        cache = None
        if configuration != "source":
            cache = LayeredCache(
                client,
                f"{server.namespace}{name}:",
                ttl_s=_TTL_S,
                l1_capacity=capacity,
                promote=configuration == "l1_l2_promotion",
            )
            cache.wait_until_coherent()
        try:
            return _drive(cache, _stream(factors, context.seed, worker), factors)
        finally:
            if cache is not None:
                cache.close()

    if factors["workers"] == 1:
        return [work(0)]
    return _in_processes(work, factors["workers"])


def _stream(factors: Mapping[str, Any], seed: int, worker: int) -> np.ndarray:
    """Workers draw from one popularity, independently."""
    return zipf(factors["requests"], factors["keys"], seed * 1000 + worker, factors["exponent"])


def _drive(cache: LayeredCache | None, stream: np.ndarray, factors: Mapping[str, Any]) -> _Result:
    service_s = factors["service_ms"] / 1000
    levels: list[int] = []
    latency_s: list[float] = []
    wrong = 0
    for number_of_key in stream if cache is not None else stream[:_UNCACHED_REQUESTS]:
        key = str(number_of_key)
        right = key.encode().ljust(_VALUE_BYTES, b".")

        def load(value: bytes = right) -> bytes:
            time.sleep(service_s)
            return value

        started = time.perf_counter()
        if cache is None:
            value, level = load(), 3
        else:
            found = cache.get(key, load)
            value, level = found.value, found.level
        latency_s.append(time.perf_counter() - started)
        levels.append(level)
        wrong += value != right
    return levels, latency_s, wrong


def _in_processes(work: Callable[[int], _Result], workers: int) -> list[_Result]:
    """Run ``work(0..workers-1)`` in forked processes; a worker that dies is an error here."""
    method = multiprocessing.get_context("fork")

    def report(worker: int, end: Connection) -> None:
        end.send(work(worker))

    started = []
    try:
        for worker in range(workers):
            here, there = method.Pipe(duplex=False)
            process = method.Process(target=report, args=(worker, there), daemon=True)
            process.start()
            there.close()
            started.append((process, here))
        # A dead worker closes its end, so that recv raises EOFError instead of waiting.
        return [here.recv() for _, here in started]
    finally:
        for process, here in started:
            here.close()
            process.join(timeout=5.0)
            if process.is_alive():
                process.kill()
                process.join()


def _row(
    configuration: str,
    share: float,
    factors: Mapping[str, Any],
    seed: int,
    results: list[_Result],
) -> dict[str, Any]:
    levels = np.concatenate([levels for levels, _, _ in results])
    latency_s = np.concatenate([latency_s for _, latency_s, _ in results])
    streams = [
        _stream(factors, seed, worker)[: len(levels)]
        for worker, (levels, _, _) in enumerate(results)
    ]
    count = len(levels)
    row: dict[str, Any] = {
        "configuration": configuration,
        "service_ms": factors["service_ms"],
        "workers": factors["workers"],
        "l1_share": share if share else math.nan,
        "requests": count,
        "unique_requests": len(np.unique(np.concatenate(streams))),
        "unique_per_worker": sum(len(np.unique(stream)) for stream in streams),
        "generations": int((levels == 3).sum()),
        "wrong_answers": sum(wrong for _, _, wrong in results),
        "mean_s": float(latency_s.mean()),
    }
    predicted = 0.0
    for level in (1, 2, 3):
        times = latency_s[levels == level]
        median, low, high = quantile(times, 0.5)
        row[f"l{level}_share_of_requests"] = len(times) / count
        row[f"l{level}_p50_s"] = median
        row[f"l{level}_p50_s_ci_low"] = low
        row[f"l{level}_p50_s_ci_high"] = high
        row[f"l{level}_p99_s"] = quantile(times, 0.99)[0]
        if len(times):
            predicted += len(times) / count * median
    row["mean_predicted_s"] = predicted
    half = 1.96 * float(latency_s.std(ddof=1)) / math.sqrt(count)
    row["mean_s_ci_low"], row["mean_s_ci_high"] = row["mean_s"] - half, row["mean_s"] + half
    # Every L1 hit would otherwise have been an L2 hit, at most.
    if row["l1_share_of_requests"] and row["l2_share_of_requests"]:
        row["l1_gain_limit_s"] = row["l1_share_of_requests"] * (row["l2_p50_s"] - row["l1_p50_s"])
    return row


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return means per configuration, times per level and what each level gains."""
    # The reference: fewest workers, slowest source, middle size of L1.
    named: dict[str, Value] = {}
    fewest = table[table["workers"] == table["workers"].min()]
    reference = fewest[fewest["service_ms"] == fewest["service_ms"].max()]
    sizes = sorted(reference["l1_share"].dropna().unique())
    size = sizes[len(sizes) // 2] if sizes else math.nan
    rows = {
        name: first(
            reference[
                (reference["configuration"] == name)
                & (reference["l1_share"].isna() | (reference["l1_share"] == size))
            ]
        )
        for name in CONFIGURATIONS
    }
    for name, row in rows.items():
        named[f"layered_{name}_mean_ms"] = milliseconds(row, "mean_s")
        for level in (1, 2, 3):
            named[f"layered_{name}_l{level}_share"] = number(
                row, f"l{level}_share_of_requests", "%", 1, 100
            )
    both = rows["l1_l2_promotion"]
    for level in (1, 2, 3):
        named[f"layered_l{level}_p50_ms"] = milliseconds(both, f"l{level}_p50_s", 4)
    named["layered_service_ms"] = number(both, "service_ms", "ms", 0)
    named["layered_l1_percent_of_keys"] = number(both, "l1_share", "%", 0, 100)
    named["layered_promotion_gain_limit_us"] = number(both, "l1_gain_limit_s", "us", 1, 1e6)
    named["layered_l1_l2_speedup"] = _ratio(rows["source"], both, "mean_s", "x")
    named["layered_l2_speedup"] = _ratio(rows["source"], rows["l2"], "mean_s", "x")
    named["layered_l1_speedup"] = _ratio(rows["source"], rows["l1"], "mean_s", "x")
    limit = named["layered_promotion_gain_limit_us"].value
    mean = named["layered_l2_mean_ms"].value
    named["layered_l1_gain_limit_percent"] = Value(
        limit / (mean * 10) if limit is not None and mean else None, unit="%", digits=2
    )
    cached = table[table["configuration"] != "source"]
    named["layered_mean_prediction_error"] = Value(
        None
        if cached.empty
        else float((cached["mean_predicted_s"] / cached["mean_s"] - 1).abs().max() * 100),
        unit="%",
        digits=1,
    )
    named["layered_wrong_answers"] = Value(
        None if cached.empty else int(cached["wrong_answers"].sum()), digits=0
    )
    shared = table[(table["workers"] > 1) & (table["service_ms"] == table["service_ms"].max())]
    most = shared[shared["workers"] == shared["workers"].max()]
    at_size = most[most["l1_share"].isna() | (most["l1_share"] == size)]
    named["layered_shared_workers"] = number(first(most), "workers", "", 0)
    for name in ("l1", "l2", "l1_l2_promotion"):
        row = first(at_size[at_size["configuration"] == name])
        named[f"layered_shared_{name}_generations"] = number(row, "generations", "", 0)
    named["layered_shared_unique"] = number(
        first(at_size[at_size["configuration"] == "l2"]), "unique_requests", "", 0
    )
    return named


def _ratio(
    above: Mapping[str, Any] | None, below: Mapping[str, Any] | None, column: str, unit: str
) -> Value:
    if above is None or below is None:
        return Value(None, unit=unit, digits=2)
    return Value(float(above[column] / below[column]), unit=unit, digits=2)


STUDY = Study(
    name="layered",
    question="What does a private memory in front of the shared cache server gain?",
    options=_OPTIONS,
    plan=plan,
    measure=measure,
    columns={
        "configuration": "source (no cache), l1, l2, both without and both with promotion",
        "service_ms": "fixed service time of the source, L3 (ms)",
        "workers": "worker processes, each with its own L1",
        "l1_share": "capacity of L1 as a share of the keys",
        "requests": "requests of all workers",
        "unique_requests": "different requests of all workers together",
        "unique_per_worker": "different requests of each worker, summed over workers",
        "generations": "requests that the source answered",
        "wrong_answers": "answers that belong to a different request",
        "mean_s": "mean time of a request (s)",
        "mean_s_ci_low": "lower end of the 95 % interval of the mean (s)",
        "mean_s_ci_high": "upper end of the 95 % interval of the mean (s)",
        "mean_predicted_s": "sum over levels of share times median (s)",
        **{
            column: meaning
            for level, what in ((1, "memory"), (2, "server"), (3, "source"))
            for column, meaning in {
                f"l{level}_share_of_requests": f"share of requests answered by L{level} ({what})",
                f"l{level}_p50_s": f"median time of those requests, L{level} (s)",
                f"l{level}_p50_s_ci_low": f"lower end of its 95 % interval, L{level} (s)",
                f"l{level}_p50_s_ci_high": f"upper end of its 95 % interval, L{level} (s)",
                f"l{level}_p99_s": f"99th percentile of those requests, L{level} (s)",
            }.items()
        },
        "l1_gain_limit_s": "share of L1 hits times what an L2 hit takes longer (s per request)",
    },
    values=values,
)
