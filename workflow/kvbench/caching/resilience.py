"""What keeps a request alive when the cache server does not: short timeouts and a circuit breaker.

Also the faults to try it on, made of real sockets on the loopback interface: a port that refuses,
one that swallows everything, and a proxy that delays what a real server answers.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from redis.backoff import NoBackoff
from redis.retry import Retry

from kvbench.caching.response_cache import Backend, BackendError, Miss


def impatient(timeout_s: float) -> dict[str, Any]:
    """Return client options that bound what a dead server can cost: short timeouts, no retry.

    redis-py's defaults retry with growing pauses and wait without limit for an answer, which
    turns "fall back to the model" into seconds per request.
    """
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
    }


class CircuitOpen(BackendError):
    """The breaker is open: the store was not asked at all."""


class CircuitBreaker:
    """Stops asking a store that keeps failing, and tries again now and then (M. Nygard, 2007).

    Closed: calls pass. After ``failures`` failures in a row it opens: calls fail at once. After
    ``reset_s`` seconds one call is let through (half open); its success closes the breaker, its
    failure opens it for another ``reset_s``.
    """

    def __init__(
        self, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if failures < 1 or not reset_s > 0:
            raise ValueError("a breaker needs at least one failure and a reset time above zero")
        self._failures = failures
        self._reset_s = reset_s
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._retry_at: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls are refused (all but the one probe after ``reset_s``)."""
        with self._lock:
            return self._retry_at is not None

    def call(self, action: Callable[[], Any]) -> Any:
        """Return ``action()``, or raise :class:`CircuitOpen` without calling it.

        Raises
        ------
        BackendError
            What ``action`` raised; only this exception counts as a failure of the store.
        """
        with self._lock:
            if self._retry_at is not None:
                now = self._clock()
                if now < self._retry_at:
                    raise CircuitOpen("circuit open")
                # Claimed under the lock, so that one thread probes and the others stay away.
                self._retry_at = now + self._reset_s
        try:
            result = action()
        except BackendError:
            with self._lock:
                self._in_a_row += 1
                if self._in_a_row >= self._failures:
                    self._retry_at = self._clock() + self._reset_s
            raise
        with self._lock:
            self._in_a_row = 0
            self._retry_at = None
        return result


class GuardedBackend:
    """A backend behind a :class:`CircuitBreaker`."""

    def __init__(self, backend: Backend, breaker: CircuitBreaker) -> None:
        self._backend = backend
        self.breaker = breaker

    def get(self, key: str) -> bytes | Miss:
        """Return the stored bytes, or ``MISS``."""
        return self.breaker.call(lambda: self._backend.get(key))

    def set(self, key: str, value: bytes, ttl_s: float | None = None) -> None:
        """Store bytes."""
        self.breaker.call(lambda: self._backend.set(key, value, ttl_s))

    def delete(self, key: str) -> None:
        """Forget an entry."""
        self.breaker.call(lambda: self._backend.delete(key))

    def footprint(self) -> tuple[int, int]:
        """Return entries and bytes."""
        return self.breaker.call(self._backend.footprint)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()


@contextmanager
def refused_port() -> Iterator[int]:
    """Yield a loopback port that refuses connections for as long as the block runs.

    The socket stays bound without listening, so nobody else can take the port meanwhile.
    """
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def black_hole() -> Iterator[int]:
    """Yield a loopback port that accepts connections and never answers a byte."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield listener.getsockname()[1]


@contextmanager
def slow_proxy(connect: Callable[[], socket.socket], delay_s: float) -> Iterator[int]:
    """Yield a loopback port that forwards to a real server and holds each answer back.

    Parameters
    ----------
    connect:
        Opens a connection to the real server.
    delay_s:
        Seconds by which every chunk of the server's answers is delayed.
    """
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    stopping = threading.Event()
    open_sockets = [listener]
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, target: socket.socket, wait_s: float) -> None:
        with suppress(OSError):
            while chunk := source.recv(65536):
                if stopping.wait(wait_s):
                    break
                target.sendall(chunk)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while not stopping.is_set():
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = connect()
            except OSError:
                near.close()
                continue
            open_sockets.extend((near, far))
            for source, target, wait_s in ((near, far, 0.0), (far, near, delay_s)):
                thread = threading.Thread(target=pump, args=(source, target, wait_s), daemon=True)
                threads.append(thread)
                thread.start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stopping.set()
        for end in open_sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in (acceptor, *threads):
            thread.join(timeout=2.0)
