"""An exact response cache: equal requests get the stored answer, everything else is generated.

Lifting it into a service takes three lines::

    cache = ResponseCache(MemoryBackend(capacity=10_000), ttl_s=3600)
    reply = cache.answer(request, generate)      # generate: Request -> Answer
    reply.answer.text, reply.hit

Only complete, successful answers are stored; answers sampled at a temperature above zero are not
frozen unless asked; entries are JSON with a checksum, never pickles; a store that fails costs a
generation, never an answer.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Final, Literal, Protocol

import cachetools
import redis

from kvbench.caching.keys import Request, request_key
from kvbench.caching.server import delete_prefix


class Miss(Enum):
    """The type of :data:`MISS`: a sentinel, because None, "" and 0 are values like any other."""

    MISS = "miss"


#: What a lookup returns when nothing (usable) is stored.
MISS: Final = Miss.MISS


class BackendError(RuntimeError):
    """The store did not do what it was asked; the cause is chained."""


@dataclass(frozen=True)
class Answer:
    """What a model returned.

    Attributes
    ----------
    text:
        The answer.
    finish_reason:
        ``stop``, ``length``, ``content_filter``, ``tool_calls`` as in OpenAI's API; ``error`` for
        a failed generation and ``""`` for a stream that was cut off.
    prompt_tokens, completion_tokens:
        Tokens read and generated, which a hit saves.
    """

    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


def is_complete(answer: Answer) -> bool:
    """Whether ``answer`` is a whole, successful answer: it ended by itself and says something."""
    return answer.finish_reason == "stop" and answer.text != ""


class Backend(Protocol):
    """Where entries live. All methods are thread-safe and raise :class:`BackendError`."""

    def get(self, key: str) -> bytes | Miss:
        """Return the stored bytes, or ``MISS``."""

    def set(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Store bytes for ``ttl_s`` seconds, or for good if None."""

    def delete(self, key: str) -> None:
        """Forget an entry; forgetting an unknown key is no error."""

    def footprint(self) -> tuple[int, int]:
        """Return the number of entries and the bytes they occupy, keys and bookkeeping included."""

    def close(self) -> None:
        """Release files and connections."""


class MemoryBackend:
    """Entries in this process: least recently used goes first, each entry has its own TTL.

    Parameters
    ----------
    capacity:
        Most entries held at once.
    clock:
        Seconds that never go backwards; tests and simulations pass a virtual clock.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a cache needs at least one entry")
        self._lock = threading.Lock()
        self._entries: cachetools.TLRUCache = cachetools.TLRUCache(
            capacity, ttu=lambda _key, entry, now: now + entry[1], timer=clock
        )

    def get(self, key: str) -> bytes | Miss:
        """Return the stored bytes, or ``MISS``."""
        with self._lock:
            entry = self._entries.get(key)
        return MISS if entry is None else entry[0]

    def set(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Store bytes for ``ttl_s`` seconds, or for good if None; a TTL of zero stores nothing."""
        with self._lock:
            # cachetools keeps the old entry when the new one is already expired.
            self._entries.pop(key, None)
            self._entries[key] = (value, float("inf") if ttl_s is None else ttl_s)

    def delete(self, key: str) -> None:
        """Forget an entry."""
        with self._lock:
            self._entries.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def footprint(self) -> tuple[int, int]:
        """Return entries and the bytes of their keys, values and tuples (not the tree around)."""
        with self._lock:
            items = list(self._entries.items())
        size = sum(
            sys.getsizeof(key) + sys.getsizeof(entry) + sys.getsizeof(entry[0])
            for key, entry in items
        )
        return len(items), size

    def close(self) -> None:
        """Nothing to release."""


class SQLiteBackend:
    """Entries in one file that survives the process; expiry therefore uses the wall clock."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        # Autocommit: one statement is one transaction. The lock makes sharing between threads safe.
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS entries"
            " (key TEXT PRIMARY KEY, value BLOB NOT NULL, expires REAL) WITHOUT ROWID"
        )

    def _execute(self, statement: str, parameters: tuple = ()) -> list[tuple]:
        try:
            with self._lock:
                return self._database.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise BackendError(f"sqlite: {error}") from error

    def get(self, key: str) -> bytes | Miss:
        """Return the stored bytes, or ``MISS``."""
        rows = self._execute(
            "SELECT value FROM entries WHERE key = ? AND (expires IS NULL OR expires > ?)",
            (key, self._clock()),
        )
        return rows[0][0] if rows else MISS

    def set(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Store bytes for ``ttl_s`` seconds, or for good if None."""
        expires = None if ttl_s is None else self._clock() + ttl_s
        self._execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (key, value, expires))

    def delete(self, key: str) -> None:
        """Forget an entry."""
        self._execute("DELETE FROM entries WHERE key = ?", (key,))

    def purge(self) -> int:
        """Delete what has expired; return how many entries. Call it now and then."""
        self._execute("DELETE FROM entries WHERE expires <= ?", (self._clock(),))
        return self._execute("SELECT changes()")[0][0]

    def footprint(self) -> tuple[int, int]:
        """Return entries and the bytes of the database's pages."""
        entries = self._execute("SELECT count(*) FROM entries")[0][0]
        pages = self._execute("PRAGMA page_count")[0][0]
        return entries, pages * self._execute("PRAGMA page_size")[0][0]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()


class RedisBackend:
    """Entries in a Redis or Valkey server, shared by all workers.

    Parameters
    ----------
    client:
        Client over a Unix socket or TCP. Give it short timeouts and no retries
        (:func:`kvbench.caching.resilience.impatient`): redis-py's defaults block for seconds.
    namespace:
        Prefix of every key, so that the server can be shared.
    """

    def __init__(self, client: redis.Redis, namespace: str) -> None:
        self._client = client
        self._namespace = namespace

    def get(self, key: str) -> bytes | Miss:
        """Return the stored bytes, or ``MISS``; an entry of another type reads as empty bytes."""
        try:
            value = self._client.get(self._namespace + key)
        except redis.ResponseError as error:
            # Damaged data, not a failing server: read as such, it is overwritten by the next set.
            if str(error).startswith("WRONGTYPE"):
                return b""
            raise BackendError(f"GET: {error}") from error
        except (redis.RedisError, OSError) as error:
            raise BackendError(f"GET: {error}") from error
        return MISS if value is None else value

    def set(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Store bytes for ``ttl_s`` seconds (to the millisecond), or for good if None."""
        milliseconds = None if ttl_s is None else max(1, round(ttl_s * 1000))
        try:
            self._client.set(self._namespace + key, value, px=milliseconds)
        except (redis.RedisError, OSError) as error:
            raise BackendError(f"SET: {error}") from error

    def delete(self, key: str) -> None:
        """Forget an entry."""
        try:
            self._client.unlink(self._namespace + key)
        except (redis.RedisError, OSError) as error:
            raise BackendError(f"UNLINK: {error}") from error

    def clear(self) -> None:
        """Forget every entry of this namespace."""
        try:
            delete_prefix(self._client, self._namespace)
        except (redis.RedisError, OSError) as error:
            raise BackendError(f"SCAN: {error}") from error

    def footprint(self) -> tuple[int, int]:
        """Return entries and the sum of the server's own MEMORY USAGE over them."""
        try:
            keys = list(self._client.scan_iter(match=f"{self._namespace}*", count=1000))
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.memory_usage(key)
            return len(keys), sum(size or 0 for size in pipeline.execute())
        except (redis.RedisError, OSError) as error:
            raise BackendError(f"MEMORY USAGE: {error}") from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


@dataclass(frozen=True)
class Stats:
    """Counts since the cache was made. ``lookups = hits + misses``; bypassed ones are neither."""

    hits: int = 0
    misses: int = 0
    bypassed: int = 0
    stored: int = 0
    not_stored: int = 0
    corrupt: int = 0
    backend_errors: int = 0
    prompt_tokens_saved: int = 0
    completion_tokens_saved: int = 0

    @property
    def hit_ratio(self) -> float:
        """Hits per lookup; NaN before the first."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else float("nan")


@dataclass(frozen=True)
class Reply:
    """An answer, and whether it came out of the cache."""

    answer: Answer
    hit: bool


class ResponseCache:
    """Answers by request, in any :class:`Backend`; safe to share between threads.

    Parameters
    ----------
    backend:
        Where entries live.
    ttl_s:
        Seconds an answer stays valid; None for good.
    sampled:
        What to do with requests at a temperature above zero, whose answer is one draw of many:
        ``skip`` neither looks up nor stores them; ``seed`` caches those that carry an integer
        ``seed`` (which is part of the key); ``freeze`` caches them all, so that repeats get the
        first draws back.
    draws:
        Size of the pool that ``freeze`` keeps per sampled request: a repeat picks a slot at
        random and is generated if the slot is empty. 1 freezes a single draw.
    accept:
        Which answers may be stored; by default complete ones only.
    negative_ttl_s:
        If set, failed generations (``finish_reason`` ``error``) are kept this long, which spares
        a struggling model at the price of serving the error again.
    seed:
        Seed of the choice of slots.

    Notes
    -----
    Equal requests that arrive together are each generated; put a
    :class:`kvbench.caching.stampede.SingleFlight` around :meth:`answer` where that matters.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        ttl_s: float | None = None,
        sampled: Literal["skip", "seed", "freeze"] = "skip",
        draws: int = 1,
        accept: Callable[[Answer], bool] = is_complete,
        negative_ttl_s: float | None = None,
        seed: int | None = None,
    ) -> None:
        if sampled not in ("skip", "seed", "freeze"):
            raise ValueError(f"sampled is {sampled!r}; it must be skip, seed or freeze")
        if draws < 1:
            raise ValueError(f"draws is {draws}; a pool needs at least one slot")
        for name, limit in (("ttl_s", ttl_s), ("negative_ttl_s", negative_ttl_s)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} is {limit}; it must be above zero, or None")
        self._backend = backend
        self._ttl_s = ttl_s
        self._sampled = sampled
        self._draws = draws
        self._accept = accept
        self._negative_ttl_s = negative_ttl_s
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stats = Stats()

    @property
    def stats(self) -> Stats:
        """A consistent snapshot of the counts."""
        return self._stats

    def answer(self, request: Request, generate: Callable[[Request], Answer]) -> Reply:
        """Return the stored answer to ``request``, or generate it and store it if it may be.

        What ``generate`` raises is passed on, and nothing is stored.
        """
        if not self._cacheable(request):
            self._count(bypassed=1)
            return Reply(generate(request), hit=False)
        key = self._key(request)
        try:
            found = self._load(key)
        except BackendError:
            # A store that just failed is not asked a second time for the same request.
            self._count(misses=1, backend_errors=1)
            return Reply(generate(request), hit=False)
        if found is not MISS:
            return Reply(found, hit=True)
        answer = generate(request)
        self._store(key, answer)
        return Reply(answer, hit=False)

    def get(self, request: Request) -> Answer | Miss:
        """Return the stored answer, or ``MISS``; a failing store is a miss."""
        if not self._cacheable(request):
            self._count(bypassed=1)
            return MISS
        try:
            return self._load(self._key(request))
        except BackendError:
            self._count(misses=1, backend_errors=1)
            return MISS

    def put(self, request: Request, answer: Answer) -> bool:
        """Store ``answer`` if it may be stored; return whether it was."""
        return self._cacheable(request) and self._store(self._key(request), answer)

    def invalidate(self, request: Request) -> None:
        """Forget every stored answer to ``request``.

        Raises
        ------
        BackendError
            If the store fails: an invalidation that is not certain must not look like one.
        """
        key = request_key(request)
        for slot in range(self._draws if request.sampled else 1):
            self._backend.delete(_slot(key, slot))

    def _cacheable(self, request: Request) -> bool:
        if not request.sampled or self._sampled == "freeze":
            return True
        seed = request.parameters.get("seed")
        return self._sampled == "seed" and isinstance(seed, int) and not isinstance(seed, bool)

    def _key(self, request: Request) -> str:
        pooled = self._sampled == "freeze" and self._draws > 1 and request.sampled
        slot = self._random.randrange(self._draws) if pooled else 0
        return _slot(request_key(request), slot)

    def _load(self, key: str) -> Answer | Miss:
        data = self._backend.get(key)
        if data is MISS:
            self._count(misses=1)
            return MISS
        answer = decode(key, data)
        if answer is None:
            self._count(misses=1, corrupt=1)
            return MISS
        self._count(
            hits=1,
            prompt_tokens_saved=answer.prompt_tokens,
            completion_tokens_saved=answer.completion_tokens,
        )
        return answer

    def _store(self, key: str, answer: Answer) -> bool:
        if self._accept(answer):
            ttl_s = self._ttl_s
        elif self._negative_ttl_s is not None and answer.finish_reason == "error":
            ttl_s = self._negative_ttl_s
        else:
            self._count(not_stored=1)
            return False
        try:
            self._backend.set(key, encode(key, answer), ttl_s)
        except BackendError:
            self._count(not_stored=1, backend_errors=1)
            return False
        self._count(stored=1)
        return True

    def _count(self, **increments: int) -> None:
        with self._lock:
            self._stats = replace(
                self._stats,
                **{name: getattr(self._stats, name) + by for name, by in increments.items()},
            )


def encode(key: str, answer: Answer) -> bytes:
    """Return the stored form: JSON that carries its key and a CRC-32 of the answer's JSON."""
    text = json.dumps(asdict(answer), ensure_ascii=False, separators=(",", ":"))
    entry = {"key": key, "crc32": zlib.crc32(text.encode()), "answer": text}
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()


def decode(key: str, data: bytes) -> Answer | None:
    """Return the answer, or None if ``data`` is damaged or belongs to another key."""
    try:
        entry = json.loads(data)
        text = entry["answer"]
        if entry["key"] != key or entry["crc32"] != zlib.crc32(text.encode()):
            return None
        return Answer(**json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _slot(key: str, slot: int) -> str:
    return f"{key}.{slot}" if slot else key
