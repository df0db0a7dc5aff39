"""Two levels in front of a slow source: a private memory (L1) and a shared server (L2).

What keeps L1 honest:

* an L1 entry never outlives the L2 entry it was copied from: its deadline is counted from before
  the moment at which the server told the entry's remaining life;
* an invalidation deletes the L2 entry, gives the key a new version and is published to every L1,
  in one transaction;
* a value loaded while its key was invalidated is returned to whoever asked before, but stored
  nowhere, because the version it was loaded under is no longer current;
* an L1 that cannot hear the server (connection lost) is emptied and left aside until it can.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import redis

from kvbench.caching.response_cache import MISS, MemoryBackend

#: Stores a value only if the key still has the version under which it was loaded.
_STORE = """
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""

_LISTEN_S = 0.05


@dataclass(frozen=True)
class Found:
    """A value and the level that gave it: 1 memory, 2 server, 3 the source."""

    value: bytes
    level: Literal[1, 2, 3]


class LayeredCache:
    """L1 memory, L2 server, L3 the function that loads; one instance per worker process.

    Parameters
    ----------
    client:
        Client of the shared server, or None for an L1 alone.
    namespace:
        Prefix of all keys of this cache on the server; equal for all workers.
    ttl_s:
        Life of an entry in L2 (and in L1 where there is no L2).
    l1_capacity:
        Entries of L1; 0 for no L1.
    l1_ttl_s:
        Longest life in L1; never more than what is left in L2, whatever is asked here.
    promote:
        Whether an L2 hit is copied into L1. Without it only loaded values enter L1.
    coherence:
        ``broadcast``: L1 hits cost no round trip, and an invalidation reaches other workers as
        fast as a published message (not at once). ``validate``: every L1 hit asks the server for
        the key's version, so that no read after an acknowledged invalidation is stale.
    """

    def __init__(
        self,
        client: redis.Redis | None,
        namespace: str,
        *,
        ttl_s: float,
        l1_capacity: int,
        l1_ttl_s: float | None = None,
        promote: bool = True,
        coherence: Literal["broadcast", "validate"] = "broadcast",
    ) -> None:
        if not ttl_s > 0:
            raise ValueError(f"ttl_s is {ttl_s}; it must be above zero")
        if client is None and l1_capacity < 1:
            raise ValueError("neither L1 nor L2: nothing would be cached")
        if coherence not in ("broadcast", "validate"):
            raise ValueError(f"coherence is {coherence!r}; it must be broadcast or validate")
        self._client = client
        self._namespace = namespace
        self._ttl_s = ttl_s
        self._l1_ttl_s = ttl_s if l1_ttl_s is None else min(ttl_s, l1_ttl_s)
        self._l1 = MemoryBackend(l1_capacity) if l1_capacity else None
        self._promote = promote
        self._validate = coherence == "validate"
        self._lock = threading.Lock()
        # Raised by every invalidation that arrives; a copy begun before is not put into L1.
        self._epoch = 0
        self._hearing = threading.Event()
        self._closing = threading.Event()
        self._listener: threading.Thread | None = None
        #: What the server last refused; requests are served from the source all the same.
        self.last_failure: str | None = None
        self._store_script = None if client is None else client.register_script(_STORE)
        if client is None or self._validate or self._l1 is None:
            self._hearing.set()
        else:
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()

    def get(self, key: str, load: Callable[[], bytes]) -> Found:
        """Return the value of ``key`` from the nearest level that has it.

        What ``load`` raises is passed on, and nothing is stored. A failing server is passed by.
        """
        if self._client is None:
            return self._get_alone(key, load)
        value = self._from_l1(key)
        if value is not None:
            return Found(value, 1)
        epoch = self._epoch
        before = time.monotonic()
        try:
            pipeline = self._client.pipeline(transaction=True)
            pipeline.get(self._entry(key)).pttl(self._entry(key)).get(self._version(key))
            stored, left_ms, version = pipeline.execute()
        except (redis.RedisError, OSError) as error:
            self.last_failure = str(error) or type(error).__name__
            # Without the server no invalidation could reach L1, so nothing is stored there.
            return Found(load(), 3)
        version = version or b""
        if stored is not None:
            if self._promote:
                self._to_l1(key, stored, version, before + left_ms / 1000, epoch)
            return Found(stored, 2)
        value = load()
        before = time.monotonic()
        try:
            # L2 before L1: what L1 holds must be in L2 as well, or its deadline means nothing.
            if self._store_script(
                keys=[self._entry(key), self._version(key)],
                args=[version, value, max(1, round(self._ttl_s * 1000))],
            ):
                self._to_l1(key, value, version, before + self._ttl_s, epoch)
        except (redis.RedisError, OSError) as error:
            self.last_failure = str(error) or type(error).__name__
        return Found(value, 3)

    def invalidate(self, key: str) -> None:
        """Forget ``key`` in L2 and in every worker's L1.

        On return no worker gets the old value from L2, and none can put it back. Another worker's
        L1 may serve it until the published message arrives (``broadcast``), or never again
        (``validate``).

        Raises
        ------
        redis.RedisError
            If the server did not confirm: then the old value may still be served.
        """
        self._forget(key)
        if self._client is None:
            return
        pipeline = self._client.pipeline(transaction=True)
        pipeline.unlink(self._entry(key))
        # Random rather than counted, so that a version which expired can never come back; it has
        # to outlive every load that began before it.
        pipeline.set(
            self._version(key), secrets.token_hex(8), px=max(60_000, round(self._ttl_s * 1000))
        )
        pipeline.publish(self._channel, key)
        pipeline.execute()
        self._forget(key)

    def wait_until_coherent(self, timeout_s: float = 5.0) -> bool:
        """Wait until this L1 hears invalidations; until then it is not used. Return whether."""
        return self._hearing.wait(timeout_s)

    def close(self) -> None:
        """Stop listening. The client belongs to the caller."""
        self._closing.set()
        if self._listener is not None:
            self._listener.join()

    @property
    def _channel(self) -> str:
        return f"{self._namespace}invalidated"

    def _entry(self, key: str) -> str:
        return f"{self._namespace}e:{key}"

    def _version(self, key: str) -> str:
        return f"{self._namespace}v:{key}"

    def _get_alone(self, key: str, load: Callable[[], bytes]) -> Found:
        value = self._l1.get(key)
        if value is not MISS:
            return Found(value, 1)
        epoch = self._epoch
        value = load()
        self._to_l1(key, value, b"", time.monotonic() + self._ttl_s, epoch)
        return Found(value, 3)

    def _from_l1(self, key: str) -> bytes | None:
        """Return what L1 holds of ``key``, unless it may not be trusted."""
        if self._l1 is None or not self._hearing.is_set():
            return None
        held = self._l1.get(key)
        if held is MISS:
            return None
        if not self._validate:
            return held
        # Each L1 value of this mode starts with the length and the text of its version.
        length = held[0]
        try:
            current = self._client.get(self._version(key)) or b""
        except (redis.RedisError, OSError):
            return None
        return held[1 + length :] if current == held[1 : 1 + length] else None

    def _to_l1(self, key: str, value: bytes, version: bytes, deadline: float, epoch: int) -> None:
        if self._l1 is None:
            return
        if self._client is not None and self._validate:
            value = bytes([len(version)]) + version + value
        with self._lock:
            left_s = min(deadline - time.monotonic(), self._l1_ttl_s)
            if epoch == self._epoch and self._hearing.is_set() and left_s > 0:
                self._l1.set(key, value, left_s)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._epoch += 1
            if self._l1 is not None:
                self._l1.delete(key)

    def _forget_all(self) -> None:
        with self._lock:
            self._epoch += 1
            self._hearing.clear()
            self._l1.clear()

    def _listen(self) -> None:
        """Apply published invalidations; on a lost connection empty L1 and connect again."""
        while not self._closing.is_set():
            subscription = self._client.pubsub()
            try:
                subscription.subscribe(self._channel)
                while not self._closing.is_set():
                    message = subscription.get_message(timeout=_LISTEN_S)
                    if message is None:
                        continue
                    if message["type"] == "subscribe":
                        # Whatever happened before this moment was not heard.
                        self._forget_all()
                        self._hearing.set()
                    elif message["type"] == "message":
                        self._forget(message["data"].decode())
            except (redis.RedisError, OSError):
                self._forget_all()
                self._closing.wait(_LISTEN_S)
            finally:
                with suppress(redis.RedisError, OSError):
                    subscription.close()
