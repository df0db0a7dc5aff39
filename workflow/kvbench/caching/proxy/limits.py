"""Limits of one client connection, below the application: open connections, heads, slow senders.

HTTP itself is read by httptools (llhttp). It refuses what RFC 9112 calls malformed: a header line
without a colon, a space before the colon, lengths that repeat or differ, a length beside chunks, a
bare CR or LF, folded lines, and numbers that are none. h11 lets several of these pass.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kvbench.caching.proxy.metrics import Metrics
from kvbench.caching.proxy.settings import Settings

_REFUSALS = {
    "connections": b"503 Service Unavailable",
    "header": b"431 Request Header Fields Too Large",
    "slow": b"408 Request Timeout",
}


#: Requests that a client may send ahead of the answers, and bytes of their bodies.
_MOST_AHEAD = 16
_LARGEST_AHEAD = 64 * 2**10


class _Corked:
    """A transport that can hold small writes back, so that head and body leave in one packet."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, or hold until :meth:`uncork`."""
        if self._held is None:
            self._transport.write(data)
        else:
            self._held.append(data)

    def cork(self) -> None:
        """Hold what is written from now on."""
        self._held = []

    def close(self) -> None:
        """Write what was held, and close behind it."""
        self.uncork()
        self._transport.close()

    def uncork(self) -> None:
        """Write what was held."""
        held, self._held = self._held, None
        if held:
            self._transport.write(b"".join(held))


class _TooLarge(Exception):
    """What a client sends is more than is held of it: a head, or requests ahead of the answers."""


def protocol(settings: Settings, metrics: Metrics) -> type[HttpToolsProtocol]:
    """Return the protocol class of a proxy's connections."""

    class Bounded(HttpToolsProtocol):
        """uvicorn's protocol, with a head that is bounded in bytes and in time."""

        _head: int | None = 0
        _begun = False
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(_Corked(transport))  # type: ignore[arg-type]
            #: Requests that are not answered yet; uvicorn knows the last one only.
            self._open: list[RequestResponseCycle] = []
            metrics.connections.set(len(self.connections))
            if len(self.connections) > settings.max_connections:
                self._refuse("connections")
                return
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)
            for cycle in self._open:
                # The one that is answered now, where another was sent ahead of its answer.
                cycle.disconnected = cycle.disconnected or not cycle.response_complete
                cycle.message_event.set()
            metrics.connections.set(len(self.connections))

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._head is None:
                super().data_received(data)
                return
            if self._deadline is None:
                self._await_head()
            self._head += len(data)
            super().data_received(data)
            if self._head is not None and self._head > settings.max_header_bytes:
                self._refuse("header")
            elif self._begun and self._deadline is None:
                # The beginning of a next request came with the end of this one.
                self._await_head()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["state"] |= {
                "abort": self.transport.abort,
                "cork": self.transport.cork,  # type: ignore[attr-defined]
                "uncork": self.transport.uncork,  # type: ignore[attr-defined]
                "congested": self._congested,
                "received": self._received,
            }
            self._begun = True
            self._size = 0

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value) + 4)
            # A trailer behind a chunked body is no header: it may name somebody else, and comes
            # after everything that looked at the headers.
            if self._begun:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._head = None
            self._begun = False
            self._stop_waiting()
            self.scope["state"]["url"] = self.url
            super().on_headers_complete()
            self._open = [cycle for cycle in self._open if not cycle.response_complete]
            self._open.append(self.cycle)
            self._keep_watching()

        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            self._keep_watching()

        def on_message_complete(self) -> None:
            self._head = 0
            super().on_message_complete()
            if self.cycle.response_complete:
                # The answer did not wait for the body; what is due now is the next head.
                self._stop_waiting()
                self._await_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._head is None and self.cycle.response_complete:
                # The rest of a body that nobody reads must come within the time of any other.
                self._stop_waiting()
                self._await_head()

        def send_400_response(self, msg: str) -> None:
            if not self.transport.is_closing():
                metrics.refused.labels("malformed").inc()
                super().send_400_response(msg)

        def _keep_watching(self) -> None:
            """Read on behind requests that were sent ahead, within bounds.

            uvicorn stops reading there, and so would not notice that the client left.
            """
            if not self.pipeline:
                return
            held = sum(len(cycle.body) for cycle, _ in self.pipeline)
            if len(self.pipeline) > _MOST_AHEAD or held > _LARGEST_AHEAD:
                self._refuse("ahead")
                raise _TooLarge
            self.flow.resume_reading()

        def _congested(self) -> bool:
            """Whether a write has to wait for the client to take what was written before."""
            return self.flow.write_paused

        def _received(self) -> bool:
            """Whether the body of the request that is answered now is there, to its end.

            ``cycle`` is the last request whose head was read; those before it are whole.
            """
            return not self.cycle.more_body

        def _count(self, size: int) -> None:
            self._size += size
            if self._size > settings.max_header_bytes:
                self._refuse("header")
                raise _TooLarge

        def _await_head(self) -> None:
            self._deadline = self.loop.call_later(settings.receive_timeout_s, self._refuse, "slow")

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _refuse(self, reason: str) -> None:
            """Say why, and close; nothing that is still on its way is read."""
            self._stop_waiting()
            if self.transport.is_closing():
                return
            metrics.refused.labels(reason).inc()
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(
                    b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    % _REFUSALS[reason]
                )
            self.transport.close()

    return Bounded
