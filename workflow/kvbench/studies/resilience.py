"""What a broken cache server costs a request, what warming up buys, and how errors get stuck."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study
from kvbench.studies._latency import first, milliseconds, number, summary, summary_columns

if TYPE_CHECKING:
    import pandas as pd

FAULTS = ("up", "refused", "black_hole", "out_of_memory", "corrupt", "wrong_type", "slow")
CLIENTS = ("default", "short_timeout", "breaker")
ERROR_POLICIES = ("cache_all", "skip_errors", "negative_ttl")

#: Faults on which redis-py's defaults wait for seconds or for ever: one request is enough to see.
_ENDLESS = ("refused", "black_hole")
_NEGATIVE_TTL_S = 1.0
_SECONDS_PER_REQUEST = 0.01

_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "faults": {
            "description": "What is wrong with the cache server.",
            "type": "array",
            "items": {"enum": list(FAULTS)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(FAULTS),
        },
        "clients": {
            "description": "redis-py as it comes, with short timeouts, or with a breaker as well.",
            "type": "array",
            "items": {"enum": list(CLIENTS)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(CLIENTS),
        },
        "requests": {
            "description": "Requests per fault and client.",
            "type": "integer",
            "minimum": 5,
            "default": 20,
        },
        "keys": {
            "description": "Different requests among them.",
            "type": "integer",
            "minimum": 1,
            "default": 5,
        },
        "service_ms": {
            "description": "Fixed service time of the source, in ms; not a model.",
            "type": "number",
            "minimum": 0.1,
            "default": 5,
        },
        "timeout_ms": {
            "description": "Timeout of the clients that have a short one, in ms.",
            "type": "number",
            "minimum": 1,
            "default": 50,
        },
        "slow_ms": {
            "description": "Delay of each answer of the slow server, in ms.",
            "type": "number",
            "minimum": 1,
            "default": 100,
        },
        "breaker_failures": {
            "description": "Failures in a row that open the breaker.",
            "type": "integer",
            "minimum": 1,
            "default": 3,
        },
        "breaker_reset_s": {
            "description": "Seconds after which an open breaker lets one call through.",
            "type": "number",
            "exclusiveMinimum": 0,
            "default": 5,
        },
        "give_up_s": {
            "description": "Seconds after which a client that still waits is recorded as blocked.",
            "type": "number",
            "minimum": 0.5,
            "maximum": 120,
            "default": 2,
        },
        "preload_shares": {
            "description": "Shares of the keys, most popular first, generated before the start.",
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0, 0.01, 0.05, 0.2],
        },
        "warm_requests": {
            "description": "Requests of a day in the test of warming up.",
            "type": "integer",
            "minimum": 500,
            "default": 2000,
        },
        "warm_keys": {
            "description": "Different requests that a day draws from.",
            "type": "integer",
            "minimum": 10,
            "default": 500,
        },
        "warm_window": {
            "description": "Requests at the start of the day in which the hit ratio is reported.",
            "type": "integer",
            "minimum": 50,
            "default": 500,
        },
        "exponent": {
            "description": "Zipf exponent of the popularity in the tests of warming up and errors.",
            "type": "number",
            "minimum": 0,
            "maximum": 3,
            "default": 0.9,
        },
        "seeds": {
            "description": "Days that the test of warming up averages over.",
            "type": "integer",
            "minimum": 2,
            "default": 3,
        },
        "error_rates": {
            "description": "Shares of generations that fail in the test of errors.",
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0, 0.05, 0.2],
        },
        "error_requests": {
            "description": "Requests in the test of errors.",
            "type": "integer",
            "minimum": 100,
            "default": 2000,
        },
    },
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell per client, and one untimed cell each for warming up and for errors."""
    fallback = (
        "faults",
        "requests",
        "keys",
        "service_ms",
        "timeout_ms",
        "slow_ms",
        "breaker_failures",
        "breaker_reset_s",
        "give_up_s",
    )
    warm = ("preload_shares", "warm_requests", "warm_keys", "warm_window", "exponent", "seeds")
    errors = ("error_rates", "error_requests", "warm_keys", "exponent")
    cells = {
        f"fallback-{client}": Cell(
            {"kind": "fallback", "client": client, **{name: options[name] for name in fallback}}
        )
        for client in options["clients"]
    }
    cells["warm-up"] = Cell(
        {"kind": "warm_up", **{name: options[name] for name in warm}}, timed=False
    )
    cells["errors"] = Cell(
        {"kind": "errors", **{name: options[name] for name in errors}}, timed=False
    )
    return cells


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
        for fault in factors["faults"]:
            with _broken(fault, server, factors) as (connect, spoil):
                row, samples[fault] = _fallback(fault, factors, server, connect, spoil, context)
            rows.append(row)
    return Outcome(rows, samples)


#: Opens a client with options, and does damage to the entry of a key before it is asked for.
_Connect = Callable[..., redis.Redis]
_Spoil = Callable[[str], None]


@contextmanager
def _broken(
    fault: str, server: Server, factors: Mapping[str, Any]
) -> Iterator[tuple[_Connect, _Spoil]]:
    """Give a way to reach a server that has ``fault``, for as long as the block runs."""

    def at(port: int) -> _Connect:
        return lambda **options: redis.Redis(host="127.0.0.1", port=port, protocol=2, **options)

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
        admin.set(key, stored.replace(b"answer is 4", b"answer is 5"))


def _make_a_list(admin: redis.Redis, key: str) -> None:
    """Put a list where a text is expected."""
    if admin.type(key) == b"string":
        admin.unlink(key)
        admin.rpush(key, "not a text")


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
    cache = ResponseCache(backend)
    endless = client_kind == "default" and fault in _ENDLESS
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
        "success_rate": answered / count,
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
        for policy in ERROR_POLICIES:
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


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return added latencies per fault and client, the gain of warming up, and stuck errors."""
    named: dict[str, Value] = {}
    fallback = table[table["kind"] == "fallback"]
    for client in CLIENTS:
        of_client = fallback[fallback["client"] == client]
        for fault in FAULTS:
            row = first(of_client[of_client["fault"] == fault])
            prefix = f"resilience_{client}_{fault}"
            named[f"{prefix}_added_p50_ms"] = milliseconds(row, "added_p50_s", 2)
            named[f"{prefix}_added_max_ms"] = number(row, "added_max_s", "ms", 1, 1000)
            named[f"{prefix}_success"] = number(row, "success_rate", "%", 0, 100)
            named[f"{prefix}_blocked"] = Value(None if row is None else bool(row["blocked"]))
        # Requests that were answered wrongly or not at all, over all faults.
        named[f"resilience_{client}_success_min"] = Value(
            None if of_client.empty else float(of_client["success_rate"].min() * 100),
            unit="%",
            digits=0,
        )
        named[f"resilience_{client}_wrong"] = Value(
            None if of_client.empty else int(of_client["wrong_answers"].sum()), digits=0
        )
    corrupt = fallback[fallback["fault"] == "corrupt"]
    named["resilience_corrupt_refused"] = Value(
        None if corrupt.empty else int(corrupt["corrupt_entries_refused"].sum()), digits=0
    )

    warm = table[table["kind"] == "warm_up"]
    most = warm[warm["preload_share"] == warm["preload_share"].max()]
    for today in ("same", "shifted"):
        row = first(most[most["popularity"] == today])
        cold = first(warm[(warm["popularity"] == today) & (warm["preload_share"] == 0)])
        named[f"resilience_warm_{today}_hit_ratio"] = number(row, "hit_ratio_window", "%", 1, 100)
        named[f"resilience_cold_{today}_hit_ratio"] = number(cold, "hit_ratio_window", "%", 1, 100)
        named[f"resilience_warm_{today}_generations"] = number(row, "generations", "", 0)
        named[f"resilience_cold_{today}_generations"] = number(cold, "generations", "", 0)
    named["resilience_preload_percent"] = number(first(most), "preload_share", "%", 0, 100)
    named["resilience_window"] = number(first(most), "window", "", 0)

    errors = table[table["kind"] == "errors"]
    worst = errors[errors["error_rate"] == errors["error_rate"].max()]
    named["resilience_error_rate"] = number(first(worst), "error_rate", "%", 0, 100)
    named["resilience_error_requests"] = number(first(worst), "requests", "", 0)
    for policy in ERROR_POLICIES:
        row = first(worst[worst["policy"] == policy])
        named[f"resilience_{policy}_errors_served"] = number(row, "errors_served", "", 0)
        named[f"resilience_{policy}_errors_from_cache"] = number(row, "errors_from_cache", "", 0)
        named[f"resilience_{policy}_source_errors"] = number(row, "source_errors", "", 0)
    return named


STUDY = Study(
    name="resilience",
    question="What does a request cost when the cache server is broken, cold or full of errors?",
    options=_OPTIONS,
    plan=plan,
    measure=measure,
    columns={
        "kind": "fallback (a broken server), warm_up (preloading) or errors (failing source)",
        "fault": "what is wrong with the server",
        "client": "redis-py as it comes, with short timeouts, or with a circuit breaker as well",
        "requests": "requests sent",
        "answered": "requests that got an answer before the study gave up",
        "success_rate": "answered per request",
        "wrong_answers": "answers that belong to a different request or are damaged",
        "hits": "requests answered from the cache",
        "corrupt_entries_refused": "entries of wrong checksum, key or type, treated as misses",
        "backend_errors": "calls of the server that failed",
        "blocked": "whether a request still waited when the study gave up on it",
        **summary_columns("added", "time of a request beyond the service time"),
        "added_max_s": "longest time of a request beyond the service time (s)",
        "popularity": "whether today asks like yesterday (same) or not at all (shifted)",
        "preload_share": "share of the keys generated before the day begins",
        "window": "requests at the start of the day that the window columns count",
        "unique_requests": "different requests of the day, mean over days",
        "preloaded": "answers generated before the day, mean over days",
        "generations": "calls of the source, preloading included",
        "hit_ratio_window": "hits per request in the window, mean over days",
        "hit_ratio": "hits per request over the whole day, mean over days",
        "lost_hits": "hits fewer than if the whole day were like its last quarter, mean over days",
        "hits_window_min": "fewest hits in the window over the days",
        "hits_window_max": "most hits in the window over the days",
        "saved_hits_limit": "expected first misses that preloading the true top could save",
        "policy": "which answers are stored: all, no errors, or errors for one second",
        "error_rate": "share of the source's calls that fail",
        "source_errors": "calls of the source that failed",
        "errors_served": "errors that users got",
        "errors_from_cache": "errors that users got from the cache",
    },
    values=values,
)
