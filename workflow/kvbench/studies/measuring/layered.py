"""What a private first level in front of a shared cache server gains, level by level."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from kvbench.caching.layered import Found, LayeredCache
from kvbench.caching.server import Server, ServerRefused, running
from kvbench.caching.workload import zipf
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome
from kvbench.studies._estimates import mean_interval, quantile
from kvbench.studies.measuring._rounds import SPARE, Log, with_controls

_TTL_S = 3600.0
_VALUE_BYTES = 2048
_WARM_UP = 3


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Send the same streams through every configuration, in rounds; each run begins empty."""
    if factors["workers"] > 1 and "fork" not in multiprocessing.get_all_start_methods():
        raise Unsupported("worker processes are forked, which this system cannot do")
    arms = {
        f"{configuration}-{share}" if share else configuration: (configuration, share)
        for configuration in factors["configurations"]
        for share in (factors["l1_share"] if configuration in _SIZED else [0.0])
    }
    runs: dict[str, list[_Result]] = {arm: [] for arm in arms}
    log, doing = Log(context.known), with_controls(arms, *_REFERENCES)
    with running(context.server_url, context.scratch) as server:
        rounds = factors["rounds"]
        for number, arm in log.turns(doing, rounds, context.seed, spare=rounds // SPARE):
            configuration, share = arms[doing[arm]]
            results = _run_workers(
                configuration, share, f"{arm}-{number}", factors, context.seed + number, server
            )
            if arm in arms:
                runs[arm] += results
            taken = [second for _, latency_s, _, _ in results for second in latency_s]
            levels = [level for found, _, _, _ in results for level in found]
            log.add(
                arm,
                number,
                seconds=float(np.mean(taken)),
                limit=len(levels) / max(1, levels.count(3)),
                level=levels,
                latency_s=taken,
            )
    rows = [
        _row(configuration, share, factors, runs[arm], log.of(arm, "seconds"))
        for arm, (configuration, share) in arms.items()
    ]
    return Outcome(rows, {"arms": log.arms()})


#: Configurations that others are compared with.
_REFERENCES = ("source", "l2")

#: Configurations whose L1 has the size of option ``l1_share``.
_SIZED = ("l1", "l1_l2", "l1_l2_promotion")

#: What a worker reports: level and time of every request, wrong answers, and its stream.
_Result = tuple[list[int], list[float], int, list[int]]


class GuideLayers:
    """The caching guide's layers: a dict that gives up its oldest entry, then a server.

    What was found on the server is copied into the dict. Nothing keeps the dict honest: it has no
    expiry, and no other worker's change reaches it.
    """

    def __init__(self, client: Any, namespace: str, entries: int) -> None:
        self._client, self._namespace, self._entries = client, namespace, entries
        self._memory: dict[str, bytes] = {}

    def get(self, key: str, load: Callable[[], bytes]) -> Found:
        """Return the value from the dict, the server, or the source."""
        if key in self._memory:
            return Found(self._memory[key], 1)
        level: Any = 2
        value = self._client.get(self._namespace + key)
        if value is None:
            value, level = load(), 3
            self._client.set(self._namespace + key, value, ex=round(_TTL_S))
        if len(self._memory) >= self._entries:
            del self._memory[next(iter(self._memory))]
        self._memory[key] = value
        return Found(value, level)


def _run_workers(
    configuration: str,
    share: float,
    name: str,
    factors: Mapping[str, Any],
    seed: int,
    server: Server,
) -> list[_Result]:
    capacity = max(1, round(share * factors["keys"])) if share else 0

    def work(worker: int) -> _Result:
        # Made inside the worker: connections and L1 belong to one process.
        prefix = f"{server.namespace}{name}:"
        stream = _stream(factors, seed, worker)
        if configuration == "source":
            return _drive(None, stream[: factors["uncached_requests"]], factors)
        client = server.client() if configuration != "l1" else None
        if configuration == "guide":
            return _drive(GuideLayers(client, prefix, factors["guide_entries"]), stream, factors)
        cache = LayeredCache(
            client,
            prefix,
            ttl_s=_TTL_S,
            l1_capacity=capacity,
            promote=configuration == "l1_l2_promotion",
        )
        try:
            if not cache.wait_until_coherent():
                raise ServerRefused("the cache server publishes no invalidations")
            result = _drive(cache, stream, factors)
            # The cache serves on without its server; a measurement of it must not.
            if cache.last_failure is not None:
                raise ServerRefused(f"the cache server failed: {cache.last_failure}")
            return result
        finally:
            cache.close()

    if factors["workers"] == 1:
        return [work(0)]
    return _in_processes(work, factors["workers"])


def _stream(factors: Mapping[str, Any], seed: int, worker: int) -> np.ndarray:
    """Workers draw from one popularity, independently."""
    return zipf(factors["requests"], factors["keys"], seed * 1000 + worker, factors["exponent"])


def _drive(
    cache: LayeredCache | GuideLayers | None, stream: np.ndarray, factors: Mapping[str, Any]
) -> _Result:
    service_s = factors["service_ms"] / 1000
    # The first waits of a process just forked are longer than any later one.
    for _ in range(_WARM_UP):
        time.sleep(service_s)
    levels: list[int] = []
    latency_s: list[float] = []
    wrong = 0
    for number_of_key in stream:
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
    return levels, latency_s, wrong, stream.tolist()


def _in_processes(work: Callable[[int], _Result], workers: int) -> list[_Result]:
    """Run ``work(0..workers-1)`` in forked processes; a worker that dies is an error here."""
    method = multiprocessing.get_context("fork")

    def report(worker: int, end: Connection) -> None:
        try:
            end.send(work(worker))
        except Exception as error:
            end.send(error)

    started = []
    try:
        for worker in range(workers):
            here, there = method.Pipe(duplex=False)
            process = method.Process(target=report, args=(worker, there), daemon=True)
            process.start()
            there.close()
            started.append((process, here))
        # A dead worker closes its end, so that recv raises EOFError instead of waiting.
        results = [here.recv() for _, here in started]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results
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
    results: list[_Result],
    means_s: list[float],
) -> dict[str, Any]:
    """Pool the runs of one configuration; a round has as many results as there are workers."""
    levels = np.concatenate([levels for levels, _, _, _ in results])
    latency_s = np.concatenate([latency_s for _, latency_s, _, _ in results])
    workers = factors["workers"]
    together = [results[first : first + workers] for first in range(0, len(results), workers)]
    count = len(levels)
    mean, ends = mean_interval(means_s)
    row: dict[str, Any] = {
        "configuration": configuration,
        "service_ms": factors["service_ms"],
        "workers": workers,
        "l1_share": share if share else math.nan,
        "rounds": len(together),
        "requests": count,
        "unique_requests": sum(
            len(set().union(*(stream for _, _, _, stream in run))) for run in together
        ),
        "unique_per_worker": sum(len(set(stream)) for _, _, _, stream in results),
        "generations": int((levels == 3).sum()),
        "wrong_answers": sum(wrong for _, _, wrong, _ in results),
        "mean_s": mean,
    }
    if ends is not None:
        row["mean_s_ci_low"], row["mean_s_ci_high"] = ends
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
    # Every L1 hit would otherwise have been an L2 hit, at most.
    if row["l1_share_of_requests"] and row["l2_share_of_requests"]:
        row["l1_gain_limit_s"] = row["l1_share_of_requests"] * (row["l2_p50_s"] - row["l1_p50_s"])
    return row
