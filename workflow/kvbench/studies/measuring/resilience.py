"""What a broken cache server costs a request, what warming up buys, and how errors get stuck."""

from __future__ import annotations

import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

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
from kvbench.studies.measuring._rounds import SPARE, Log, with_controls

#: Faults on which redis-py's defaults wait for seconds or a minute: one request is enough to see.
_ENDLESS = ("refused", "black_hole")
_NEGATIVE_TTL_S = 1.0
_TTL_S = 3600
#: The client that the others are compared with.
_REFERENCE = "short_timeout"
_SECONDS_PER_REQUEST = 0.01


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run one cell; see :func:`plan`."""
    if factors["kind"] == "warm_up":
        return Outcome(_measure_warm_up(factors, context.seed))
    if factors["kind"] == "errors":
        return Outcome(_measure_errors(factors, context.seed))
    with running(context.server_url, context.scratch) as server:
        if "out_of_memory" in factors["faults"] and not server.private:
            raise Unsupported(
                "fault out_of_memory changes the server's settings, and the configured server "
                "belongs to somebody else; remove the fault or app.server_url"
            )
        return _measure_fallback(factors, server, context)


def _measure_fallback(factors: Mapping[str, Any], server: Server, context: Context) -> Outcome:
    """Try every fault with all clients in rounds; who only waits does so meanwhile.

    A client that waits for seconds is asked once and compared with nobody. It sleeps or hangs on a
    socket the while, so that it takes nothing from the others.
    """
    pairs = [(fault, client) for fault in factors["faults"] for client in factors["clients"]]
    waiting = [(fault, client) for fault, client in pairs if _endless(fault, client)]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    log = Log(context.known)
    _use_once(factors, server)
    with ThreadPoolExecutor(max(1, len(waiting))) as pool:
        pending = {
            (fault, client): pool.submit(_waits, fault, client, factors, server)
            for fault, client in waiting
        }
        for fault in factors["faults"]:
            clients = [name for name in factors["clients"] if not _endless(fault, name)]
            rows |= _in_rounds(fault, clients, factors, server, context.seed, log)
        waits = {_arm(fault, client): one.result() for (fault, client), one in pending.items()}
    for fault, client in waiting:
        rows[fault, client] = waits[_arm(fault, client)].pop("row")
    return Outcome([rows[pair] for pair in pairs], {"arms": log.arms(), "waits": waits})


def _use_once(factors: Mapping[str, Any], server: Server) -> None:
    """Ask once for nobody: what a library does at its first use is no client's time."""
    with _broken("up", server, factors) as reach:
        asker = _Asker("up", "nobody", factors, server, reach)
        asker.ask(0)
        asker.close()


def _endless(fault: str, client: str) -> bool:
    return client == "default" and fault in _ENDLESS


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


class _Asker:
    """One client before a server that has a fault, with a cache and a place of its own."""

    def __init__(
        self,
        fault: str,
        kind: str,
        factors: Mapping[str, Any],
        server: Server,
        reach: tuple[_Connect, _Spoil],
        place: str | None = None,
    ) -> None:
        connect, self._spoil = reach
        options = {} if kind == "default" else impatient(factors["timeout_ms"] / 1000)
        self._client = connect(**options)
        # The server is shared by faults and clients, so each of them has a prefix of its own.
        self._namespace = f"{server.namespace}{fault}:{place or kind}:"
        backend: Any = RedisBackend(self._client, self._namespace)
        self._breaker: CircuitBreaker | None = None
        if kind == "breaker":
            self._breaker = CircuitBreaker(factors["breaker_failures"], factors["breaker_reset_s"])
            backend = GuardedBackend(backend, self._breaker)
        self._cache = ResponseCache(backend, ttl_s=_TTL_S)
        self._service_s = factors["service_ms"] / 1000
        self.wrong = self.failed = 0

    def ask(self, key: int) -> dict[str, Any]:
        """Ask once; return the seconds beyond the service time, and what became of the request.

        ``met`` is ``hit``, ``miss``, ``error`` (the server failed), ``open`` (the breaker let nothing
        through) or ``failed`` (the user got no answer).
        """
        request = _question(key)
        self._spoil(self._namespace + request_key(request))
        served_s = 0.0

        def source(request: Request) -> Answer:
            nonlocal served_s
            begun = time.perf_counter()
            time.sleep(self._service_s)
            served_s = time.perf_counter() - begun
            return Answer(_right(request))

        errors = self._cache.stats.backend_errors
        met = "open" if self._breaker is not None and self._breaker.is_open else "error"
        started = time.perf_counter()
        try:
            reply = self._cache.answer(request, source)
        except Exception:
            # Whatever a broken cache lets through to the user is a failed request.
            added_s = time.perf_counter() - started - served_s
            self.failed += 1
            return {"added_s": added_s, "met": "failed"}
        added_s = time.perf_counter() - started - served_s
        self.wrong += reply.answer.text != _right(request)
        if self._cache.stats.backend_errors == errors:
            met = "hit" if reply.hit else "miss"
        return {"added_s": added_s, "met": met}

    def row(self, added_s: Sequence[float], met: Sequence[str]) -> dict[str, Any]:
        """What the table says of these requests, all of which were waited for."""
        answered = len(met) - self.failed
        return {
            "requests": len(met),
            "answered": answered,
            "success_rate": answered / len(met),
            "wrong_answers": self.wrong,
            "hits": met.count("hit"),
            "corrupt_entries_refused": self._cache.stats.corrupt,
            "backend_errors": self._cache.stats.backend_errors,
            "blocked": False,
            **summary(added_s, "added"),
            "added_max_s": max(added_s),
        }

    def close(self) -> None:
        """Close the client, also one that still waits."""
        with suppress(redis.RedisError, OSError):
            self._client.close()


def _in_rounds(
    fault: str,
    clients: Sequence[str],
    factors: Mapping[str, Any],
    server: Server,
    seed: int,
    log: Log,
) -> dict[tuple[str, str], dict[str, Any]]:
    """Ask the same request of every client in each round; return a row for each."""
    rng = random.Random(seed)
    rounds = factors["requests"]
    keys = [rng.randrange(factors["keys"]) for _ in range(rounds + rounds // SPARE)]
    with ExitStack() as held:
        reach = held.enter_context(_broken(fault, server, factors))
        arms = with_controls(clients, *([_REFERENCE] if len(clients) > 1 else []))
        askers = {
            name: _Asker(fault, kind, factors, server, reach, place=name)
            for name, kind in arms.items()
        }
        for asker in askers.values():
            held.callback(asker.close)
        named = {_arm(fault, name): asker for name, asker in askers.items()}
        for number, name in log.turns(named, rounds, seed, spare=rounds // SPARE):
            log.add(name, number, **named[name].ask(keys[number]))
        rows = {}
        for kind in clients:
            added_s, met = (log.of(_arm(fault, kind), name) for name in ("added_s", "met"))
            rows[fault, kind] = _identity(fault, kind) | askers[kind].row(added_s, met)
        return rows


def _waits(fault: str, kind: str, factors: Mapping[str, Any], server: Server) -> dict[str, Any]:
    """Ask once and give up after a while; return the row, and what its samples are."""
    with _broken(fault, server, factors) as reach:
        asker = _Asker(fault, kind, factors, server, reach)
        ended: list[dict[str, Any]] = []
        # In a thread, because a client without a timeout cannot be called back from where it waits.
        worker = threading.Thread(target=lambda: ended.append(asker.ask(0)), daemon=True)
        begun = time.perf_counter()
        worker.start()
        worker.join(factors["give_up_s"])
        waited_s = time.perf_counter() - begun
        # Looked at before the client is closed, which ends the wait of one that still hangs.
        blocked = not ended
        one = {"added_s": waited_s, "met": "waits"} if blocked else ended[0]
        asker.close()
    row = _identity(fault, kind) | asker.row([one["added_s"]], [one["met"]])
    if blocked:
        # A request that was not waited for is neither answered nor failed.
        row |= {"blocked": True, "answered": 0, "success_rate": math.nan}
    return {"added_s": [one["added_s"]], "blocked": blocked, "row": row}


def _arm(fault: str, kind: str) -> str:
    """The name of a client's turns under a fault; that of a control is the control of one."""
    return f"{kind}-{fault}"


def _identity(fault: str, kind: str) -> dict[str, str]:
    return {"kind": "fallback", "fault": fault, "client": kind}


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
