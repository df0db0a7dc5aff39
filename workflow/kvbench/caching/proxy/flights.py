"""Calls under way that several clients may read: each from the beginning, at its own pace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from kvbench.caching.proxy.questions import Form
from kvbench.caching.proxy.tenancy import Header
from kvbench.caching.proxy.upstream import Call, Upstream, UpstreamError

#: Called with the whole answer before its readers see the end of it.
Finish = Callable[["Flight"], Awaitable[None]]


@dataclass(eq=False)
class Flight:
    """One call to the server and what has come of it so far.

    Attributes
    ----------
    form:
        Form of the answer that was asked for.
    status, headers, length:
        Head of the answer; the status is 0 until it is there.
    error:
        Why it ended, if not in order.
    whole:
        Whether every byte so far is still held, so that a new reader can start.
    done:
        Whether it has ended.
    stopping:
        Whether it was told to stop.
    started_at, head_at:
        When the call began and when its head was there, on the event loop's clock.
    """

    form: Form
    keep: int
    status: int = 0
    headers: list[Header] = field(default_factory=list)
    length: int | None = None
    error: UpstreamError | None = None
    whole: bool = True
    done: bool = False
    started_at: float = 0.0
    head_at: float = 0.0
    _pieces: list[bytes] = field(default_factory=list)
    _size: int = 0
    _first: int = 0
    _places: dict[int, int] = field(default_factory=dict)
    _numbers: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _moved: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    stopping: bool = False

    @property
    def body(self) -> bytes:
        """All bytes so far; meaningful while :attr:`whole`."""
        return b"".join(self._pieces)

    @property
    def can_be_joined(self) -> bool:
        """Whether a new reader gets all of it: nothing is forgotten, and it is not being stopped.

        Between the order to stop and the end of the task a moment passes, in which it is not done yet.
        The task itself cannot tell: libraries cancel it for a moment and take that back, httpx while
        it connects.
        """
        return self.whole and not self.done and not self.stopping

    async def head(self) -> None:
        """Wait until the head of the answer is there; raise what ended the call before."""
        while not self.status and not self.done:
            await self._changed.wait()
        if not self.status:
            raise self.error or UpstreamError(502, "the call was stopped")

    async def end(self) -> None:
        """Wait until the call has ended."""
        while not self.done:
            await self._changed.wait()

    @property
    def readers(self) -> int:
        """Clients that wait for it or read it."""
        return len(self._places)

    def join(self) -> int:
        """Count a reader more; return its number. From now on nothing is forgotten before it."""
        self._numbers += 1
        self._places[self._numbers] = 0
        return self._numbers

    def drop(self, reader: int) -> None:
        """Count a reader less."""
        del self._places[reader]
        self._moved.set()

    async def read(self, reader: int) -> AsyncIterator[bytes]:
        """Yield the pieces from the first on; raise if the answer breaks off."""
        while True:
            while (place := self._places[reader]) < self._first + len(self._pieces):
                yield self._pieces[place - self._first]
                self._places[reader] = place + 1
                self._moved.set()
            if self.done:
                break
            await self._changed.wait()
        if self.error is not None:
            raise self.error

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._size += len(piece)
        self._tell()
        if self._size <= self.keep:
            return
        # Too much to keep: from here on only what the slowest reader has not read yet is held,
        # and the server is not read faster than that reader.
        self.whole = False
        while self._trim() > self.keep and self._places:
            self._moved.clear()
            await self._moved.wait()

    def _trim(self) -> int:
        """Forget what everybody has read; return the bytes that are left."""
        slowest = min(self._places.values(), default=self._first + len(self._pieces))
        if slowest > self._first:
            del self._pieces[: slowest - self._first]
            self._first = slowest
        return sum(map(len, self._pieces))

    async def run(self, upstream: Upstream, call: Call, finish: Finish) -> None:
        """Make the call; to be run as a task."""
        received = 0
        last = b""
        try:
            async with upstream.answer(call) as answer:
                self.headers, self.length = answer.headers, answer.length
                self.head_at = asyncio.get_running_loop().time()
                self.status = answer.status
                self._tell()
                async for piece in answer.pieces:
                    received += len(piece)
                    # A client that knows the length has the whole answer with its last piece, and
                    # may ask again before it is stored: that piece waits. A stream is not held
                    # back, because its end is a message of its own.
                    if self.length is not None and received >= self.length:
                        last += piece
                    else:
                        await self._add(piece)
            if last:
                self._pieces.append(last)
                self._size += len(last)
                self.whole = self.whole and self._size <= self.keep
            await finish(self)
        except UpstreamError as error:
            self.error = error
        except asyncio.CancelledError:
            self.error = UpstreamError(502, "the call was stopped")
        finally:
            self.done = True
            self._tell()


class Flights:
    """The calls under way by key.

    Parameters
    ----------
    linger_s:
        How long a call goes on after its last reader left.
    stopped:
        Called when one is stopped because nobody came back.
    """

    def __init__(self, linger_s: float, stopped: Callable[[], None]) -> None:
        self._linger_s = linger_s
        self._stopped = stopped
        self._flights: dict[str, Flight] = {}
        self._running: set[asyncio.Task[None]] = set()
        #: Calls that have ended so far; what they gave is kept by then.
        self.ended = 0

    def __len__(self) -> int:
        return len(self._running)

    def get(self, key: str) -> Flight | None:
        """Return the call of a key if it is under way and can be read from its beginning."""
        flight = self._flights.get(key)
        return flight if flight is not None and flight.can_be_joined else None

    def start(
        self, key: str, flight: Flight, upstream: Upstream, call: Call, finish: Finish
    ) -> Flight:
        """Begin a call, in place of another of the same key."""
        flight.started_at = asyncio.get_running_loop().time()
        task = asyncio.create_task(flight.run(upstream, call, finish))
        flight.task = task
        self._flights[key] = flight
        self._running.add(task)

        def gone(_: asyncio.Task[None]) -> None:
            self._running.discard(task)
            self.ended += 1
            if self._flights.get(key) is flight:
                del self._flights[key]

        task.add_done_callback(gone)
        return flight

    def leave(self, flight: Flight, reader: int) -> None:
        """Count a reader less; the last one stops the call, unless somebody comes back soon."""
        flight.drop(reader)
        if flight.readers > 0 or flight.done:
            return
        if self._linger_s == 0 or not flight.whole:
            self._stop(flight)
        else:
            asyncio.get_running_loop().call_later(self._linger_s, self._stop, flight)

    async def close(self) -> None:
        """Stop every call."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _stop(self, flight: Flight) -> None:
        if flight.readers > 0 or flight.done or flight.stopping:
            return
        if flight.task is not None:
            flight.stopping = True
            flight.task.cancel()
            self._stopped()
