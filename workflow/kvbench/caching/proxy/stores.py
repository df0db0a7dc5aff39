"""Where answers are kept: memory, SQLite, or a Redis or Valkey server; all bounded, all deletable.

Entries are JSON and bytes with a checksum, never pickles. Group names (of a namespace or a tag)
are keyed digests already: no store sees a tenant, a namespace or a tag in plain text. Where
questions are compared, a store that outlives the process keeps them beside their answers.
"""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from kvbench.caching.proxy.questions import Form
from kvbench.caching.proxy.tenancy import Header
from kvbench.errors import InputError

#: Bytes that an entry of the memory store takes beside its body: objects, key and places in
#: the tables, by sys.getsizeof of an empty one on CPython 3.11, rounded up.
_OVERHEAD = 1024

#: Longest wait for a Redis server, and the rest after a failure: no request hangs on a cache.
_REDIS_TIMEOUT_S = 0.25
_REDIS_REST_S = 1.0

#: The bytes in a Redis server are counted anew after this; in between its own are added, so that
#: what other proxies write meanwhile is the most by which the bound is missed.
_REDIS_COUNT_S = 1.0
#: Entries that make room or are cleared away at once.
_REDIS_BATCH = 256

_SEPARATOR = b"\n"


@dataclass(frozen=True)
class Asked:
    """A stored question, from which the index of the semantic cache is built again."""

    key: str
    context: str
    text: str
    expires: float


class StoreError(RuntimeError):
    """The store did not do what it was asked. The text holds no address and no password."""


@dataclass(frozen=True)
class Entry:
    """An answer as it went over the wire.

    Attributes
    ----------
    body, content_type, form, headers:
        The answer, and the headers that are served with it again.
    at, expires:
        When it was stored and until when it is served, in seconds of the wall clock.
    tokens:
        Prompt and completion tokens as the server counted them, or None.
    tenant:
        Keyed digest of whom it belongs to.
    groups:
        Keyed digests of its namespace and tags.
    question:
        Context and text of the question, where questions alike are answered too.
    """

    body: bytes
    content_type: str
    form: Form
    at: float
    expires: float
    headers: tuple[Header, ...] = ()
    tokens: tuple[int, int] | None = None
    tenant: str = ""
    groups: tuple[str, ...] = ()
    question: tuple[str, str] | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return (
            len(self.body)
            + _OVERHEAD
            + sum(len(name) + len(value) for name, value in self.headers)
            + sum(map(len, self.groups))
            + sum(map(len, self.question or ()))
        )


class Store(Protocol):
    """Answers by key. Methods raise :class:`StoreError` and are called from one event loop."""

    async def get(self, key: str) -> Entry | None:
        """Return a live entry."""

    async def put(self, key: str, entry: Entry) -> None:
        """Keep an entry until it expires or has to make room."""

    async def delete(self, key: str, tenant: str) -> list[str]:
        """Delete an entry of a tenant; return the keys that were deleted."""

    async def delete_group(self, group: str) -> list[str]:
        """Delete the entries of a namespace or tag; return their keys."""

    async def questions(self) -> list[Asked]:
        """Return what was asked, the entries that make room first at the beginning."""

    async def footprint(self) -> tuple[int, int]:
        """Return entries and bytes."""

    async def close(self) -> None:
        """Let go of files and connections."""


@dataclass
class MemoryStore:
    """Entries in this process; the least recently used makes room."""

    capacity: int
    max_bytes: int
    clock: Callable[[], float] = time.time
    _entries: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    _groups: dict[str, set[str]] = field(default_factory=dict)
    _bytes: int = 0

    async def get(self, key: str) -> Entry | None:
        """Return a live entry."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self.clock() >= entry.expires:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    async def put(self, key: str, entry: Entry) -> None:
        """Keep an entry; one that is larger than the whole store is not kept."""
        self._drop(key)
        if entry.size > self.max_bytes:
            return
        self._entries[key] = entry
        self._bytes += entry.size
        for group in entry.groups:
            self._groups.setdefault(group, set()).add(key)
        while len(self._entries) > self.capacity or self._bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    async def delete(self, key: str, tenant: str) -> list[str]:
        """Delete an entry of a tenant."""
        entry = self._entries.get(key)
        if entry is None or entry.tenant != tenant:
            return []
        self._drop(key)
        return [key]

    async def delete_group(self, group: str) -> list[str]:
        """Delete the entries of a namespace or tag."""
        keys = list(self._groups.get(group, ()))
        for key in keys:
            self._drop(key)
        return keys

    async def questions(self) -> list[Asked]:
        """Return nothing: a store in memory begins empty, and so does the index."""
        return []

    async def footprint(self) -> tuple[int, int]:
        """Return entries and bytes."""
        return len(self._entries), self._bytes

    async def close(self) -> None:
        """Nothing to release."""

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._bytes -= entry.size
        for group in entry.groups:
            members = self._groups[group]
            members.discard(key)
            if not members:
                del self._groups[group]


class SQLiteStore:
    """Entries in one file that outlives the process; one thread works on it."""

    def __init__(
        self, path: Path, capacity: int, max_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._capacity, self._max_bytes, self._clock = capacity, max_bytes, clock
        self._thread = ThreadPoolExecutor(1, "proxy-sqlite")
        try:
            path.touch(mode=0o600)
            self._database = self._thread.submit(_open_database, path).result()
        except (OSError, sqlite3.Error) as error:
            self._thread.shutdown()
            raise InputError(f"--store sqlite:{path}: cannot be used ({error})") from error

    async def get(self, key: str) -> Entry | None:
        """Return a live entry."""
        return await self._run(self._get, key)

    async def put(self, key: str, entry: Entry) -> None:
        """Keep an entry until it expires or has to make room."""
        await self._run(self._put, key, entry)

    async def delete(self, key: str, tenant: str) -> list[str]:
        """Delete an entry of a tenant."""
        return await self._run(self._forget, "key = ? AND tenant = ?", (key, tenant))

    async def delete_group(self, group: str) -> list[str]:
        """Delete the entries of a namespace or tag."""
        members = "key IN (SELECT key FROM members WHERE name = ?)"
        return await self._run(self._forget, members, (group,))

    async def questions(self) -> list[Asked]:
        """Return what was asked, the least recently used first."""
        return await self._run(self._questions)

    async def footprint(self) -> tuple[int, int]:
        """Return entries and bytes."""
        return await self._run(self._footprint)

    async def close(self) -> None:
        """Close the file."""
        await self._run(self._database.close)
        self._thread.shutdown()

    async def _run(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, action, *arguments
            )
        except sqlite3.Error as error:
            raise StoreError(f"sqlite: {error}") from error

    def _get(self, key: str) -> Entry | None:
        row = self._database.execute(
            "SELECT value, used FROM entries WHERE key = ? AND expires > ?", (key, self._clock())
        ).fetchone()
        if row is None:
            return None
        # A write for each read would be the dearest part of a hit; a minute is exact enough.
        if self._clock() - row[1] > 60:
            self._database.execute(
                "UPDATE entries SET used = ? WHERE key = ?", (self._clock(), key)
            )
        return decoded(row[0])

    def _put(self, key: str, entry: Entry) -> None:
        value = encoded(entry)
        if len(value) > self._max_bytes:
            return
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            self._forget("key = ?", (key,))
            database.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)",
                (key, value, len(value), entry.tenant, entry.expires, self._clock()),
            )
            database.executemany(
                "INSERT INTO members VALUES (?, ?)", [(group, key) for group in entry.groups]
            )
            if entry.question is not None:
                database.execute("INSERT INTO questions VALUES (?, ?, ?)", (key, *entry.question))
            self._forget("expires <= ?", (self._clock(),))
            entries, size = self._footprint()
            while entries > self._capacity or size > self._max_bytes:
                self._forget(
                    "key IN (SELECT key FROM entries ORDER BY used, rowid LIMIT ?)",
                    (max(1, entries - self._capacity),),
                )
                entries, size = self._footprint()
            database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise

    def _forget(self, where: str, values: Sequence[Any]) -> list[str]:
        """Delete entries and return their keys; ``where`` is one of the fixed clauses above.

        Their places in groups go by a trigger.
        """
        statement = f"DELETE FROM entries WHERE {where} RETURNING key"
        return [key for (key,) in self._database.execute(statement, values).fetchall()]

    def _questions(self) -> list[Asked]:
        rows = self._database.execute(
            "SELECT key, context, text, expires FROM questions JOIN entries USING (key)"
            " WHERE expires > ? ORDER BY used, entries.rowid",
            (self._clock(),),
        )
        return [Asked(*row) for row in rows]

    def _footprint(self) -> tuple[int, int]:
        return self._database.execute("SELECT count, bytes FROM totals").fetchone()


_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, size INTEGER NOT NULL,
    tenant TEXT NOT NULL, expires REAL NOT NULL, used REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_used ON entries (used);
CREATE INDEX IF NOT EXISTS entries_expires ON entries (expires);
CREATE TABLE IF NOT EXISTS members (name TEXT NOT NULL, key TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS members_name ON members (name);
CREATE INDEX IF NOT EXISTS members_key ON members (key);
CREATE TABLE IF NOT EXISTS questions (
    key TEXT PRIMARY KEY, context TEXT NOT NULL, text TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS totals (count INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO totals SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM totals);
CREATE TRIGGER IF NOT EXISTS entry_in AFTER INSERT ON entries BEGIN
    UPDATE totals SET count = count + 1, bytes = bytes + new.size;
END;
CREATE TRIGGER IF NOT EXISTS entry_out AFTER DELETE ON entries BEGIN
    UPDATE totals SET count = count - 1, bytes = bytes - old.size;
    DELETE FROM members WHERE key = old.key;
END;
CREATE TRIGGER IF NOT EXISTS question_out AFTER DELETE ON entries BEGIN
    DELETE FROM questions WHERE key = old.key;
END;
"""


def _open_database(path: Path) -> sqlite3.Connection:
    # Autocommit: one statement is one transaction, unless BEGIN says otherwise.
    database = sqlite3.connect(path, isolation_level=None, timeout=5)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")
    database.executescript(_SCHEMA)
    return database


class RedisStore:
    """Entries in a Redis or Valkey server, shared by all proxies with the same secret.

    Entries and bytes are bounded over all of them; the one that expires first makes room. Bytes
    are those of the stored entries, without what the server needs for itself. Every key has a time
    to live. After a failure the server is left alone for a second.

    Parameters
    ----------
    url:
        ``redis://``, ``rediss://`` or ``unix://``; never part of a message.
    namespace:
        Prefix of every key.
    capacity, max_bytes:
        Most entries, and most bytes of them.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        capacity: int,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self._errors: tuple[type[Exception], ...] = (redis.RedisError, OSError, ValueError)
        self._prefix, self._clock = namespace, clock
        self._capacity, self._max_bytes = capacity, max_bytes
        self._bytes, self._counted_at = 0, -math.inf
        self._rest_until = 0.0
        try:
            # Both read the address lazily; the port is parsed when it is asked for.
            _ = urlsplit(url).port
            self._client = redis.asyncio.Redis.from_url(
                url,
                socket_timeout=_REDIS_TIMEOUT_S,
                socket_connect_timeout=_REDIS_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except Exception:
            # Whatever it is, it would quote the address, and the password with it.
            raise InputError(
                "--store: the address of the server cannot be read; a password with '@', ':' or"
                " '/' in it has to be percent-encoded"
            ) from None

    async def get(self, key: str) -> Entry | None:
        """Return a live entry; damaged data is none."""
        value = await self._ask("GET", lambda: self._client.get(self._name("entry", key)))
        entry = None if value is None else decoded(value)
        return entry if entry is not None and entry.expires > self._clock() else None

    async def put(self, key: str, entry: Entry) -> None:
        """Keep an entry until it expires, and list it in its groups."""
        life = max(1, round((entry.expires - self._clock()) * 1000))
        groups = [self._name("group", group) for group in entry.groups]
        lists = [self._name(name) for name in ("all", "sizes", "questions")]
        value = encoded(entry)
        if len(value) > self._max_bytes:
            return

        async def write() -> None:
            async with self._client.pipeline(transaction=True) as before:
                before.zrangebyscore(lists[0], "-inf", self._clock(), 0, _REDIS_BATCH)
                for group in groups:
                    before.pttl(group)
                expired, *left = await before.execute()
            async with self._client.pipeline(transaction=True) as commands:
                commands.set(self._name("entry", key), value, px=life)
                self._unlist(commands, expired)
                commands.zadd(lists[0], {key: entry.expires})
                commands.hset(lists[1], key, len(value))
                if entry.question is not None:
                    commands.hset(lists[2], key, json.dumps(entry.question))
                for name in lists:
                    commands.pexpire(name, 31 * 86_400_000)
                for group, age in zip(groups, left, strict=True):
                    commands.sadd(group, key)
                    commands.pexpire(group, max(life, age))
                await commands.execute()
            self._bytes += len(value)
            await self._make_room()

        await self._ask("SET", write)

    async def _make_room(self) -> None:
        """Delete what expires first until both bounds are kept."""
        if time.monotonic() - self._counted_at > _REDIS_COUNT_S:
            await self._count()
        while True:
            entries = await self._client.zcard(self._name("all"))
            surplus = entries - self._capacity
            if surplus <= 0 and self._bytes <= self._max_bytes:
                return
            # By bytes a few at a time: how many are needed is known only when they are gone.
            count = min(max(surplus, 1 if self._bytes <= self._max_bytes else 8), _REDIS_BATCH)
            names = await self._client.zrange(self._name("all"), 0, count - 1)
            if not names:
                return
            await self._unlink([_text(name) for name in names])
            await self._count()

    async def _count(self) -> tuple[int, int]:
        """Return the live entries and their bytes, and remember the bytes."""
        names = await self._client.zrangebyscore(self._name("all"), self._clock(), "+inf")
        sizes = await self._client.hmget(self._name("sizes"), names) if names else []
        self._bytes = sum(int(size) for size in sizes if size is not None)
        self._counted_at = time.monotonic()
        return len(names), self._bytes

    async def delete(self, key: str, tenant: str) -> list[str]:
        """Delete an entry of a tenant."""
        entry = await self.get(key)
        if entry is None or entry.tenant != tenant:
            return []
        return await self._ask("UNLINK", lambda: self._unlink([key]))

    async def delete_group(self, group: str) -> list[str]:
        """Delete the entries of a namespace or tag."""

        async def sweep() -> list[str]:
            name = self._name("group", group)
            keys = [_text(key) for key in await self._client.smembers(name)]
            deleted = await self._unlink(keys) if keys else []
            await self._client.unlink(name)
            return deleted

        return await self._ask("UNLINK", sweep)

    async def questions(self) -> list[Asked]:
        """Return what was asked, the one that expires first at the beginning."""

        async def read() -> list[Asked]:
            live = await self._client.zrangebyscore(
                self._name("all"), self._clock(), "+inf", withscores=True
            )
            held = await self._client.hgetall(self._name("questions"))
            found = []
            for name, expires in live:
                if (data := held.get(name)) is not None:
                    # Damaged data is no question.
                    with suppress(ValueError, TypeError):
                        context, text = json.loads(data)
                        found.append(Asked(_text(name), context, text, expires))
            return found

        return await self._ask("HGETALL", read)

    async def footprint(self) -> tuple[int, int]:
        """Return entries and their bytes."""
        return await self._ask("ZRANGE", self._count)

    async def close(self) -> None:
        """Close the connections."""
        with suppress(*self._errors):
            await self._client.aclose()

    async def _unlink(self, keys: Sequence[str]) -> list[str]:
        """Delete entries; return the keys of those that were still there."""
        async with self._client.pipeline(transaction=True) as commands:
            for key in keys:
                commands.unlink(self._name("entry", key))
            self._unlist(commands, keys)
            found = (await commands.execute())[: len(keys)]
        return [key for key, count in zip(keys, found, strict=True) if count]

    def _unlist(self, commands: Any, keys: Sequence[str | bytes]) -> None:
        """Take keys out of the lists, as part of a transaction."""
        if keys:
            commands.zrem(self._name("all"), *keys)
            commands.hdel(self._name("sizes"), *keys)
            commands.hdel(self._name("questions"), *keys)

    def _name(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    async def _ask(self, command: str, action: Callable[[], Any]) -> Any:
        if time.monotonic() < self._rest_until:
            raise StoreError(f"{command}: the server failed a moment ago")
        try:
            return await action()
        except self._errors as error:
            self._rest_until = time.monotonic() + _REDIS_REST_S
            # Messages of redis-py may hold the address.
            raise StoreError(f"{command}: {type(error).__name__}") from None


def opened(
    store: str, capacity: int, max_bytes: int, secret: bytes, clock: Callable[[], float] = time.time
) -> Store:
    """Return the store that a setting names.

    Raises
    ------
    InputError
        If it is unknown or cannot be used; the message holds no password.
    """
    if store == "memory":
        return MemoryStore(capacity, max_bytes, clock)
    if store.startswith("sqlite:") and store != "sqlite:":
        return SQLiteStore(Path(store.removeprefix("sqlite:")), capacity, max_bytes, clock)
    if store.startswith(("redis://", "rediss://", "unix://")):
        # Two installations on one server cannot read each other's entries: their keys differ.
        install = zlib.crc32(b"install" + secret)
        return RedisStore(store, f"kvbench:proxy:{install:08x}:", capacity, max_bytes, clock)
    raise InputError("--store: one of memory, sqlite:PATH, redis://..., rediss://..., unix://...")


def encoded(entry: Entry) -> bytes:
    """Return the stored form: a line of JSON with a CRC-32, then the body."""
    facts = {
        "type": entry.content_type,
        "form": entry.form,
        "at": entry.at,
        "expires": entry.expires,
        "headers": [
            [name.decode("latin-1"), value.decode("latin-1")] for name, value in entry.headers
        ],
        "tokens": entry.tokens,
        "tenant": entry.tenant,
        "groups": entry.groups,
        "crc32": zlib.crc32(entry.body),
    }
    return json.dumps(facts, separators=(",", ":")).encode() + _SEPARATOR + entry.body


def decoded(data: bytes) -> Entry | None:
    """Return the entry, or None if the data is damaged."""
    head, separator, body = data.partition(_SEPARATOR)
    try:
        facts = json.loads(head)
        if not separator or facts["crc32"] != zlib.crc32(body):
            return None
        tokens = facts["tokens"]
        return Entry(
            body=body,
            content_type=facts["type"],
            form=cast(Form, facts["form"]),
            at=float(facts["at"]),
            expires=float(facts["expires"]),
            headers=tuple(
                (name.encode("latin-1"), value.encode("latin-1"))
                for name, value in facts["headers"]
            ),
            tokens=None if tokens is None else (int(tokens[0]), int(tokens[1])),
            tenant=facts["tenant"],
            groups=tuple(facts["groups"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, UnicodeError):
        return None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
