"""HTTP clients with and without a cache, and a real loopback origin that counts what reaches it.

The origin answers ``GET /{behaviour}`` with the caching rules of that name (see
:data:`BEHAVIOURS`). Its content has a version that :meth:`Origin.change` raises, so that a client
that serves an outdated answer gives itself away.
"""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvbench.errors import Unsupported, one_of

if TYPE_CHECKING:
    import requests

#: What a cache must do with an answer, by RFC 9111, and the headers by which the origin says so.
#: Freshness is defined in 4.2; that what is stale may not be served is 4.2.4. That a 500 needs
#: freshness information also follows from section 3 and from RFC 9110, 15.1.
BEHAVIOURS: dict[str, str] = {
    "max_age": "fresh for max-age seconds, so it may be reused until then and not after (4.2)",
    "no_cache": "must be validated before every reuse; an ETag makes that cheap (5.2.2.4)",
    "no_store": "must not be stored at all (5.2.2.5)",
    "error": "a 500 without freshness information must not be reused (4.2.2)",
    "vary": "may be reused only for requests with the same Accept-Language (4.1)",
}

#: A loopback call that takes longer than this is broken, seconds.
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Counts:
    """What reached the origin and what it sent."""

    requests: int = 0
    not_modified: int = 0
    body_bytes: int = 0


@dataclass
class Origin:
    """A running loopback origin.

    Attributes
    ----------
    url:
        Base address, without a final slash.
    counts:
        Totals since the last :meth:`reset`.
    """

    url: str
    counts: Counts = field(default_factory=Counts)
    version: int = 1
    healthy: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def change(self) -> None:
        """Publish new content everywhere; ``/error`` recovers and answers 200 from now on."""
        with self._lock:
            self.version += 1
            self.healthy = True

    def reset(self) -> None:
        """Start counting anew and let ``/error`` fail again."""
        with self._lock:
            self.counts = Counts()
            self.healthy = False

    def _count(self, status: int, body: bytes) -> None:
        with self._lock:
            self.counts = Counts(
                self.counts.requests + 1,
                self.counts.not_modified + (status == 304),
                self.counts.body_bytes + len(body),
            )


def content(version: int, language: str, size: int) -> str:
    """Return the text the origin serves: version and language, padded to ``size`` bytes."""
    return f"version={version} language={language} ".ljust(size, ".")


@contextmanager
def origin(service_s: float, body_bytes: int = 4096, max_age_s: int = 60) -> Iterator[Origin]:
    """Serve on a free port of 127.0.0.1 while the block runs.

    Parameters
    ----------
    service_s:
        Fixed service time of every answer, seconds: a sleep, not a model.
    body_bytes:
        Size of a full answer.
    max_age_s:
        Freshness of ``/max_age`` and ``/vary``, seconds.
    """
    state = Origin("")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Without these two, Nagle's algorithm and delayed acknowledgements add 40 ms to every
        # answer on a connection that is kept alive.
        wbufsize = -1
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            behaviour = self.path.strip("/")
            time.sleep(service_s)
            language = self.headers.get("Accept-Language", "en")
            status, headers = 200, {}
            if behaviour not in BEHAVIOURS:
                status = 404
            elif behaviour == "max_age":
                headers["Cache-Control"] = f"max-age={max_age_s}"
            elif behaviour == "vary":
                headers |= {"Cache-Control": f"max-age={max_age_s}", "Vary": "Accept-Language"}
            elif behaviour == "no_store":
                headers["Cache-Control"] = "no-store"
            elif behaviour == "no_cache":
                tag = f'"v{state.version}"'
                headers |= {"Cache-Control": "no-cache", "ETag": tag}
                if self.headers.get("If-None-Match") == tag:
                    status = 304
            elif not state.healthy:
                status = 500
            body = b"" if status == 304 else content(state.version, language, body_bytes).encode()
            state._count(status, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            if status != 304:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Stay quiet: standard error belongs to the job."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


#: A client: address and headers to (status, text). One cache lives as long as the client.
Fetch = Callable[[str, Mapping[str, str]], tuple[int, str]]


def _read(response: requests.Response) -> tuple[int, str]:
    return response.status_code, response.text


def _none() -> Iterator[Fetch]:
    """A new connection for every request and nothing remembered."""
    import requests

    yield lambda url, headers: _read(requests.get(url, headers=headers, timeout=TIMEOUT_S))


def _session() -> Iterator[Fetch]:
    """One connection kept alive, nothing remembered."""
    import requests

    with requests.Session() as session:
        yield lambda url, headers: _read(session.get(url, headers=headers, timeout=TIMEOUT_S))


def _dict() -> Iterator[Fetch]:
    """The guides' decorator: answers by address in a dict, for ever."""
    import requests

    answers: dict[str, tuple[int, str]] = {}

    def fetch(url: str, headers: Mapping[str, str]) -> tuple[int, str]:
        if url not in answers:
            answers[url] = _read(requests.get(url, headers=headers, timeout=TIMEOUT_S))
        return answers[url]

    yield fetch


def _lru_cache() -> Iterator[Fetch]:
    """The guides' ``functools.lru_cache`` on the function that fetches an address."""
    import requests

    sent: dict[str, str] = {}

    @functools.lru_cache(maxsize=128)
    def remembered(url: str) -> tuple[int, str]:
        return _read(requests.get(url, headers=sent, timeout=TIMEOUT_S))

    def fetch(url: str, headers: Mapping[str, str]) -> tuple[int, str]:
        # The headers are no argument of the memoised function, as in the guides: not in the key.
        sent.clear()
        sent.update(headers)
        return remembered(url)

    yield fetch


def _requests_cache(cache_control: bool) -> Iterator[Fetch]:
    try:
        import requests_cache
    except ModuleNotFoundError as error:
        raise Unsupported("requests-cache is not installed") from error
    with requests_cache.CachedSession(backend="memory", cache_control=cache_control) as session:
        yield lambda url, headers: _read(session.get(url, headers=headers, timeout=TIMEOUT_S))


#: Clients under test by name.
CLIENTS: dict[str, Callable[[], Iterator[Fetch]]] = {
    "none": _none,
    "session": _session,
    "dict": _dict,
    "lru_cache": _lru_cache,
    "requests_cache": lambda: _requests_cache(cache_control=False),
    "requests_cache_revalidating": lambda: _requests_cache(cache_control=True),
}


@contextmanager
def client(name: str) -> Iterator[Fetch]:
    """Give a fresh client with an empty cache to a block.

    ``requests_cache`` is the library as it comes; ``requests_cache_revalidating`` is told to heed
    ``Cache-Control`` and ``ETag``.

    Raises
    ------
    InputError
        If there is no such client; the message names the known ones.
    Unsupported
        If its library is not installed.
    """
    one_of("client", name, CLIENTS)
    yield from CLIENTS[name]()


def is_correct(name: str, behaviour: str) -> bool:
    """Say whether a client behaves by RFC 9111 towards one behaviour, by trying it.

    The client asks, the origin's content changes, and the client asks again: once more at a time
    when no reuse is allowed. Whatever may be reused may also be fetched, so a client without a
    cache is always correct. ``max_age`` is asked again after its one second has passed, and ``vary``
    in two languages by turns.
    """
    with origin(service_s=0.0, body_bytes=64, max_age_s=1) as source, client(name) as fetch:
        url = f"{source.url}/{behaviour}"
        fetch(url, {"Accept-Language": "en"})
        if behaviour == "vary":
            # The other language, and then both again: whoever keeps one variant only must ask.
            again = ("pt", "en", "pt")
            told = [fetch(url, {"Accept-Language": language})[1] for language in again]
            return all(
                f" language={language} " in text for language, text in zip(again, told, strict=True)
            )
        source.change()
        if behaviour == "max_age":
            time.sleep(1.1)
        status, text = fetch(url, {"Accept-Language": "en"})
        return status == 200 and text.startswith(f"version={source.version} ")
