"""One call to the configured server, and to no other: raw bytes out, raw bytes in, within limits."""

from __future__ import annotations

import asyncio
import re
import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from kvbench.caching.proxy.settings import Settings
from kvbench.caching.proxy.tenancy import Header, passed_back

BAD_GATEWAY = 502
GATEWAY_TIMEOUT = 504

#: What no header may hold (RFC 9110, section 5.5).
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class UpstreamError(Exception):
    """The server behind could not be used; carries the status for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Call:
    """A request as it goes to the server."""

    method: str
    target: bytes
    headers: Sequence[Header]
    body: bytes | AsyncIterator[bytes]


@dataclass(frozen=True)
class Answer:
    """The head of an answer, and its pieces as they come."""

    status: int
    headers: list[Header]
    length: int | None
    pieces: AsyncIterator[bytes]


class Upstream:
    """The server behind, over a connection of its own for each call.

    What a server sends beyond its answer would be read as the answer to the next request on that
    connection, which may be another tenant's; and a server that closes an idle connection while a
    request is on its way cannot be told from one that crashed over it. So none is used twice.

    The transport is used without a client around it: no redirects are followed, no cookies are
    remembered, and no proxy of the environment is asked.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._base = httpx.URL(settings.upstream)
        self._path = self._base.raw_path.rstrip(b"/")
        #: Name of this proxy in ``Via``: a request that comes back with it runs in a circle.
        self.name = f"kvbench-{secrets.token_hex(8)}"
        context = ssl.create_default_context() if self._base.scheme == "https" else False
        self._transport = httpx.AsyncHTTPTransport(
            verify=context,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            retries=0,
        )

    @asynccontextmanager
    async def answer(
        self, call: Call, sent: Callable[[], None] = lambda: None
    ) -> AsyncIterator[Answer]:
        """Send a request; give its answer while the block runs, and drop the connection after it.

        Raises
        ------
        UpstreamError
            On entering, if there is no answer; from the pieces, if it ends early; from either, if
            it takes too long.
        """
        settings = self._settings
        loop = asyncio.get_running_loop()
        deadline = (
            None if settings.total_timeout_s is None else loop.time() + settings.total_timeout_s
        )
        request = httpx.Request(
            call.method,
            self._base,
            headers=[
                *call.headers,
                # Stored bytes are served to clients that may accept other encodings.
                (b"accept-encoding", b"identity"),
                (b"connection", b"close"),
                (b"via", f"1.1 {self.name}".encode()),
            ],
            content=call.body,
            extensions={
                "target": self._target(call.target),
                "timeout": {
                    "connect": settings.connect_timeout_s,
                    "read": settings.read_timeout_s,
                    "write": settings.read_timeout_s,
                    "pool": None,
                },
            },
        )
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._transport.handle_async_request(request)
        except (TimeoutError, httpx.TransportError, ValueError) as error:
            raise _explained(error) from error
        try:
            _check_head(response)
            length = response.headers.get("content-length")
            if "transfer-encoding" in response.headers:
                # The chunks say how long it is (RFC 9112, section 6.3).
                length = None
            yield Answer(
                response.status_code,
                passed_back(response.headers.raw),
                int(length) if length is not None and length.isdigit() else None,
                _limited(response, deadline),
            )
        finally:
            await response.aclose()

    async def close(self) -> None:
        """Close the idle connections."""
        await self._transport.aclose()

    def _target(self, target: bytes) -> bytes:
        """Return path and query at the server.

        The client was given .../v1 as its base URL, and so was the proxy: it counts once.
        """
        path = self._path
        if path and (target == path or target.startswith((path + b"/", path + b"?"))):
            return target
        return path + target


def _check_head(response: httpx.Response) -> None:
    """Raise UpstreamError for a head that must not be passed on."""
    if not 200 <= response.status_code <= 599:
        raise UpstreamError(BAD_GATEWAY, f"the server answered {response.status_code}")
    for name, value in response.headers.raw:
        if _CONTROL.search(value):
            shown = name.decode("latin-1")
            raise UpstreamError(BAD_GATEWAY, f"the server's header {shown} cannot be passed on")


async def _limited(response: httpx.Response, deadline: float | None) -> AsyncIterator[bytes]:
    pieces = response.stream.__aiter__()  # type: ignore[union-attr]
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except (TimeoutError, httpx.TransportError) as error:
            raise _explained(error) from error
        if piece:
            yield piece


def _explained(error: Exception) -> UpstreamError:
    if isinstance(error, (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout)):
        return UpstreamError(GATEWAY_TIMEOUT, "the server took too long")
    reason = str(error) or type(error).__name__
    return UpstreamError(BAD_GATEWAY, f"the server cannot be used: {reason}")
