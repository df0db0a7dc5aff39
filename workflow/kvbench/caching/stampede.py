"""Ways to load one expensive value when many threads want it at once.

Every protection is a function from nothing to the value, made from the same three things: a
``load`` that is slow, the life ``ttl_s`` of what it returned, and (for those that need one) a
cache server. What they promise differs: see ``PROTECTIONS``.
"""

from __future__ import annotations

import functools
import json
import math
import random
import secrets
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

import cachetools
import redis

Load = Callable[[], Any]

_KEY = "value"

#: Deletes a lock only if it is still held by whoever asks.
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end"


class SingleFlight:
    """One running call per key; whoever asks meanwhile waits for its result.

    Nothing is stored: the next call after the end runs again. An exception reaches all waiters.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future] = {}

    def do(self, key: Hashable, action: Load) -> Any:
        """Return ``action()``, or the result of the same key's call that is already running."""
        with self._lock:
            future = self._running.get(key)
            leader = future is None
            if leader:
                future = self._running[key] = Future()
        if not leader:
            return future.result()
        try:
            result = action()
        except BaseException as error:
            with self._lock:
                del self._running[key]
            future.set_exception(error)
            raise
        # Off the list before the waiters wake, so that none of them meets a finished flight.
        with self._lock:
            del self._running[key]
        future.set_result(result)
        return result


class _Slot:
    """One cached value with its expiry and the time its load took; empty until set."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.entry: tuple[Any, float, float] | None = None  # value, expiry, load time

    def set(self, value: Any, took_s: float) -> Any:
        self.entry = (value, time.monotonic() + self.ttl_s, took_s)
        return value

    def load(self, load: Load) -> Any:
        started = time.monotonic()
        value = load()
        return self.set(value, time.monotonic() - started)

    def fresh(self) -> tuple[Any, float, float] | None:
        entry = self.entry
        return entry if entry is not None and time.monotonic() < entry[1] else None


def unprotected(load: Load, ttl_s: float) -> Load:
    """Check, then load, then store: between check and store everybody loads."""
    slot = _Slot(ttl_s)

    def get() -> Any:
        entry = slot.fresh()
        return slot.load(load) if entry is None else entry[0]

    return get


def lru_cache(load: Load, ttl_s: float) -> Load:
    """``functools.lru_cache``: its lock guards the dictionary, not the call.

    It has no expiry, so the period number is made an argument, as its users do.
    """
    cached = functools.lru_cache(maxsize=2)(lambda _period: load())
    return lambda: cached(math.floor(time.monotonic() / ttl_s))


def cachetools_lock(load: Load, ttl_s: float) -> Load:
    """``cachetools.cached(lock=...)``: the lock is let go during the call."""
    cache = cachetools.TTLCache(maxsize=1, ttl=ttl_s)
    return cachetools.cached(cache, key=lambda: _KEY, lock=threading.Lock())(load)


def cachetools_condition(load: Load, ttl_s: float) -> Load:
    """``cachetools.cached(condition=...)``: others wait until the running call has stored."""
    cache = cachetools.TTLCache(maxsize=1, ttl=ttl_s)
    return cachetools.cached(cache, key=lambda: _KEY, condition=threading.Condition())(load)


def single_flight(load: Load, ttl_s: float) -> Load:
    """A stored value in front of a :class:`SingleFlight`: one load per expiry."""
    slot = _Slot(ttl_s)
    flights = SingleFlight()

    def refresh() -> Any:
        # Somebody may have stored between our check and our take-off.
        entry = slot.fresh()
        return slot.load(load) if entry is None else entry[0]

    def get() -> Any:
        entry = slot.fresh()
        return flights.do(_KEY, refresh) if entry is None else entry[0]

    return get


def xfetch(load: Load, ttl_s: float, beta: float, seed: int) -> Load:
    """Probabilistic early refresh: XFetch of Vattani, Chierichetti and Lowenstein, VLDB 2015.

    A reader reloads early if ``now - took * beta * ln(U) >= expiry`` with U uniform in (0, 1]:
    the nearer the expiry and the slower the load, the likelier. Nobody waits for anybody, so that
    nothing protects an empty cache, and several readers may throw the dice during one load.
    """
    slot = _Slot(ttl_s)
    dice = random.Random(seed)

    def get() -> Any:
        entry = slot.entry
        if entry is not None:
            value, expiry, took_s = entry
            head_start_s = -took_s * beta * math.log(1.0 - dice.random())
            if time.monotonic() + head_start_s < expiry:
                return value
        return slot.load(load)

    return get


def stale_while_revalidate(load: Load, ttl_s: float) -> Load:
    """After expiry the old value is served while one background thread loads (RFC 5861).

    Only the very first readers wait, for a single flight. A failed refresh leaves the old value;
    the next reader tries again.
    """
    slot = _Slot(ttl_s)
    flights = SingleFlight()
    refreshing = threading.Lock()

    def first() -> Any:
        return slot.load(load) if slot.entry is None else slot.entry[0]

    def refresh() -> None:
        try:
            slot.load(load)
        finally:
            refreshing.release()

    def get() -> Any:
        entry = slot.entry
        if entry is None:
            return flights.do(_KEY, first)
        if time.monotonic() >= entry[1] and refreshing.acquire(blocking=False):
            # Checked again under the lock: the refresh may just have ended.
            if slot.fresh() is None:
                threading.Thread(target=refresh, daemon=True).start()
            else:
                refreshing.release()
        return entry[0]

    return get


def set_nx(
    load: Load,
    ttl_s: float,
    client: redis.Redis,
    namespace: str,
    lock_s: float,
    poll_s: float = 0.002,
) -> Load:
    """A lock shared by all processes: ``SET NX PX`` on the server, the others poll for the value.

    Parameters
    ----------
    load:
        Returns a JSON-serialisable value.
    ttl_s:
        Life of the value on the server.
    client, namespace:
        The server, and the prefix of the two keys used.
    lock_s:
        Life of the lock: a loader that dies blocks the others no longer than this, and a load
        that takes longer is repeated by somebody else.
    poll_s:
        Pause between two looks of those who wait.
    """
    value_key, lock_key = f"{namespace}value", f"{namespace}lock"
    release = client.register_script(_RELEASE)

    def get() -> Any:
        token = secrets.token_hex(8)
        while True:
            stored = client.get(value_key)
            if stored is not None:
                return json.loads(stored)
            if client.set(lock_key, token, nx=True, px=max(1, round(lock_s * 1000))):
                break
            time.sleep(poll_s)
        try:
            # The value may have been stored between our look and our lock.
            stored = client.get(value_key)
            if stored is not None:
                return json.loads(stored)
            value = load()
            client.set(value_key, json.dumps(value), px=max(1, round(ttl_s * 1000)))
            return value
        finally:
            release(keys=[lock_key], args=[token])

    return get


#: Protections by the name that options use, with what each promises.
PROTECTIONS: dict[str, str] = {
    "none": "check, then load: nothing is promised",
    "lru_cache": "functools.lru_cache keyed by period: nothing is promised",
    "cachetools_lock": "cachetools.cached(lock=): nothing is promised",
    "cachetools_condition": "cachetools.cached(condition=): one load at a time",
    "single_flight": "one load at a time, the others wait for it",
    "xfetch": "early refresh by dice: few loads, no promise",
    "stale_while_revalidate": "one load at a time, nobody but the first waits; values may be stale",
    "set_nx": "a lock on the server: one load at a time over all processes",
}

#: Protections under which no two loads of one value ever run together.
EXCLUSIVE: frozenset[str] = frozenset(
    {"cachetools_condition", "single_flight", "stale_while_revalidate", "set_nx"}
)


def protect(
    name: str,
    load: Load,
    ttl_s: float,
    *,
    seed: int = 0,
    beta: float = 1.0,
    client: redis.Redis | None = None,
    namespace: str = "",
    lock_s: float = 10.0,
) -> Load:
    """Return ``load`` behind the protection called ``name`` (a key of ``PROTECTIONS``).

    Raises
    ------
    ValueError
        If the name is unknown, or ``set_nx`` gets no client.
    """
    simple = {
        "none": unprotected,
        "lru_cache": lru_cache,
        "cachetools_lock": cachetools_lock,
        "cachetools_condition": cachetools_condition,
        "single_flight": single_flight,
        "stale_while_revalidate": stale_while_revalidate,
    }
    if name in simple:
        return simple[name](load, ttl_s)
    if name == "xfetch":
        return xfetch(load, ttl_s, beta, seed)
    if name == "set_nx":
        if client is None:
            raise ValueError("set_nx needs a client of a cache server")
        return set_nx(load, ttl_s, client, namespace, lock_s)
    raise ValueError(f"unknown protection {name!r}; known: {', '.join(PROTECTIONS)}")
