"""Ways to get outdated answers out of a cache server when the thing they are about has changed.

Each entity (a product, a document) has several cached parts (views, answers). When the entity
changes, none of its parts may be served any more; a method promises that or it does not.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

import redis

from kvbench.caching.server import delete_prefix
from kvbench.errors import one_of


class Invalidation(ABC):
    """Entries of entities in a cache server, and what happens when an entity changes.

    Parameters
    ----------
    client:
        Client of the server.
    prefix:
        Prefix of all keys; an entity's name must not contain a colon.
    parts:
        Parts each entity has, numbered from 0.
    ttl_s:
        Time to live of every entry, whatever else happens, in seconds.
    """

    #: Whether nothing outdated may be read once :meth:`invalidate` has returned.
    promises_fresh = True

    def __init__(self, client: redis.Redis, prefix: str, parts: int, ttl_s: int) -> None:
        self.client = client
        self.prefix = prefix
        self.parts = parts
        self.ttl_s = ttl_s

    def key(self, entity: str, part: int) -> str:
        """Return the key of one part."""
        return f"{self.prefix}entry:{entity}:{part}"

    def put(self, entity: str, part: int, value: bytes) -> None:
        """Store one part."""
        self.put_many([(entity, part, value)])

    def put_many(self, entries: Iterable[tuple[str, int, bytes]]) -> None:
        """Store several parts in one round trip."""
        pipe = self.client.pipeline(transaction=False)
        for entity, part, value in entries:
            pipe.set(self.key(entity, part), value, ex=self.ttl_s)
            self._note(pipe, entity, part)
        pipe.execute()

    def _note(self, pipe: redis.client.Pipeline, entity: str, part: int) -> None:  # noqa: B027
        """Write down, in the same round trip, what invalidation will need; mostly nothing."""

    def get(self, entity: str, part: int) -> bytes | None:
        """Return one part, or None if it is not there."""
        return self.client.get(self.key(entity, part))

    @abstractmethod
    def invalidate(self, entity: str) -> None:
        """The entity has changed; returning acknowledges that the cache knows."""

    def garbage(self) -> list[bytes]:
        """Return the keys of entries that can never be read again but still take memory."""
        return []


class TimeToLive(Invalidation):
    """Nobody is told: outdated entries are served until they expire."""

    promises_fresh = False

    def invalidate(self, entity: str) -> None:
        """See :meth:`Invalidation.invalidate`."""


class Event(Invalidation):
    """The writer knows every key that depends on the entity and deletes them."""

    def invalidate(self, entity: str) -> None:
        """See :meth:`Invalidation.invalidate`."""
        self.client.unlink(*(self.key(entity, part) for part in range(self.parts)))


class Tag(Invalidation):
    """A set per entity lists its keys; the set is read and everything in it deleted.

    The set outlives its entries a little, so that it never misses one that is still there. A part
    stored between reading the set and deleting it would be forgotten by it, so both happen in one
    script on the server.
    """

    _SCRIPT = """
    local keys = redis.call('SMEMBERS', KEYS[1])
    for first = 1, #keys, 1000 do
        redis.call('UNLINK', unpack(keys, first, math.min(first + 999, #keys)))
    end
    redis.call('UNLINK', KEYS[1])
    return #keys
    """

    def __init__(self, client: redis.Redis, prefix: str, parts: int, ttl_s: int) -> None:
        super().__init__(client, prefix, parts, ttl_s)
        self._script = client.register_script(self._SCRIPT)

    def _tag(self, entity: str) -> str:
        return f"{self.prefix}tag:{entity}"

    def _note(self, pipe: redis.client.Pipeline, entity: str, part: int) -> None:
        pipe.sadd(self._tag(entity), self.key(entity, part))
        pipe.expire(self._tag(entity), self.ttl_s + 60)

    def invalidate(self, entity: str) -> None:
        """See :meth:`Invalidation.invalidate`."""
        self._script(keys=[self._tag(entity)])


class Pattern(Invalidation):
    """SCAN walks all keys of the server for the entity's prefix and deletes what it finds."""

    def invalidate(self, entity: str) -> None:
        """See :meth:`Invalidation.invalidate`."""
        delete_prefix(self.client, f"{self.prefix}entry:{entity}:")


class VersionInKey(Invalidation):
    """The entity's version is part of every key; raising it makes the old entries unreachable.

    A read asks for the version first. The old entries stay until they expire.
    """

    def _counter(self, entity: str) -> str:
        return f"{self.prefix}version:{entity}"

    def _versions(self, entities: list[str]) -> dict[str, int]:
        found = self.client.mget([self._counter(entity) for entity in entities])
        return {entity: int(version or 0) for entity, version in zip(entities, found, strict=True)}

    def put_many(self, entries: Iterable[tuple[str, int, bytes]]) -> None:
        """Store several parts under the present versions of their entities."""
        entries = list(entries)
        versions = self._versions(list(dict.fromkeys(entity for entity, _, _ in entries)))
        pipe = self.client.pipeline(transaction=False)
        for entity, part, value in entries:
            pipe.set(f"{self.key(entity, part)}:{versions[entity]}", value, ex=self.ttl_s)
        pipe.execute()

    def get(self, entity: str, part: int) -> bytes | None:
        """See :meth:`Invalidation.get`."""
        version = self._versions([entity])[entity]
        return self.client.get(f"{self.key(entity, part)}:{version}")

    def invalidate(self, entity: str) -> None:
        """See :meth:`Invalidation.invalidate`."""
        self.client.incr(self._counter(entity))

    def garbage(self) -> list[bytes]:
        """See :meth:`Invalidation.garbage`."""
        # Marks of the pattern language in the prefix stand for themselves.
        literal = re.sub(r"([*?\[\]^\\])", r"\\\1", self.prefix)
        keys = list(self.client.scan_iter(match=f"{literal}entry:*", count=1000))
        names = {key: key.decode()[len(self.prefix) :].split(":") for key in keys}
        entities = sorted({name[1] for name in names.values()})
        versions = self._versions(entities) if entities else {}
        return [key for key, name in names.items() if int(name[3]) != versions[name[1]]]


class Flush(Invalidation):
    """Everything is deleted, whatever it was about. For a server that is this cache's alone."""

    def invalidate(self, entity: str) -> None:
        """See :meth:`Invalidation.invalidate`."""
        self.client.flushdb(asynchronous=True)


#: Methods by name.
METHODS: dict[str, type[Invalidation]] = {
    "ttl": TimeToLive,
    "event": Event,
    "tag": Tag,
    "pattern": Pattern,
    "version": VersionInKey,
    "flush": Flush,
}


def build(name: str, client: redis.Redis, prefix: str, parts: int, ttl_s: int) -> Invalidation:
    """Return the named method over an empty part of the server.

    Raises
    ------
    InputError
        If there is no such method; the message names the known ones.
    """
    one_of("invalidation", name, METHODS)
    return METHODS[name](client, prefix, parts, ttl_s)
