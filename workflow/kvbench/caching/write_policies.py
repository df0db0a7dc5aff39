"""Where a write goes: the store, the cache, or the cache first and the store later.

A policy stands between an application and two parts: a :class:`Store` (a real database, the
truth) and a cache that may forget. Values are whole numbers, the version of the record, so that an
outdated answer can be recognised.
"""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import redis

from kvbench.errors import InputError, one_of


class Cache(Protocol):
    """What a policy needs of a cache."""

    def get(self, key: str) -> int | None:
        """Return the value of ``key``, or None if it is not there."""

    def set(self, key: str, value: int) -> None:
        """Keep ``value`` under ``key``."""

    def delete(self, key: str) -> None:
        """Forget ``key``, whether it is there or not."""


class Store:
    """Records in an SQLite file, with counters of what was asked of it.

    Write-ahead logging with ``synchronous=NORMAL``: a committed write survives the end of the
    process, however sudden, though not necessarily a power cut.

    Attributes
    ----------
    reads, writes, transactions:
        Rows read, rows written, and commits.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=10.0)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS record (key TEXT PRIMARY KEY, value INTEGER NOT NULL)"
        )
        self.reads = self.writes = self.transactions = 0

    def get(self, key: str) -> int | None:
        """Return the stored value of ``key``, or None if there is none."""
        self.reads += 1
        row = self._connection.execute("SELECT value FROM record WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, value: int) -> None:
        """Commit one value."""
        self.put_many({key: value})

    def put_many(self, values: Mapping[str, int]) -> None:
        """Commit several values in one transaction: all of them or none."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany(
                "INSERT INTO record VALUES (?, ?) "
                "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                values.items(),
            )
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        self.writes += len(values)
        self.transactions += 1

    def everything(self) -> dict[str, int]:
        """Return all records, without counting the read."""
        return dict(self._connection.execute("SELECT key, value FROM record"))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


#: Life of a copy: none stays on a server for good if its process dies without cleaning up.
_TTL_S = 3600


class ServerCache:
    """The cache server: one string per key, below a prefix."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    def get(self, key: str) -> int | None:
        """See :class:`Cache`."""
        found = self._client.get(self._prefix + key)
        return None if found is None else int(found)

    def set(self, key: str, value: int) -> None:
        """See :class:`Cache`."""
        self._client.set(self._prefix + key, value, ex=_TTL_S)

    def delete(self, key: str) -> None:
        """See :class:`Cache`."""
        self._client.delete(self._prefix + key)


class BoundedCache:
    """At most ``capacity`` keys of another cache; the least recently used leaves.

    ``before_eviction`` hears of a key while its value can still be read, which is the last moment
    for a policy that has not yet written it to the store.
    """

    def __init__(self, cache: Cache, capacity: int) -> None:
        if capacity < 1:
            raise InputError(f"write_policy: capacity is {capacity}; give at least 1")
        self._cache = cache
        self._capacity = capacity
        self._order: OrderedDict[str, None] = OrderedDict()
        self.before_eviction: Callable[[str], None] = lambda key: None

    def __contains__(self, key: str) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)

    def get(self, key: str) -> int | None:
        """See :class:`Cache`."""
        if key in self._order:
            self._order.move_to_end(key)
        return self._cache.get(key)

    def set(self, key: str, value: int) -> None:
        """See :class:`Cache`; makes room first."""
        if key not in self._order and len(self._order) >= self._capacity:
            victim = next(iter(self._order))
            self.before_eviction(victim)
            self._cache.delete(victim)
            del self._order[victim]
        self._cache.set(key, value)
        self._order[key] = None
        self._order.move_to_end(key)

    def delete(self, key: str) -> None:
        """See :class:`Cache`."""
        self._cache.delete(key)
        self._order.pop(key, None)


class WritePolicy(ABC):
    """Reads fill the cache from the store; what a write does is the policy.

    Attributes
    ----------
    dirty:
        Keys whose newest acknowledged value is in the cache alone: what a crash would lose.
    hits, reads:
        Reads answered from the cache, and all reads.
    """

    def __init__(self, store: Store, cache: BoundedCache) -> None:
        self.store = store
        self.cache = cache
        self.dirty: set[str] = set()
        self.hits = self.reads = 0

    def read(self, key: str) -> int | None:
        """Return the value of ``key`` from the cache, or from the store and keep it."""
        self.reads += 1
        value = self.cache.get(key)
        if value is not None:
            self.hits += 1
            return value
        value = self.store.get(key)
        if value is not None:
            self.cache.set(key, value)
        return value

    @abstractmethod
    def write(self, key: str, value: int) -> None:
        """Make ``value`` the newest value of ``key``; returning acknowledges it."""

    def flush(self) -> None:  # noqa: B027
        """Write to the store what is not there yet; nothing, unless a policy holds writes back."""


class AsideStale(WritePolicy):
    """Cache-aside as it is often written: the store is updated and the cache is not told."""

    def write(self, key: str, value: int) -> None:
        """See :meth:`WritePolicy.write`."""
        self.store.put(key, value)


class AsideInvalidate(WritePolicy):
    """Cache-aside: the application writes the store, then deletes the cached copy."""

    def write(self, key: str, value: int) -> None:
        """See :meth:`WritePolicy.write`."""
        self.store.put(key, value)
        self.cache.delete(key)


class AsideUpdate(WritePolicy):
    """Cache-aside: the application writes the store, then the cached copy, present or not."""

    def write(self, key: str, value: int) -> None:
        """See :meth:`WritePolicy.write`."""
        self.store.put(key, value)
        self.cache.set(key, value)


class ReadThrough(AsideInvalidate):
    """The cache layer loads misses itself and forgets what was written.

    The application is spared the code; what reaches cache and store is the same as with
    :class:`AsideInvalidate`.
    """


class WriteThrough(WritePolicy):
    """The cache layer writes the store and its own copy before it acknowledges.

    The copy is dropped first: if the process ends between the two writes, the next reader misses
    and fetches the new value instead of meeting the old copy.
    """

    def write(self, key: str, value: int) -> None:
        """See :meth:`WritePolicy.write`."""
        self.cache.delete(key)
        self.store.put(key, value)
        self.cache.set(key, value)


class WriteAround(WritePolicy):
    """No allocation on a write: the store is written, and only a copy that is there is renewed."""

    def write(self, key: str, value: int) -> None:
        """See :meth:`WritePolicy.write`."""
        self.store.put(key, value)
        if key in self.cache:
            self.cache.set(key, value)


class WriteBack(WritePolicy):
    """A write is acknowledged from the cache and reaches the store after ``flush_every`` writes.

    Several writes of one key are stored once. A dirty key is written before it is evicted.
    """

    def __init__(self, store: Store, cache: BoundedCache, flush_every: int) -> None:
        if flush_every < 1:
            raise InputError(f"write_policy: flush_every is {flush_every}; give at least 1")
        super().__init__(store, cache)
        self.flush_every = flush_every
        self._since_flush = 0
        cache.before_eviction = self._rescue

    def _rescue(self, key: str) -> None:
        if key in self.dirty:
            self.store.put(key, self.cache.get(key))
            self.dirty.discard(key)

    def write(self, key: str, value: int) -> None:
        """See :meth:`WritePolicy.write`; a flush that is due comes first."""
        if self._since_flush >= self.flush_every:
            self.flush()
        self.cache.set(key, value)
        self.dirty.add(key)
        self._since_flush += 1

    def flush(self) -> None:
        """Write all dirty keys in one transaction."""
        if self.dirty:
            self.store.put_many({key: self.cache.get(key) for key in sorted(self.dirty)})
        self.dirty.clear()
        self._since_flush = 0


#: Policies by name; ``write_back`` also takes ``flush_every``.
POLICIES: dict[str, type[WritePolicy]] = {
    "aside_stale": AsideStale,
    "aside_invalidate": AsideInvalidate,
    "aside_update": AsideUpdate,
    "read_through": ReadThrough,
    "write_through": WriteThrough,
    "write_around": WriteAround,
    "write_back": WriteBack,
}


def build(name: str, store: Store, cache: BoundedCache, flush_every: int = 1) -> WritePolicy:
    """Return a fresh policy; ``flush_every`` matters to ``write_back`` alone.

    Raises
    ------
    InputError
        If there is no such policy; the message names the known ones.
    """
    one_of("write policy", name, POLICIES)
    if name == "write_back":
        return WriteBack(store, cache, flush_every)
    return POLICIES[name](store, cache)
