"""What a broken cache server costs a request, what warming up buys, and how errors get stuck."""

from __future__ import annotations

import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import redis

from kvbench.caching.keys import Request, request_key
from kvbench.caching.resilience import (
    CircuitBreaker,
    GuardedBackend,
    black_hole,
    impatient,
    refused_port,
    slow_proxy,
)
from kvbench.caching.response_cache import Answer, MemoryBackend, RedisBackend, ResponseCache
from kvbench.caching.server import Server, running
from kvbench.caching.warmup import most_popular, preload
from kvbench.caching.workload import popularity, shift, zipf
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome
from kvbench.studies._estimates import summary

if TYPE_CHECKING:
    pass

#: Faults on which redis-py's defaults wait for seconds or a minute: one request is enough to see.
_ENDLESS = ("refused", "black_hole")
_NEGATIVE_TTL_S = 1.0
_TTL_S = 3600
_SECONDS_PER_REQUEST = 0.01


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run one cell; see :func:`plan`."""
    if factors["kind"] == "warm_up":
        return Outcome(_measure_warm_up(factors, context.seed))
    if factors["kind"] == "errors":
        return Outcome(_measure_errors(factors, context.seed))
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    with running(context.server_url, context.scratch) as server:
        if "out_of_memory" in factors["faults"] and not server.private:
            raise Unsupported(
                "fault out_of_memory changes the server's settings, and the configured server "
                "belongs to somebody else; remove the fault or app.server_url"
            )
        ended = _in_turn_or_together(factors, server, context)
        for fault in factors["faults"]:
            row, samples[fault] = ended[fault]
            rows.append(row)
    return Outcome(rows, samples)


def _in_turn_or_together(
    factors: Mapping[str, Any], server: Server, context: Context
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Try every fault, one after the other; those that only wait do so at the same time."""
    ended: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def attempt(fault: str) -> None:
        with _broken(fault, server, factors) as (connect, spoil):
            ended[fault] = _fallback(fault, factors, server, connect, spoil, context)

    waiting = [fault for fault in factors["faults"] if _endless(factors, fault)]
    with ThreadPoolExecutor(max(1, len(waiting))) as pool:
        pending = [pool.submit(attempt, fault) for fault in waiting]
        for one in pending:
            one.result()
    for fault in factors["faults"]:
        if fault not in waiting:
            attempt(fault)
    return ended


def _endless(factors: Mapping[str, Any], fault: str) -> bool:
    return factors["client"] == "default" and fault in _ENDLESS


#: Opens a client with options, and does damage to the entry of a key before it is asked for.
_Connect = Callable[..., redis.Redis]
_Spoil = Callable[[str], None]


@contextmanager
def _broken(
    fault: str, server: Server, factors: Mapping[str, Any]
) -> Iterator[tuple[_Connect, _Spoil]]:
    """Give a way to reach a server that has ``fault``, for as long as the block runs."""

    def at(port: int) -> _Connect:
        return lambda **options: server.client_at(port, **options)

    def nothing(_key: str) -> None:
        pass

    with closing(server.client()) as admin:
        if fault == "refused":
            with refused_port() as port:
                yield at(port), nothing
        elif fault == "black_hole":
            with black_hole() as port:
                yield at(port), nothing
        elif fault == "slow":
            with slow_proxy(lambda: _open(server), factors["slow_ms"] / 1000) as port:
                yield at(port), nothing
        elif fault == "out_of_memory":
            admin.config_set("maxmemory", 1)
            try:
                yield server.client, nothing
            finally:
                admin.config_set("maxmemory", 0)
        elif fault == "corrupt":
            yield server.client, lambda key: _flip_a_digit(admin, key)
        elif fault == "wrong_type":
            yield server.client, lambda key: _make_a_list(admin, key)
        else:
            yield server.client, nothing


def _open(server: Server) -> socket.socket:
    """Open a plain connection to the server, for the proxy in front of it."""
    kind, _, rest = server.address.partition(":")
    if kind == "unix":
        end = socket.socket(socket.AF_UNIX)
        end.connect(rest)
        return end
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5.0)


def _flip_a_digit(admin: redis.Redis, key: str) -> None:
    """Change the answer inside an entry so that it stays valid JSON and reads well."""
    stored = admin.get(key)
    if stored is not None:
        admin.set(key, stored.replace(b"answer is 4", b"answer is 5"), ex=_TTL_S)


def _make_a_list(admin: redis.Redis, key: str) -> None:
    """Put a list where a text is expected."""
    if admin.type(key) == b"string":
        # In one transaction: nothing without an expiry may stay behind, whenever this is killed.
        pipeline = admin.pipeline(transaction=True)
        pipeline.unlink(key).rpush(key, "not a text").expire(key, _TTL_S)
        pipeline.execute()


def _fallback(
    fault: str,
    factors: Mapping[str, Any],
    server: Server,
    connect: _Connect,
    spoil: _Spoil,
    context: Context,
) -> tuple[dict[str, Any], dict[str, Any]]:
    client_kind = factors["client"]
    service_s = factors["service_ms"] / 1000
    options = {} if client_kind == "default" else impatient(factors["timeout_ms"] / 1000)
    client = connect(**options)
    # The private server is shared by the faults, so each has a prefix of its own.
    namespace = f"{server.namespace}{fault}:"
    backend: Any = RedisBackend(client, namespace)
    if client_kind == "breaker":
        breaker = CircuitBreaker(factors["breaker_failures"], factors["breaker_reset_s"])
        backend = GuardedBackend(backend, breaker)
    cache = ResponseCache(backend, ttl_s=_TTL_S)
    endless = _endless(factors, fault)
    count = 1 if endless else factors["requests"]
    rng = random.Random(context.seed)
    asked = [rng.randrange(factors["keys"]) for _ in range(count)]
    added_s: list[float] = []
    outcome = {"wrong": 0, "hits": 0, "failed": 0}

    def source(request: Request) -> Answer:
        time.sleep(service_s)
        return Answer(_right(request))

    def ask_all() -> None:
        for key in asked:
            request = _question(key)
            spoil(namespace + request_key(request))
            served_s = 0.0

            def timed_source(request: Request) -> Answer:
                nonlocal served_s
                begun = time.perf_counter()
                answer = source(request)
                served_s = time.perf_counter() - begun
                return answer

            started = time.perf_counter()
            try:
                reply = cache.answer(request, timed_source)
            except Exception:
                # Whatever a broken cache lets through to the user is a failed request.
                outcome["failed"] += 1
            else:
                outcome["wrong"] += reply.answer.text != _right(request)
                outcome["hits"] += reply.hit
            added_s.append(time.perf_counter() - started - served_s)

    # In a thread, because a client without a timeout cannot be called back from where it waits.
    worker = threading.Thread(target=ask_all, daemon=True)
    begun = time.perf_counter()
    worker.start()
    worker.join(None if not endless else factors["give_up_s"])
    blocked = worker.is_alive()
    waited_s = time.perf_counter() - begun
    seen = [*added_s, waited_s] if blocked else list(added_s)
    answered = len(added_s) - outcome["failed"]
    with suppress(redis.RedisError, OSError):
        client.close()
    row = {
        "kind": "fallback",
        "fault": fault,
        "client": client_kind,
        "requests": count,
        "answered": answered,
        # A request that was not waited for is neither answered nor failed.
        "success_rate": math.nan if blocked else answered / count,
        "wrong_answers": outcome["wrong"],
        "hits": outcome["hits"],
        "corrupt_entries_refused": cache.stats.corrupt,
        "backend_errors": cache.stats.backend_errors,
        "blocked": blocked,
        **summary(seen, "added"),
        "added_max_s": max(seen),
    }
    return row, {"added_s": seen, "blocked": blocked}


def _question(key: int) -> Request:
    return Request("fixed-service-time", f"question {key}", parameters={"temperature": 0})


def _right(request: Request) -> str:
    return f"The answer is 42 to {request.prompt}."


def _measure_warm_up(factors: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Preload yesterday's most asked before a day whose popularity is the same or dealt anew."""
    day, keys = factors["warm_requests"], factors["warm_keys"]
    window = min(factors["warm_window"], day)
    chances = popularity(keys, factors["exponent"])
    rows = []
    for today in ("same", "shifted"):
        for share in factors["preload_shares"]:
            runs = []
            for number_of_run in range(factors["seeds"]):
                # Two days back to back: the first is the log, the second the test.
                base = seed * 1000 + number_of_run
                draw = zipf if today == "same" else shift
                phases = {} if today == "same" else {"phases": 2}
                both = draw(2 * day, keys, base, factors["exponent"], **phases)
                runs.append(_one_day(both[:day], both[day:], round(share * keys), window))
            count = round(share * keys)
            # Each preloaded key saves its one first miss, if it is asked at all in the window.
            expected = float((1 - (1 - chances[:count]) ** window).sum())
            rows.append(
                {
                    "kind": "warm_up",
                    "popularity": today,
                    "preload_share": share,
                    "requests": day,
                    "window": window,
                    **{
                        name: float(np.mean([run[name] for run in runs]))
                        for name in (
                            "unique_requests",
                            "preloaded",
                            "generations",
                            "hit_ratio_window",
                            "hit_ratio",
                            "lost_hits",
                        )
                    },
                    "hits_window_min": min(run["hits_window"] for run in runs),
                    "hits_window_max": max(run["hits_window"] for run in runs),
                    "saved_hits_limit": expected if today == "same" else np.nan,
                }
            )
    return rows


def _one_day(
    yesterday: np.ndarray, today: np.ndarray, preload_count: int, window: int
) -> dict[str, float]:
    calls = 0

    def source(request: Request) -> Answer:
        nonlocal calls
        calls += 1
        return Answer(_right(request))

    cache = ResponseCache(MemoryBackend(10_000_000))
    chosen = [int(key) for key in most_popular(yesterday.tolist(), preload_count)]
    preloaded = preload(cache, map(_question, chosen), source)
    hits = [cache.answer(_question(int(key)), source).hit for key in today]
    # The last quarter of the day stands for the steady state.
    steady = float(np.mean(hits[-len(hits) // 4 :]))
    return {
        "unique_requests": len(np.unique(today)),
        "preloaded": preloaded,
        "generations": calls,
        "hits_window": sum(hits[:window]),
        "hit_ratio_window": float(np.mean(hits[:window])),
        "hit_ratio": float(np.mean(hits)),
        "lost_hits": steady * len(hits) - sum(hits),
    }


def _measure_errors(factors: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Let the source fail now and then, under three rules of what may be stored."""
    stream = zipf(factors["error_requests"], factors["warm_keys"], seed, factors["exponent"])
    rows = []
    for rate in factors["error_rates"]:
        for policy in factors["error_policies"]:
            now = 0.0
            dice = random.Random(seed)
            calls = errors = 0

            def source(request: Request) -> Answer:
                nonlocal calls, errors
                calls += 1
                # One draw per call, whatever the policy: the same calls fail everywhere.
                if dice.random() < rate:  # noqa: B023
                    errors += 1
                    return Answer("", finish_reason="error")
                return Answer(_right(request))

            cache = ResponseCache(
                MemoryBackend(1_000_000, clock=lambda: now),  # noqa: B023
                accept=(lambda _: True) if policy == "cache_all" else _is_no_error,
                negative_ttl_s=_NEGATIVE_TTL_S if policy == "negative_ttl" else None,
            )
            served = from_cache = 0
            for key in stream:
                reply = cache.answer(_question(int(key)), source)
                failed = reply.answer.finish_reason == "error"
                served += failed
                from_cache += failed and reply.hit
                now += _SECONDS_PER_REQUEST
            rows.append(
                {
                    "kind": "errors",
                    "policy": policy,
                    "error_rate": rate,
                    "requests": len(stream),
                    "generations": calls,
                    "source_errors": errors,
                    "errors_served": served,
                    "errors_from_cache": from_cache,
                }
            )
    return rows


def _is_no_error(answer: Answer) -> bool:
    return answer.finish_reason != "error"
