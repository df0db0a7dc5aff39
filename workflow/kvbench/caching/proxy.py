"""A caching proxy for OpenAI-compatible servers: exact repeats first, then questions alike.

Run it in front of any server and point the client at it::

    python -m kvbench.caching.proxy --upstream http://127.0.0.1:8000/v1 --listen 127.0.0.1:8001
    OPENAI_BASE_URL=http://127.0.0.1:8001/v1 ...

What it promises
----------------
* Only ``POST .../chat/completions`` is cached; everything else passes through.
* An entry belongs to whoever the forwarded headers name (keys of any kind, cookies, organisation):
  tenants never meet.
* The exact key is a digest of the whole request. The semantic cache compares the last user message
  only, and only between requests that are equal in everything else: model, parameters, system
  prompt, history, tools.
* Stored are complete, successful answers: status 200, valid JSON or a stream that reached its
  ``finish_reason`` and ended in order, with text and without tool calls. Never an error, a cut-off
  stream, or rubbish.
* Requests at a temperature above zero (the default of the API is 1) are not cached unless asked.
* ``Cache-Control: no-store`` on a request bypasses the cache, ``no-cache`` skips the lookup;
  ``no-store`` on the server's answer keeps it out.
* Every answer carries ``x-cache`` (``hit``, ``miss``, ``bypass``); hits also ``x-cache-kind``
  (``exact``, ``semantic``), ``x-similarity`` and ``age``.
* Every wait has a limit; a request has a limit as a whole.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import ipaddress
import json
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import urlsplit

import cachetools
import numpy as np

from kvbench.caching.keys import DEFAULT_TEMPERATURE, digest
from kvbench.caching.semantic_cache import GUARDS, SemanticCache
from kvbench.errors import InputError, Unsupported

#: Headers that belong to one connection (RFC 9110, section 7.6.1) or are set anew.
_HOP_BY_HOP = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

#: Forwarded request headers that say nothing about who asks and change no answer. Every other
#: header is part of the tenant: keys, cookies and forwarded users have too many names to list.
_NEUTRAL_HEADERS = frozenset(
    {
        "accept",
        "cache-control",
        "content-type",
        "idempotency-key",
        "pragma",
        "priority",
        "traceparent",
        "tracestate",
        "user-agent",
        "x-request-id",
    }
)
#: Beginnings of such names: what the openai client says of itself, and of its retries.
_NEUTRAL_PREFIXES = ("x-stainless-", "sec-ch-", "sec-fetch-")

_STATUS_BAD_GATEWAY = 502
_STATUS_GATEWAY_TIMEOUT = 504


class Encoder(Protocol):
    """What the proxy needs of :class:`kvbench.caching.encoder.SentenceEncoder`."""

    dimension: int

    def __call__(self, text: str) -> np.ndarray:
        """Return the vector of a text."""

    def fits(self, text: str) -> bool:
        """Whether the whole text is read."""


@dataclass(frozen=True)
class Settings:
    """How a proxy behaves.

    Attributes
    ----------
    upstream:
        Base URL of the server, such as ``http://127.0.0.1:8000/v1``.
    host, port:
        Where to listen; port 0 takes a free one.
    ttl_s:
        Seconds an answer is kept.
    capacity:
        Most answers kept, exact and semantic each.
    threshold:
        Least cosine of a semantic hit within [0, 1]; None for an exact cache only.
    guarded:
        Whether numbers, names and polarity of two questions must agree for a semantic hit.
    cache_sampled:
        Cache requests at a temperature above zero too, which freezes one draw.
    cache_length_limited:
        Store answers that ended at ``max_tokens``. That number is part of the key, so the answer
        is the right one for a repeat, but it is not a whole one.
    connect_timeout_s, read_timeout_s, total_timeout_s:
        Limits for reaching the server, between two pieces of its answer, and for all of it.
    max_request_bytes, max_stored_bytes:
        Larger requests are refused (413); larger answers pass through and are not stored.
    allow_remote:
        Whether ``host`` may be an address that other machines reach.
    """

    upstream: str
    host: str = "127.0.0.1"
    port: int = 0
    ttl_s: float = 3600.0
    capacity: int = 10_000
    threshold: float | None = None
    guarded: bool = True
    cache_sampled: bool = False
    cache_length_limited: bool = False
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    total_timeout_s: float = 300.0
    max_request_bytes: int = 8 * 2**20
    max_stored_bytes: int = 4 * 2**20
    allow_remote: bool = False

    def check(self) -> None:
        """Raise InputError, one line that names the option, if something cannot be right."""
        parts = urlsplit(self.upstream)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise InputError(f"--upstream {self.upstream!r}: not an http(s)://host[:port][/path]")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold {self.threshold}: must be within [0, 1]")
        if self.capacity < 1:
            raise InputError(f"--capacity {self.capacity}: must be at least 1")
        for name in ("ttl_s", "connect_timeout_s", "read_timeout_s", "total_timeout_s"):
            if not getattr(self, name) > 0:
                option = "--" + name.removesuffix("_s").replace("_", "-")
                raise InputError(f"{option} {getattr(self, name)}: must be above 0")
        if not self.allow_remote and not _is_loopback(self.host):
            raise InputError(
                f"--listen {self.host}: not a loopback address; add --allow-remote if other"
                " machines shall reach the proxy"
            )


@dataclass(frozen=True)
class Stored:
    """An answer as it went over the wire, and when it was stored (monotonic seconds)."""

    body: bytes
    content_type: str
    at: float


@dataclass(frozen=True)
class Question:
    """What of a request decides about its answer.

    Attributes
    ----------
    exact:
        Digest of tenant, path and the whole body.
    context:
        Digest of the same without the text of the last user message.
    text:
        That text, or None where it is not plain text of one user message at the end.
    sampled:
        Whether the answer is one draw of many.
    """

    exact: str
    context: str
    text: str | None
    sampled: bool


def question_of(body: Mapping[str, Any], tenant: str, path: str) -> Question:
    """Return the keys of a chat request.

    Raises
    ------
    TypeError, ValueError
        If the body holds what JSON cannot say without loss, so that there is no key.
    """
    messages = body.get("messages")
    text = None
    context: Any = dict(body)
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        last = messages[-1]
        if last.get("role") == "user" and isinstance(last.get("content"), str):
            text = last["content"]
            context["messages"] = [*messages[:-1], {**last, "content": None}]
    temperature = body.get("temperature")
    sampled = (DEFAULT_TEMPERATURE if temperature is None else temperature) != 0
    return Question(
        digest([tenant, path, body]), digest([tenant, path, "context", context]), text, sampled
    )


class Proxy:
    """The cache and the listening server around it.

    Parameters
    ----------
    settings:
        See :class:`Settings`; checked here.
    encoder:
        Needed if ``settings.threshold`` is not None.

    Raises
    ------
    InputError
        If a setting is wrong, or the address cannot be listened on.
    """

    def __init__(self, settings: Settings, encoder: Encoder | None = None) -> None:
        settings.check()
        if settings.threshold is not None and encoder is None:
            raise InputError("--threshold needs a sentence encoder")
        self.settings = settings
        self._lock = threading.Lock()
        self._exact: cachetools.TTLCache = cachetools.TTLCache(
            settings.capacity, settings.ttl_s, timer=time.monotonic
        )
        self._semantic = None
        if settings.threshold is not None:
            self._semantic = SemanticCache(
                encoder,
                encoder.dimension,
                threshold=settings.threshold,
                capacity=settings.capacity,
                ttl_s=settings.ttl_s,
                guards=GUARDS if settings.guarded else None,
                fits=encoder.fits,
            )
        handler = type("Handler", (_Handler,), {"proxy": self})
        try:
            self._server = _Server((settings.host, settings.port), handler)
        except OSError as error:
            raise InputError(f"--listen {settings.host}:{settings.port}: {error}") from error

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the proxy listens on."""
        return self._server.server_address[:2]

    def serve(self) -> None:
        """Answer requests until :meth:`close` is called from another thread."""
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        """Stop listening; requests under way end with their connections."""
        self._server.shutdown()
        self._server.server_close()

    def lookup(self, question: Question) -> tuple[Stored, str, float] | None:
        """Return a stored answer, the kind of hit and the similarity, or None."""
        with self._lock:
            stored = self._exact.get(question.exact)
        if stored is not None:
            return stored, "exact", 1.0
        if self._semantic is not None and question.text:
            found = self._semantic.get(question.text, question.context)
            if found.hit:
                return found.value, found.kind, found.similarity
        return None

    def store(self, question: Question, answer: Stored) -> None:
        """Keep a complete answer."""
        with self._lock:
            self._exact[question.exact] = answer
        if self._semantic is not None and question.text:
            self._semantic.put(question.text, answer, question.context)


@contextmanager
def serving(settings: Settings, encoder: Encoder | None = None) -> Iterator[Proxy]:
    """Run a proxy in a thread of this process while the block runs."""
    proxy = Proxy(settings, encoder)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about clients that went away; report the rest in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"proxy: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


class _UpstreamError(Exception):
    """The server behind could not be used; carries the status for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """One client connection; requests on it are answered one after another."""

    proxy: Proxy
    protocol_version = "HTTP/1.1"
    server_version = "kvbench-proxy"
    sys_version = ""
    timeout = 60.0
    # Without these two, header and body leave in separate packets and the second waits for a
    # delayed acknowledgement: 40 ms for each request of a kept-alive connection.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Pass through."""
        self._answer()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: prompts and keys do not belong into a log."""

    def _answer(self) -> None:
        body = self._read_body()
        if body is None:
            return
        question, state = self._question(body)
        if question is not None and state == "lookup":
            try:
                found = self.proxy.lookup(question)
            except (ValueError, RuntimeError):
                found, question, state = None, None, "bypass"
            if found is not None:
                self._send_stored(*found)
                return
        self._forward(body, question, "bypass" if state == "bypass" else "miss")

    def _read_body(self) -> bytes | None:
        """Return the request body, or None after an error was sent."""
        if self.headers.get("Transfer-Encoding"):
            self._send_error(411, "a request needs a Content-Length")
            return None
        length = self.headers.get("Content-Length", "0")
        if not length.isascii() or not length.isdigit() or len(length) > 15:
            self._send_error(400, "Content-Length is not a number")
            return None
        if int(length) > self.proxy.settings.max_request_bytes:
            self._send_error(413, "the request is larger than the proxy accepts")
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return None
        return body

    def _question(self, body: bytes) -> tuple[Question | None, str]:
        """Return the keys of a cacheable request, and ``lookup``, ``store`` or ``bypass``."""
        path = urlsplit(self.path).path
        if self.command != "POST" or not path.rstrip("/").endswith("/chat/completions"):
            return None, "bypass"
        directives = _directives(self.headers.get("Cache-Control", ""))
        if "no-store" in directives:
            return None, "bypass"
        try:
            fields = json.loads(body)
            if not isinstance(fields, dict):
                return None, "bypass"
            question = question_of(fields, self._tenant(), self.path)
        except (TypeError, ValueError, RecursionError):
            return None, "bypass"
        if question.sampled and not self.proxy.settings.cache_sampled:
            return None, "bypass"
        return question, "store" if "no-cache" in directives else "lookup"

    def _tenant(self) -> str:
        """Return a digest of who is asking, so that no API key is held in memory."""
        identity = sorted(
            (name.lower(), value)
            for name, value in self._forwarded_headers()
            if name.lower() not in _NEUTRAL_HEADERS
            and not name.lower().startswith(_NEUTRAL_PREFIXES)
        )
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _send_stored(self, stored: Stored, kind: str, similarity: float) -> None:
        self.send_response(200)
        self.send_header("Content-Type", stored.content_type)
        self.send_header("Content-Length", str(len(stored.body)))
        self.send_header("Age", str(int(time.monotonic() - stored.at)))
        self.send_header("x-cache", "hit")
        self.send_header("x-cache-kind", kind)
        self.send_header("x-similarity", f"{similarity:.4f}")
        self.end_headers()
        self.wfile.write(stored.body)
        self.wfile.flush()

    def _send_error(self, status: int, message: str, cache: str = "bypass") -> None:
        """Send an error in the form that OpenAI's clients read."""
        self.close_connection = True
        body = json.dumps({"error": {"message": message, "type": "proxy_error"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.send_header("x-cache", cache)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _forward(self, body: bytes, question: Question | None, cache: str) -> None:
        started = False
        try:
            with _Upstream(self.proxy.settings) as upstream:
                response = upstream.send(self.command, self.path, self._forwarded_headers(), body)
                started = True
                self._relay(upstream, response, cache, question)
        except _UpstreamError as error:
            if started:
                # The status line is gone already; a broken connection is the honest signal.
                self.close_connection = True
            else:
                self._send_error(error.status, str(error), cache)

    def _forwarded_headers(self) -> list[tuple[str, str]]:
        named = {name.strip().lower() for name in self.headers.get("Connection", "").split(",")}
        return [
            (name, value)
            for name, value in self.headers.items()
            if name.lower() not in _HOP_BY_HOP and name.lower() not in named
        ]

    def _relay(
        self,
        upstream: _Upstream,
        response: http.client.HTTPResponse,
        cache: str,
        question: Question | None,
    ) -> None:
        """Send the answer on as it comes, and store it once it is whole, before its last bytes."""
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_BY_HOP and name.lower() not in ("date", "server"):
                self.send_header(name, value)
        self.send_header("x-cache", cache)
        bodiless = self.command == "HEAD" or response.status in (204, 304)
        endless = response.length is None and not bodiless
        chunked = endless and self.request_version != "HTTP/1.0"
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif endless:
            self.send_header("Connection", "close")
            self.close_connection = True
        elif not bodiless:
            self.send_header("Content-Length", str(response.length))
        self.end_headers()
        self.wfile.flush()
        limit = self.proxy.settings.max_stored_bytes if question is not None else 0
        kept = bytearray()
        last = b""
        for piece in () if bodiless else upstream.pieces(response):
            if len(kept) <= limit:
                kept += piece
            # A client that knows the length has the whole answer with the last piece, and may ask
            # again before it is stored. A stream is not held back: its end is a chunk of its own.
            self._write_piece(last if not endless else piece, chunked)
            last = piece
        if question is not None and 0 < len(kept) <= limit:
            self._store(question, response, bytes(kept))
        if not endless:
            self._write_piece(last, chunked)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()

    def _write_piece(self, piece: bytes, chunked: bool) -> None:
        if piece:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            self.wfile.flush()

    def _store(self, question: Question, response: http.client.HTTPResponse, body: bytes) -> None:
        """Keep an answer if it is a whole, successful one that may be kept."""
        directives = _directives(response.getheader("Cache-Control", ""))
        if response.status != 200 or "no-store" in directives:
            return
        if response.getheader("Content-Encoding"):
            return
        accepted = {"stop"} | ({"length"} if self.proxy.settings.cache_length_limited else set())
        content_type = response.getheader("Content-Type", "application/json")
        if finish_reason(body, content_type) in accepted:
            # A text without a direction (no words at all) cannot be compared; it is not stored.
            with suppress(ValueError, RuntimeError):
                self.proxy.store(question, Stored(body, content_type, time.monotonic()))


class _Upstream:
    """One request to the server behind, within the limits of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._deadline = time.monotonic() + settings.total_timeout_s
        parts = urlsplit(settings.upstream)
        self._path = parts.path.rstrip("/")
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None
        kind, options = http.client.HTTPConnection, {}
        if parts.scheme == "https":
            kind, options = http.client.HTTPSConnection, {"context": ssl.create_default_context()}
        self._connection = kind(
            parts.hostname, parts.port, timeout=settings.connect_timeout_s, **options
        )

    def __enter__(self) -> _Upstream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def send(
        self, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes
    ) -> http.client.HTTPResponse:
        """Send a request and return the answer once its headers are there."""
        # The client was given .../v1 as its base URL, and so was the proxy: count it once.
        if self._path and (path == self._path or path.startswith(self._path + "/")):
            path = path.removeprefix(self._path)
        try:
            self._connection.connect()
            # http.client lets go of the socket once an answer is to end with the connection.
            self._socket = self._connection.sock
            self._limit_wait()
            self._connection.putrequest(method, self._path + path, skip_accept_encoding=True)
            for name, value in headers:
                self._connection.putheader(name, value)
            # Stored bytes are served to clients that may accept other encodings.
            self._connection.putheader("Accept-Encoding", "identity")
            self._connection.putheader("Connection", "close")
            self._connection.putheader("Content-Length", str(len(body)))
            self._connection.endheaders(body)
            self._response = self._connection.getresponse()
            return self._response
        except (OSError, http.client.HTTPException) as error:
            raise _explained(error) from error

    def pieces(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the body piece by piece; raise if it ends early or takes too long."""
        expected = response.length
        size = 0
        while True:
            self._limit_wait()
            try:
                piece = response.read1(65_536)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _explained(error) from error
            if not piece:
                break
            size += len(piece)
            yield piece
        if expected is not None and size != expected:
            raise _UpstreamError(_STATUS_BAD_GATEWAY, "the server closed before the end")

    def _limit_wait(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise _UpstreamError(_STATUS_GATEWAY_TIMEOUT, "the server took too long")
        self._socket.settimeout(min(left, self._settings.read_timeout_s))


def _explained(error: Exception) -> _UpstreamError:
    if isinstance(error, TimeoutError):
        return _UpstreamError(_STATUS_GATEWAY_TIMEOUT, "the server took too long")
    reason = str(error) or type(error).__name__
    return _UpstreamError(_STATUS_BAD_GATEWAY, f"the server cannot be used: {reason}")


def finish_reason(body: bytes, content_type: str) -> str | None:
    """Return why a complete chat answer ended, or None if it is not one that says something.

    ``stop`` and ``length`` as the server says; None for rubbish, errors, several choices, empty
    text, tool calls, and for a stream without a ``finish_reason`` or with an error in it.
    """
    try:
        if content_type.split(";")[0].strip().lower() == "text/event-stream":
            return _stream_finish(body)
        answer = json.loads(body)
        (choice,) = answer["choices"]
        message = choice["message"]
        if answer.get("error") or message.get("tool_calls") or message.get("refusal"):
            return None
        content, reason = message.get("content"), choice.get("finish_reason")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(content, str) or not content:
        return None
    return reason if isinstance(reason, str) else None


def _stream_finish(body: bytes) -> str | None:
    """Like :func:`finish_reason` for server-sent events; the last event must be whole."""
    text = body.decode("utf-8").replace("\r\n", "\n")
    if not text.endswith("\n\n"):
        return None
    said, reason = False, None
    for event in text.split("\n\n"):
        for line in event.split("\n"):
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                return None
            for choice in chunk.get("choices", []):
                delta = choice.get("delta") or {}
                if choice.get("index", 0) != 0 or delta.get("tool_calls") or delta.get("refusal"):
                    return None
                said = said or bool(delta.get("content"))
                reason = choice.get("finish_reason") or reason
    return reason if said else None


def _directives(header: str) -> set[str]:
    return {part.split("=")[0].strip().lower() for part in header.split(",")}


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvbench.caching.proxy", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--upstream", required=True, help="base URL of the server, such as http://host:8000/v1")
    add("--listen", default="127.0.0.1:8001", help="HOST:PORT, port 0 for a free one")
    add("--allow-remote", action="store_true", help="let --listen be no loopback address")
    add("--ttl", type=float, default=Settings.ttl_s, metavar="S", help="life of an answer")
    add("--capacity", type=int, default=Settings.capacity, help="most answers kept")
    add(
        "--threshold",
        type=float,
        metavar="COSINE",
        help="also answer questions at least this similar, within [0, 1]; default: exact only",
    )
    add("--no-guards", action="store_true", help="do not compare numbers, names and polarity")
    add("--encoder", default=None, help="hub name of a sentence encoder; default: embedded")
    add("--encoder-revision", help="commit of that encoder")
    add("--cache-sampled", action="store_true", help="also at a temperature above zero")
    add("--cache-length-limited", action="store_true", help="also answers cut at max_tokens")
    add("--connect-timeout", type=float, default=Settings.connect_timeout_s, metavar="S")
    add("--read-timeout", type=float, default=Settings.read_timeout_s, metavar="S")
    add("--total-timeout", type=float, default=Settings.total_timeout_s, metavar="S")
    return parser


def main(arguments: Sequence[str] | None = None, ready: Callable[[str], None] = print) -> int:
    """Run the proxy until it is interrupted or terminated; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        host, _, port = options.listen.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65_535:
            raise InputError(f"--listen {options.listen!r}: not HOST:PORT")
        settings = Settings(
            upstream=options.upstream,
            host=host.strip("[]"),
            port=int(port),
            ttl_s=options.ttl,
            capacity=options.capacity,
            threshold=options.threshold,
            guarded=not options.no_guards,
            cache_sampled=options.cache_sampled,
            cache_length_limited=options.cache_length_limited,
            connect_timeout_s=options.connect_timeout,
            read_timeout_s=options.read_timeout,
            total_timeout_s=options.total_timeout,
            allow_remote=options.allow_remote,
        )
        settings.check()
        encoder = None
        if settings.threshold is not None:
            from kvbench.caching.encoder import EMBEDDED, SentenceEncoder

            encoder = SentenceEncoder(options.encoder or EMBEDDED, options.encoder_revision)
            encoder("warm up")
        proxy = Proxy(settings, encoder)
    except (InputError, Unsupported) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # The main thread waits in serve(); close() has to come from another one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=proxy.close).start())
    host, port = proxy.address
    ready(f"listening on http://{host}:{port}")
    sys.stdout.flush()
    proxy.serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
