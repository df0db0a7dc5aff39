"""What a private first level in front of a shared cache server gains, level by level."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from kvbench.caching.layered import LayeredCache
from kvbench.caching.server import Server, running
from kvbench.caching.workload import zipf
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome
from kvbench.studies._estimates import quantile

#: Requests of the run without a cache: each takes the service time, and nothing else varies.
_UNCACHED_REQUESTS = 100
_TTL_S = 3600.0
_VALUE_BYTES = 2048


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Send the same streams through every configuration and record which level answered."""
    if factors["workers"] > 1 and "fork" not in multiprocessing.get_all_start_methods():
        raise Unsupported("worker processes are forked, which this system cannot do")
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    with running(context.server_url, context.scratch) as server:
        for configuration in factors["configurations"]:
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
