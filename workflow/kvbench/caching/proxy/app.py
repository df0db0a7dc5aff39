"""The proxy itself: what happens to a request between the client and the server."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router

from kvbench.caching.proxy import answers, limits
from kvbench.caching.proxy.directives import Wishes, freshness, wishes
from kvbench.caching.proxy.flights import Flight, Flights
from kvbench.caching.proxy.metrics import Metrics
from kvbench.caching.proxy.questions import NotCacheable, Question, parsed, question_of
from kvbench.caching.proxy.reasons import Reasons
from kvbench.caching.proxy.secret import digest, secret_of
from kvbench.caching.proxy.semantic import Encoder, Guard, Semantic
from kvbench.caching.proxy.settings import Settings, is_loopback
from kvbench.caching.proxy.stores import Entry, StoreError, opened
from kvbench.caching.proxy.tenancy import Header, forwarded, kept, tenant, varies
from kvbench.caching.proxy.upstream import Call, Upstream, UpstreamError
from kvbench.errors import InputError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_LOG = logging.getLogger("kvbench.proxy")

#: Bodies above this are parsed in a thread, so that no other request waits for them; answers above
#: it are sent in pieces.
_LARGE = 64 * 2**10
#: Keys of bodies up to this are remembered by the bytes, and of how many: 16 MiB at most.
_SMALL = 16 * 2**10
_MOST_QUESTIONS = 1024
#: A body may take longer than the limit only if it comes at least this fast, in bytes a second.
_SLOWEST = 16 * 2**10
#: Window of an answer that only passes through.
_PASSING = 2**20

#: Segments of a path that would lead out of it.
_DOTS = re.compile(rb"(?:^|[/\\])(?:\.|%2e){1,2}(?:[/\\;]|%2f|%5c|$)", re.IGNORECASE)

#: A name or an address, and perhaps a port (RFC 9110, section 7.2).
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:@/\[\]]*))(?::\d*)?")

#: What a deletion names.
_NAMED = re.compile(r"^(/cache/[a-z]+)/.*", re.DOTALL)

#: Letters of a question that is kept for a later process; no encoder here reads as many.
_LONGEST_KEPT = 8 * 2**10

#: Ends of the paths whose answers are cached.
_CACHED = (b"/chat/completions", b"/embeddings")

#: Reasons for which a stored answer was passed over.
_RENEWING = frozenset({"no-cache", "max-age", "min-fresh", "form"})

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class _Refused(Exception):
    """The request gets an error from the proxy itself."""

    def __init__(self, status: int, message: str, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class _Left(Exception):
    """The client is gone, or takes nothing: there is nobody to answer."""


@dataclass
class _Exchange:
    """One request and what is said of it in headers, metrics and log."""

    scope: Scope
    receive: Receive
    send: Send
    started: float = field(default_factory=time.perf_counter)
    cache: str = "bypass"
    reason: str = ""
    status: int = 0
    sent: int = 0
    key: str = ""

    @property
    def headers(self) -> list[Header]:
        return self.scope["headers"]

    def header(self, name: bytes) -> str:
        """Return the first value of a header, or ""."""
        return next((v.decode("latin-1") for n, v in self.headers if n == name), "")

    def labels(self) -> list[Header]:
        """Return the headers that say what the cache did."""
        said = [(b"x-cache", self.cache.encode())]
        if self.reason:
            said.append((b"x-cache-reason", self.reason.encode("latin-1", "replace")))
        if self.key:
            said.append((b"x-cache-key", self.key.encode()))
        return said


class Proxy:
    """The cache and the listening server around it.

    Parameters
    ----------
    settings:
        See :class:`Settings`; checked here.
    encoder:
        Needed if ``settings.threshold`` is not None.
    second_opinion:
        A further guard of semantic hits.

    Raises
    ------
    InputError
        If a setting is wrong, or the address cannot be listened on.
    """

    def __init__(
        self,
        settings: Settings,
        encoder: Encoder | None = None,
        second_opinion: Guard | None = None,
    ) -> None:
        settings.check()
        if settings.threshold is not None and encoder is None:
            raise InputError("--threshold needs a sentence encoder")
        self.settings = settings
        self.metrics = Metrics()
        self._money_saved = self.metrics.money.labels(settings.currency)
        self._secret = secret_of(settings)
        self._neutral = frozenset(name.lower().encode() for name in settings.neutral_headers)
        self._reasons = Reasons()
        # Two at a time: a body of the largest size may take a hundred times its bytes when read.
        self._readers = ThreadPoolExecutor(2, "proxy-reader")
        self._questions: OrderedDict[bytes, Question] = OrderedDict()
        self._semantic: Semantic | None = None
        if settings.threshold is not None and encoder is not None:
            self._semantic = Semantic(settings, encoder, _guards(settings, second_opinion))
        self.store = opened(settings.store, settings.capacity, settings.max_bytes, self._secret)
        self._socket = _listen(settings)
        self._flights = Flights(settings.linger_s, self.metrics.stopped.inc)
        self._refusals_seen: dict[str, int] = {}
        self._server = _Server(
            uvicorn.Config(
                self._application(),
                http=limits.protocol(settings, self.metrics),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, round(settings.idle_timeout_s)),
                timeout_graceful_shutdown=1,
            )
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the proxy listens on."""
        return self._socket.getsockname()[:2]

    @property
    def url(self) -> str:
        """Address to open."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """Answer requests until :meth:`close` is called from another thread or a handler."""
        self._ready = ready
        # Its messages are repeated by our own log, one line each and without a traceback.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        self._server.run(sockets=[self._socket])

    def close(self) -> None:
        """Stop listening; requests under way end with their connections."""
        self._server.should_exit = True

    # --- the application --------------------------------------------------------------------------

    def _application(self) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        inner = Router(
            routes=[
                Route("/healthz", _Only(self._healthz, "GET")),
                Route("/metrics", _Only(self._exposition, "GET")),
                Route("/cache", _Only(self._delete_all, "DELETE")),
                Route("/cache/keys/{key}", _Only(self._delete_key, "DELETE")),
                # Names may hold a slash, which a client sends as %2F.
                Route("/cache/namespaces/{name:path}", _Only(self._delete_group, "DELETE")),
                Route("/cache/tags/{name:path}", _Only(self._delete_group, "DELETE")),
                # A deletion that names nothing known is not the server's business.
                Mount("/cache", app=_unknown),
                Mount("/", app=self._answer),
            ],
            redirect_slashes=False,
            lifespan=self._lifespan,
        )

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await inner(scope, receive, send)
                return
            exchange = _Exchange(scope, receive, send)
            scope["exchange"] = exchange
            try:
                self._admit(exchange)
                sender = self._counted(exchange)
                if (
                    scope["method"] == "POST"
                    and scope["raw_path"].endswith(_CACHED)
                    and not scope["path"].startswith("/cache/")
                ):
                    # Where the time counts, no table of routes is walked.
                    await self._answer(scope, receive, sender)
                else:
                    await inner(scope, receive, sender)
            except _Refused as refusal:
                self.metrics.refused.labels(refusal.reason).inc()
                exchange.reason = refusal.reason
                await self._say_error(exchange, refusal.status, str(refusal))
            except _Left:
                exchange.reason = exchange.reason or "client left"
                scope["state"]["abort"]()
            except UpstreamError as error:
                if exchange.status:
                    # The status line is gone already; a broken connection is the honest signal.
                    scope["state"]["abort"]()
                else:
                    await self._say_error(exchange, error.status, str(error))
            except Exception as error:
                _LOG.error("%s: %s", type(error).__name__, error)
                scope["state"]["abort"]()
            finally:
                if self.settings.log:
                    self._log(exchange)
                # Rings of references wait for the collector, whose rounds hold up other requests.
                del scope["exchange"]
                exchange.send = send

        return application

    @asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        self._upstream = Upstream(self.settings)
        self._name = self._upstream.name.encode()
        restoring = asyncio.create_task(self._restore_index())
        self._ready()
        yield
        restoring.cancel()
        await asyncio.gather(restoring, return_exceptions=True)
        await self._flights.close()
        await self._upstream.close()
        try:
            await self.store.close()
        finally:
            self._readers.shutdown(wait=False, cancel_futures=True)
            if self._semantic is not None:
                self._semantic.close()

    async def _restore_index(self) -> None:
        """Fill the index of the semantic cache from a store that outlived another process."""
        if self._semantic is None:
            return
        try:
            await self._semantic.restore(await self.store.questions())
        except StoreError as error:
            self.metrics.store_errors.inc()
            _LOG.warning("store: %s", error)

    def _admit(self, exchange: _Exchange) -> None:
        """Refuse what is not for this proxy.

        A page in a browser may have its own name point to this machine; it then asks under that
        name. A request that this proxy sent must not come back to it.
        """
        if exchange.scope["http_version"] not in ("1.0", "1.1"):
            raise _Refused(505, "HTTP/1.1 or HTTP/1.0, please", "malformed")
        hosts = [value for name, value in exchange.headers if name == b"host"]
        if len(hosts) != 1 and (hosts or exchange.scope["http_version"] == "1.1"):
            raise _Refused(400, "a request has one Host header", "malformed")
        name = _hostname(hosts[0].decode("latin-1")) if hosts else ""
        known = self.settings.allowed_hosts
        if self.settings.allow_remote:
            allowed = not known or name in known or is_loopback(name)
        else:
            allowed = not hosts or is_loopback(name) or name in known
        if not allowed:
            raise _Refused(403, "this proxy is not asked under that name", "host")
        url = exchange.scope["state"]["url"]
        if not url.startswith(b"/") and url != b"*":
            # RFC 9112, section 3.2.2: such a target says itself whom it is for.
            authority = url.partition(b"://")[2].partition(b"/")[0]
            if not hosts or authority.lower() != hosts[0].strip().lower():
                raise _Refused(400, "the target names another host than the header", "malformed")
        if b"#" in url or _DOTS.search(exchange.scope["raw_path"]):
            # A server that resolves dots would be asked beside the path that it was given.
            raise _Refused(400, "a path without '.', '..' and '#', please", "malformed")
        coding = exchange.header(b"transfer-encoding").strip().lower()
        if coding and exchange.scope["http_version"] == "1.0":
            raise _Refused(400, "HTTP/1.0 knows no Transfer-Encoding", "malformed")
        if coding not in ("", "chunked"):
            raise _Refused(501, "no Transfer-Encoding but chunked is read", "malformed")
        if exchange.scope["method"] not in _METHODS:
            raise _Refused(501, "this method is not passed on", "method")
        upgrading = b"upgrade" in {
            token.strip().lower()
            for name, value in exchange.headers
            if name == b"connection"
            for token in value.split(b",")
        }
        if upgrading and exchange.header(b"upgrade"):
            # The parser stops at an upgrade, and the body behind it is not read.
            raise _Refused(501, "connections are not upgraded; leave Upgrade out", "upgrade")
        if any(name == b"via" and self._name in value for name, value in exchange.headers):
            raise _Refused(508, "the server behind this proxy leads back to it", "loop")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: _Exchange = scope["exchange"]
        exchange.send = send
        path = scope["raw_path"].rstrip(b"/")
        if not path.endswith(_CACHED):
            exchange.reason = "path"
            await self._pass_through(exchange)
            return
        if scope["method"] != "POST":
            exchange.reason = "method"
            await self._pass_through(exchange)
            return
        await self._answer_cached(exchange)

    async def _answer_cached(self, exchange: _Exchange) -> None:
        headers = exchange.headers
        try:
            wish = wishes(headers)
        except ValueError as error:
            raise _Refused(400, str(error), "cache header") from error
        body = await self._read_body(exchange)
        sent_on = forwarded(headers)
        owner = tenant(sent_on, self._neutral, self._secret)
        place = digest(self._secret, owner, wish.namespace.encode())
        try:
            if wish.no_store:
                raise NotCacheable("no-store")
            question = await self._question(exchange, body, place)
        except NotCacheable as reason:
            exchange.reason = str(reason)
            if wish.only_if_cached:
                raise _Refused(
                    504, "nothing is stored for this request", "only-if-cached"
                ) from None
            await self._forward(exchange, body, sent_on, None, wish, owner)
            return
        exchange.key = question.exact
        if question.sampled:
            exchange.reason, exchange.key = "sampled", ""
            if wish.only_if_cached:
                raise _Refused(504, "nothing is stored for this request", "only-if-cached")
            await self._forward(exchange, body, sent_on, question, wish, owner)
            return
        exchange.cache = "miss"
        if wish.no_cache:
            exchange.reason = "no-cache"
            self.metrics.misses.labels("no-cache").inc()
        elif await self._serve_stored(exchange, question, wish, place):
            return
        if wish.only_if_cached:
            raise _Refused(504, "nothing is stored for this request", "only-if-cached")
        await self._forward(exchange, body, sent_on, question, wish, owner, place)

    async def _question(self, exchange: _Exchange, body: bytes, place: bytes) -> Question:
        """Return the keys of a request, or raise NotCacheable."""
        target = _target(exchange).decode("latin-1")
        named = [value for name, value in exchange.headers if name == b"content-encoding"]
        encoding = b",".join(named).decode("latin-1").strip().lower()

        def read() -> Question:
            fields = parsed(body, encoding, self.settings)
            return question_of(fields, self.settings, place, target, self._secret)

        if len(body) > _LARGE or encoding:
            return await asyncio.get_running_loop().run_in_executor(self._readers, read)
        if len(body) > _SMALL:
            return read()
        # A repeat is mostly one to the byte: it has the keys that were worked out before.
        name = digest(self._secret, place, target.encode("latin-1"), body)
        question = self._questions.get(name)
        if question is None:
            question = self._questions[name] = read()
            if len(self._questions) > _MOST_QUESTIONS:
                self._questions.popitem(last=False)
        else:
            self._questions.move_to_end(name)
        return question

    # --- hits -------------------------------------------------------------------------------------

    async def _serve_stored(
        self, exchange: _Exchange, question: Question, wish: Wishes, place: bytes
    ) -> bool:
        """Answer from the cache if that can be; else set the reason of the miss."""
        entry = await self._stored(question.exact)
        reason = ""
        if entry is not None:
            body, reason = _acceptable(entry, question, wish)
            if body is not None:
                await self._send_stored(exchange, entry, question, body, "exact", 1.0)
                return True
        elif self._semantic is not None and question.text:
            started = time.perf_counter()
            found = await self._semantic.find(question.text, question.context)
            self.metrics.encoder_seconds.observe(time.perf_counter() - started)
            reason = found.reason
            entry = await self._stored(found.key) if found.key is not None else None
            if found.key is not None and entry is None:
                # Evicted or deleted: a dead entry must not stand before one that lives.
                await self._semantic.forget(found.text, question.context)
            if entry is not None:
                body, reason = _acceptable(entry, question, wish)
                if body is not None and found.key is not None:
                    # The answer is deleted by the key that it is stored under, not by this question's.
                    exchange.key = found.key
                    await self._send_stored(
                        exchange, entry, question, body, "semantic", found.similarity
                    )
                    return True
        if not reason:
            reason, changed = self._reasons.explain(question, place)
            for part in changed:
                self.metrics.missed_only.labels(part).inc()
        exchange.reason = reason
        self.metrics.misses.labels(reason).inc()
        return False

    async def _stored(self, key: str) -> Entry | None:
        """Return a stored answer; a store that fails costs a generation, never an answer."""
        try:
            return await self.store.get(key)
        except StoreError as error:
            self.metrics.store_errors.inc()
            _LOG.warning("store: %s", error)
            return None

    async def _send_stored(
        self,
        exchange: _Exchange,
        entry: Entry,
        question: Question,
        body: bytes,
        kind: str,
        similarity: float,
    ) -> None:
        exchange.cache, exchange.reason = "hit", ""
        content_type = entry.content_type
        if question.form != entry.form:
            content_type = answers.content_type_of(question.form)
        prompt, completion = entry.tokens or (0, 0)
        metrics, prices = self.metrics, self.settings.prices
        (metrics.exact_hits if kind == "exact" else metrics.hits.labels(kind)).inc()
        if prompt or completion:
            metrics.saved_prompt.inc(prompt)
            metrics.saved_completion.inc(completion)
            saved = (prompt * prices[0] + completion * prices[1]) / 1e6
            self._money_saved.inc(saved)
        headers = [
            (b"content-type", content_type.encode("latin-1")),
            (b"content-length", b"%d" % len(body)),
            (b"age", b"%d" % max(0, time.time() - entry.at)),
            (b"x-cache-kind", kind.encode()),
            (b"x-similarity", b"%.4f" % similarity),
            (b"x-cache-tokens-saved", b"prompt=%d, completion=%d" % (prompt, completion)),
            *entry.headers,
        ]
        if len(body) <= _LARGE:
            exchange.scope["state"]["cork"]()
            try:
                await self._begin(exchange, 200, headers)
                await self._write(exchange, body, last=True)
            finally:
                exchange.scope["state"]["uncork"]()
        else:
            await self._begin(exchange, 200, headers)
            await self._write(exchange, body)
            # Sent only when the client has taken the body, within the limit.
            await self._write(exchange, b"", last=True)
        metrics.hit_seconds.observe(time.perf_counter() - exchange.started)

    # --- misses -----------------------------------------------------------------------------------

    async def _forward(
        self,
        exchange: _Exchange,
        body: bytes,
        headers: list[Header],
        question: Question | None,
        wish: Wishes,
        owner: bytes,
        place: bytes = b"",
    ) -> None:
        """Answer from the server, through a call that equal requests share.

        A request whose answer is a draw of its own shares nothing; but if the client that asked
        is gone and asks again while the call goes on, that call is its own.
        """
        if exchange.cache == "bypass":
            self.metrics.bypasses.labels(exchange.reason).inc()
        shared = question is not None and exchange.cache == "miss"
        call = Call("POST", _target(exchange), [*headers, *_length(body)], body)

        async def settle(flight: Flight) -> None:
            await self._settle(flight, question if shared else None, wish, owner, place)

        def start(key: str) -> Flight:
            flight = Flight(question.form if question else "whole", self.settings.max_stored_bytes)
            return self._flights.start(key, flight, self._upstream, call, settle)

        async def answer() -> None:
            alone = f"alone {id(exchange)}"
            if question is None:
                await self._relay(exchange, start(alone))
                return
            if not shared:
                key = (
                    f"drawn {question.exact} {question.form} {exchange.header(b'idempotency-key')}"
                )
                flight = self._flights.get(key)
                if flight is not None and not _is_retry(exchange, flight):
                    flight, key = None, alone
                await self._relay(exchange, flight or start(key))
                return
            flight = self._flights.get(question.exact) if exchange.reason != "no-cache" else None
            while flight is not None and flight.form != question.form:
                # The other form is on its way; this one can be made of it if it is kept.
                reader = flight.join()
                try:
                    await flight.end()
                finally:
                    self._flights.leave(flight, reader)
                entry = await self._stored(question.exact)
                made = _acceptable(entry, question, wish)[0] if entry is not None else None
                if entry is not None and made is not None:
                    self.metrics.joined.inc()
                    await self._send_stored(exchange, entry, question, made, "exact", 1.0)
                    return
                flight = self._flights.get(question.exact)
            if flight is not None:
                self.metrics.joined.inc()
            elif exchange.reason not in _RENEWING:
                # Another request's call may have ended while this one was looking, or even while it looks
                # again: then its answer was kept behind that look, and a last one finds it.
                ended = self._flights.ended
                entry = await self._stored(question.exact)
                flight = self._flights.get(question.exact)
                if entry is None and flight is None and self._flights.ended != ended:
                    entry = await self._stored(question.exact)
                    flight = self._flights.get(question.exact)
                made = _acceptable(entry, question, wish)[0] if entry is not None else None
                if entry is not None and made is not None:
                    await self._send_stored(exchange, entry, question, made, "exact", 1.0)
                    return
                if flight is not None and flight.form != question.form:
                    flight = None
            await self._relay(exchange, flight or start(question.exact))

        await self._while_there(exchange, answer())

    async def _pass_through(self, exchange: _Exchange) -> None:
        """Send a request on as it comes, and its answer back as it comes."""
        self.metrics.bypasses.labels(exchange.reason).inc()
        scope = exchange.scope
        headers = forwarded(exchange.headers)
        length = exchange.header(b"content-length")
        chunked = bool(exchange.header(b"transfer-encoding"))
        body: bytes | AsyncIterator[bytes] = b""
        received = asyncio.Event()
        if chunked or (length.isdigit() and int(length) > _LARGE):
            body = self._body_pieces(exchange, received)
            headers.append(
                (b"transfer-encoding", b"chunked")
                if chunked
                else (b"content-length", length.encode())
            )
        else:
            body = await self._read_body(exchange)
            received.set()
            if body or scope["method"] in ("POST", "PUT", "PATCH"):
                headers.extend(_length(body))
        call = Call(scope["method"], _target(exchange), headers, body)
        flight = Flight("whole", _PASSING)

        async def settle(_: Flight) -> None:
            return None

        async def answer() -> None:
            self._flights.start(f"alone {id(exchange)}", flight, self._upstream, call, settle)
            # Nobody can come back to it.
            flight.whole = False
            await self._relay(exchange, flight)

        await self._while_there(exchange, answer(), received)

    async def _relay(self, exchange: _Exchange, flight: Flight) -> None:
        """Send the answer of a call to one client, from its beginning."""
        reader = flight.join()
        self.metrics.flights.set(len(self._flights))
        try:
            await flight.head()
            bodiless = exchange.scope["method"] == "HEAD" or flight.status in (204, 304)
            headers = list(flight.headers)
            if flight.length is not None and flight.status not in (204, 304):
                headers.append((b"content-length", b"%d" % flight.length))
            pieces = flight.read(reader)
            if exchange.scope["http_version"] == "1.0" and flight.length is None:
                # Such a client knows no chunks; it gets the answer when its length is known.
                whole = b"".join([piece async for piece in pieces])
                headers.append((b"content-length", b"%d" % len(whole)))
                await self._begin(exchange, flight.status, headers)
                await self._write(exchange, whole)
            else:
                await self._begin(exchange, flight.status, headers)
                async for piece in pieces:
                    if not bodiless:
                        await self._write(exchange, piece)
            await self._write(exchange, b"", last=True)
        finally:
            self._flights.leave(flight, reader)
            self.metrics.flights.set(len(self._flights))

    async def _settle(
        self, flight: Flight, question: Question | None, wish: Wishes, owner: bytes, place: bytes
    ) -> None:
        """Count what a call cost, and keep its answer if it is a whole, successful one."""
        metrics = self.metrics
        took = asyncio.get_running_loop().time() - flight.started_at
        metrics.upstream_calls.labels(f"{flight.status // 100}xx").inc()
        metrics.upstream_seconds.labels("first_byte").observe(flight.head_at - flight.started_at)
        metrics.upstream_seconds.labels("end").observe(took)
        if flight.status != 200 or not flight.whole:
            if question is not None:
                outcome = "not stored: status" if flight.status != 200 else "not stored: too large"
                self._not_stored(question, outcome)
            return
        body = flight.body
        content_type = _value(flight.headers, b"content-type") or "application/json"
        tokens = answers.usage(body, content_type)
        for kind, count in zip(("prompt", "completion"), tokens or (), strict=False):
            metrics.tokens.labels(kind, "upstream").inc(count)
        if question is None:
            return
        outcome = self._judged(flight, question, body, content_type)
        ttl_s = min(
            wish.ttl_s if wish.ttl_s is not None else self.settings.ttl_s,
            self.settings.max_ttl_s,
        )
        allowed_s = freshness(flight.headers)
        if allowed_s is not None:
            ttl_s = min(ttl_s, allowed_s)
        if not outcome and ttl_s <= 0:
            outcome = "not stored: no-store"
        if outcome:
            self._not_stored(question, outcome)
            return
        groups = [("all", ""), ("namespaces", wish.namespace)]
        groups += [("tags", tag) for tag in wish.tags]
        now = time.time()
        entry = Entry(
            body=body,
            content_type=content_type,
            form=answers.form_of(content_type, question.form),
            at=now,
            expires=now + ttl_s,
            headers=tuple(kept(flight.headers)),
            tokens=tokens,
            tenant=owner.hex(),
            groups=tuple(self._group(owner, *group) for group in groups),
            question=self._to_keep(question),
        )
        try:
            await self.store.put(question.exact, entry)
        except StoreError as error:
            metrics.store_errors.inc()
            _LOG.warning("store: %s", error)
            self._not_stored(question, "not stored: store")
            return
        metrics.stored.inc()
        self._reasons.note(question, "expired")
        if self._semantic is not None and question.text:
            await self._semantic.add(question.text, question.context, question.exact, ttl_s)

    def _to_keep(self, question: Question) -> tuple[str, str] | None:
        """Return context and text of a question that a later process shall compare, too."""
        lasting = self.settings.store != "memory" and self._semantic is not None
        if not lasting or not question.text or len(question.text) > _LONGEST_KEPT:
            return None
        return question.context, question.text

    def _judged(self, flight: Flight, question: Question, body: bytes, content_type: str) -> str:
        """Return why an answer may not be kept, or ""."""
        if _value(flight.headers, b"content-encoding"):
            return "not stored: encoding"
        if varies(flight.headers, self._neutral):
            return "not stored: vary"
        if question.kind == "embeddings":
            return "" if answers.has_embeddings(body) else "not stored: incomplete"
        accepted = {"stop"} | ({"length"} if self.settings.cache_length_limited else set())
        ended = answers.finish_reason(body, content_type)
        return "" if ended in accepted else "not stored: incomplete"

    def _not_stored(self, question: Question, outcome: str) -> None:
        self.metrics.not_stored.labels(outcome.removeprefix("not stored: ")).inc()
        self._reasons.note(question, outcome)

    # --- receiving and sending --------------------------------------------------------------------

    async def _read_body(self, exchange: _Exchange) -> bytes:
        """Return the whole body, within its limits of size and time."""
        most = self.settings.max_request_bytes
        length = exchange.header(b"content-length")
        if length.isdigit() and int(length) > most:
            raise _Refused(413, "the request is larger than the proxy accepts", "body")
        if exchange.scope["state"]["received"]():
            body = (await exchange.receive()).get("body", b"")
            if len(body) > most:
                raise _Refused(413, "the request is larger than the proxy accepts", "body")
            return body
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self.settings.receive_timeout_s):
                while True:
                    message = await exchange.receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > most:
                        raise _Refused(413, "the request is larger than the proxy accepts", "body")
                    if not message.get("more_body"):
                        return b"".join(pieces)
        except TimeoutError:
            raise _Refused(408, "the request took too long to arrive", "slow") from None

    async def _body_pieces(
        self, exchange: _Exchange, received: asyncio.Event
    ) -> AsyncIterator[bytes]:
        """Yield the body as it comes; one that comes too slowly is broken off."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.receive_timeout_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await exchange.receive()
            except TimeoutError:
                raise UpstreamError(408, "the request took too long to arrive") from None
            if message["type"] == "http.disconnect":
                raise UpstreamError(400, "the client left")
            piece = message.get("body", b"")
            deadline += len(piece) / _SLOWEST
            if piece:
                yield piece
            if not message.get("more_body"):
                received.set()
                return

    async def _while_there(
        self, exchange: _Exchange, work: Any, received: asyncio.Event | None = None
    ) -> None:
        """Run something for as long as the client is there.

        Before its body is ``received`` whoever reads it notices by itself that the client left.
        """
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(_gone(exchange.receive, received))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Left
            task.result()
        finally:
            watch.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _begin(self, exchange: _Exchange, status: int, headers: list[Header]) -> None:
        await exchange.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, *exchange.labels()],
            }
        )

    async def _write(self, exchange: _Exchange, body: bytes, last: bool = False) -> None:
        """Send a part of the answer; each piece of it has to be taken within the limit."""
        if len(body) > _LARGE:
            for start in range(0, len(body), _LARGE):
                end = start + _LARGE
                await self._write(exchange, body[start:end], last and end >= len(body))
            return
        message = {"type": "http.response.body", "body": body, "more_body": not last}
        if not exchange.scope["state"]["congested"]():
            # Nothing to wait for, so no clock has to be set.
            await exchange.send(message)
            return
        try:
            async with asyncio.timeout(self.settings.send_timeout_s):
                await exchange.send(message)
        except TimeoutError:
            exchange.reason = "client too slow"
            raise _Left from None

    def _counted(self, exchange: _Exchange) -> Send:
        """Return a ``send`` that notes status and bytes."""
        plain = exchange.send

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            else:
                exchange.sent += len(message.get("body", b""))
            await plain(message)

        return send

    async def _say_error(self, exchange: _Exchange, status: int, message: str) -> None:
        """Send an error in the form that OpenAI's clients read, and close."""
        exchange.status = status
        body = json.dumps({"error": {"message": message, "type": "proxy_error"}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        if status in (408, 504):
            # The openai client would ask twice more, and each time start the work anew.
            headers.append((b"x-should-retry", b"false"))
        await self._begin(exchange, status, headers)
        await self._write(exchange, body, last=True)

    def _log(self, exchange: _Exchange) -> None:
        """Write one line: no query, no header, no body, and no key, namespace or tag of a deletion."""
        scope = exchange.scope
        path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
        _LOG.info(
            "%s %s %d %s%s %d B %.1f ms",
            scope["method"],
            _NAMED.sub(r"\1/*", path),
            exchange.status,
            exchange.cache,
            f" ({exchange.reason})" if exchange.reason else "",
            exchange.sent,
            (time.perf_counter() - exchange.started) * 1000,
        )

    # --- for the operator -------------------------------------------------------------------------

    async def _healthz(self, _: Request) -> Response:
        try:
            entries, _bytes = await self.store.footprint()
        except StoreError as error:
            # The proxy answers without its store; it is the operator who wants to know.
            return JSONResponse({"status": "degraded", "store": str(error)})
        return JSONResponse({"status": "ok", "entries": entries})

    async def _exposition(self, _: Request) -> Response:
        metrics = self.metrics
        try:
            entries, size = await self.store.footprint()
            metrics.entries.set(entries)
            metrics.bytes.set(size)
        except StoreError:
            metrics.store_errors.inc()
        if self._semantic is not None:
            entries, size = self._semantic.footprint()
            metrics.index_entries.set(entries)
            metrics.index_bytes.set(size)
            for guard, count in self._semantic.refused().items():
                metrics.guards.labels(guard).inc(count - self._refusals_seen.get(guard, 0))
                self._refusals_seen[guard] = count
        metrics.flights.set(len(self._flights))
        body, content_type = metrics.exposition()
        return Response(body, headers={"content-type": content_type})

    async def _delete_key(self, request: Request) -> Response:
        owner = self._owner(request)
        return await self._deleted(
            lambda: self.store.delete(request.path_params["key"], owner.hex())
        )

    async def _delete_group(self, request: Request) -> Response:
        kind = request.url.path.split("/")[2]
        group = self._group(self._owner(request), kind, request.path_params["name"])
        return await self._deleted(lambda: self.store.delete_group(group))

    async def _delete_all(self, request: Request) -> Response:
        group = self._group(self._owner(request), "all", "")
        return await self._deleted(lambda: self.store.delete_group(group))

    async def _deleted(self, action: Callable[[], Awaitable[list[str]]]) -> Response:
        try:
            keys = await action()
        except StoreError as error:
            # A deletion that is not certain must not look like one.
            raise _Refused(503, f"the store failed: {error}", "store") from error
        if self._semantic is not None:
            await self._semantic.discard(keys)
        return JSONResponse({"deleted": len(keys)})

    def _owner(self, request: Request) -> bytes:
        headers = forwarded(request.scope["headers"])
        return tenant(headers, self._neutral, self._secret)

    def _group(self, owner: bytes, kind: str, name: str) -> str:
        return digest(self._secret, owner, kind.encode(), name.encode())[:16].hex()


@contextmanager
def serving(
    settings: Settings, encoder: Encoder | None = None, second_opinion: Guard | None = None
) -> Iterator[Proxy]:
    """Run a proxy in a thread of this process while the block runs."""
    proxy = Proxy(settings, encoder, second_opinion)
    ready = threading.Event()
    thread = threading.Thread(target=proxy.serve, args=(ready.set,), daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()


class _Server(uvicorn.Server):
    """uvicorn's server; signals are the business of whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    """Say that there is nothing here."""
    await Response(status_code=404)(scope, receive, send)


class _Only:
    """An endpoint for one method (and HEAD for GET); the rest is never asked of the server."""

    def __init__(self, endpoint: Callable[[Request], Awaitable[Response]], method: str) -> None:
        self._endpoint = endpoint
        self._methods = ("GET", "HEAD") if method == "GET" else (method,)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in self._methods:
            allowed = {"allow": ", ".join(self._methods)}
            response: Response = Response(status_code=405, headers=allowed)
        else:
            response = await self._endpoint(Request(scope, receive))
        await response(scope, receive, send)


def _guards(settings: Settings, second_opinion: Guard | None) -> Mapping[str, Guard] | None:
    from kvbench.caching.guards import GUARDS, languages

    guards: dict[str, Guard] = {}
    if settings.guarded:
        # A list of words that cannot be read is told now, and not by a miss.
        languages()
        guards |= GUARDS
    if second_opinion is not None:
        guards["second opinion"] = second_opinion
    return guards or None


def _acceptable(entry: Entry, question: Question, wish: Wishes) -> tuple[bytes | None, str]:
    """Return a stored answer in the form and of the age that are asked for, or why it is none."""
    now = time.time()
    if wish.max_age_s is not None and now - entry.at > wish.max_age_s:
        return None, "max-age"
    if wish.max_age_s == 0:
        return None, "max-age"
    if wish.min_fresh_s is not None and entry.expires - now < wish.min_fresh_s:
        return None, "min-fresh"
    body = answers.translated(entry.body, entry.form, question.form)
    return body, "" if body is not None else "form"


def _is_retry(exchange: _Exchange, flight: Flight) -> bool:
    """Whether a request repeats one whose client is gone, by what it says of itself."""
    if exchange.header(b"idempotency-key"):
        return True
    return flight.readers == 0 and exchange.header(b"x-stainless-retry-count") not in ("", "0")


async def _gone(receive: Receive, received: asyncio.Event | None) -> None:
    """Return when the client has closed its side, once the body is ``received``."""
    if received is not None:
        await received.wait()
    while (await receive())["type"] != "http.disconnect":
        pass


def _target(exchange: _Exchange) -> bytes:
    query = exchange.scope["query_string"]
    path = exchange.scope["raw_path"]
    return path + b"?" + query if query else path


def _length(body: bytes) -> list[Header]:
    return [(b"content-length", b"%d" % len(body))]


def _value(headers: list[Header], name: bytes) -> str:
    return next((v.decode("latin-1") for n, v in headers if n == name), "")


@lru_cache(64)
def _hostname(host: str) -> str:
    """Return the name in a Host header, without its port; "" if it is none."""
    found = _HOST.fullmatch(host.strip())
    return "" if found is None else (found[1] or found[2]).rstrip(".").lower()


def _listen(settings: Settings) -> socket.socket:
    """Return a socket that listens where the settings say."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # Not on Windows, where it lets two programs share a port.
            if sys.platform != "win32":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise InputError(f"--listen {settings.host}:{settings.port}: {error}") from error
    return listener
