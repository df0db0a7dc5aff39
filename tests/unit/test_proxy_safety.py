"""What the proxy refuses: malformed requests, foreign names, slow and large clients, itself."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import fake_openai
import httpx
import pytest
from kvbench.caching import proxy as proxies
from kvbench.caching.proxy.metrics import Metrics
from kvbench.errors import InputError
from proxying import until

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "lines",
    [
        b"foo\r\n",
        b"Foo : a\r\n",
        b" Foo: a\r\n",
        b": a\r\n",
        b"Foo: a\r\n b\r\n",
        b"Foo: a\rb\r\n",
        b"Foo: a\nBar: b\r\n",
        b"Foo: a\x00b\r\n",
        b"Content-Length: 1\r\nContent-Length: 2\r\n",
        b"Content-Length: 2, 2\r\n",
        b"Content-Length: +2\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Host: localhost\r\n",
    ],
)
def test_a_malformed_request_is_refused_and_the_connection_closed(start, upstream, lines):
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = start().raw(HEAD + lines + b"\r\n" + smuggled)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    assert upstream.paths == []


@pytest.mark.parametrize(
    ("start_line", "lines", "status"),
    [
        (b"POST http://evil.example/v1/chat/completions HTTP/1.1", b"", b"400"),
        (b"GET /v1/../admin HTTP/1.1", b"", b"400"),
        (b"GET /v1/%2e%2E/admin HTTP/1.1", b"", b"400"),
        (b"GET /v1/..%2fadmin HTTP/1.1", b"", b"400"),
        (b"GET /v1/./models HTTP/1.1", b"", b"400"),
        (b"GET /v1/models#x HTTP/1.1", b"", b"400"),
        (b"POST /v1/files HTTP/1.0", b"Transfer-Encoding: chunked\r\n", b"400"),
        (b"GET http://user@localhost/v1/models HTTP/1.1", b"", b"400"),
        (b"POST /v1/files HTTP/1.1", b"Transfer-Encoding: gzip, chunked\r\n", b"501"),
    ],
)
def test_a_request_that_another_reader_would_read_otherwise_is_refused(
    start, upstream, start_line, lines, status
):
    answer = start().raw(start_line + b"\r\nHost: localhost\r\n" + lines + b"\r\n0\r\n\r\n")
    assert answer.split()[1] == status
    assert upstream.paths == []


def test_a_request_of_http_0_9_is_refused(start, upstream):
    assert start().raw(b"GET /\r\n\r\n").split()[1] == b"505"
    assert upstream.paths == []


@pytest.mark.parametrize("size", [b"-5", b"0x5", b"5;a\n", b""])
def test_a_malformed_chunk_is_refused(start, upstream, size):
    answer = start().raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\nhello\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert upstream.paths == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "10.0.0.1:80",
        "127.0.0.1.evil.example",
        "[::1].evil.example",
        "[::1]@evil.example",
        "[::1",
        "evil.example",
        "localhost:80@evil.example",
        "localhost:evil.example",
    ],
)
def test_a_foreign_name_is_refused_on_loopback(start, upstream, name):
    client = start()
    client.ask("hello")
    assert client.ask("hello", headers={"Host": name}).status == 403
    assert upstream.calls == 1


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8", "a.localhost"]
)
def test_the_names_of_this_machine_are_known(start, name):
    assert start().ask("hello", headers={"Host": name}).status == 200


def test_a_name_that_the_operator_allows_is_known(start):
    client = start(allowed_hosts=("cache.example",))
    assert client.ask("hello", headers={"Host": "cache.example:8001"}).status == 200
    assert client.ask("hello", headers={"Host": "other.example"}).status == 403


def test_an_upgrade_is_refused_because_its_body_would_be_lost(start, upstream):
    headers = {"Connection": "Upgrade", "Upgrade": "h2c"}
    assert start().ask("hello", headers=headers).status == 501
    assert upstream.calls == 0


def test_a_request_that_this_proxy_sent_is_refused(start, upstream):
    client = start()
    for before in (b"", b"Via: 1.1 another\r\n"):
        via = before + b"Via: 1.1 %b\r\n" % client.proxy._upstream.name.encode()
        answer = client.raw(HEAD + via + b"Content-Length: 2\r\n\r\n{}")
        assert answer.startswith(b"HTTP/1.1 508")
    assert upstream.paths == []


def test_a_proxy_in_front_of_itself_is_refused_at_start():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433"):
        settings = proxies.Settings(upstream=f"http://{host}:{port}/v1", port=port)
        with pytest.raises(InputError, match="is the proxy itself"):
            settings.check()


# --- time and room --------------------------------------------------------------------------------


def test_a_body_that_drips_is_cut(start, upstream):
    client = start(receive_timeout_s=0.3)
    answer = client.raw(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert upstream.calls == 0


@pytest.mark.parametrize("head", [b"", b"POST /v1/chat", HEAD + b"Foo: "])
def test_a_head_that_does_not_come_is_cut(start, head):
    assert start(receive_timeout_s=0.3).raw(head).startswith(b"HTTP/1.1 408")


def test_the_next_head_of_a_connection_is_limited_too(start):
    client = start(receive_timeout_s=0.3)
    answer = client.raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in answer


def test_the_rest_of_a_body_that_nobody_reads_is_limited_too(start):
    client = start(receive_timeout_s=0.3, idle_timeout_s=60)
    request = b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nx"
    with socket.create_connection(client.proxy.address, timeout=10) as connection:
        connection.sendall(request)
        assert connection.recv(1000).startswith(b"HTTP/1.1 405")
        connection.sendall(b"x")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert connection.recv(1000) == b""


def test_a_body_that_comes_behind_its_answer_does_not_end_the_connection(start):
    client = start()
    connection = http.client.HTTPConnection(*client.proxy.address, timeout=10)
    connection.putrequest("DELETE", "/cache")
    connection.putheader("Content-Length", "4")
    connection.endheaders()
    assert connection.getresponse().read() == b'{"deleted":0}'
    connection.sock.sendall(b"late")
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()


def test_requests_sent_ahead_are_answered_in_order(start, upstream):
    client = start()
    body = client.body("hello").encode()
    ask = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = client.raw(ask + ask + last)
    places = [answer.index(word) for word in (b"x-cache: miss", b"x-cache: hit", b'"status"')]
    assert places == sorted(places)


@pytest.mark.parametrize("size", [20, 200_000])
def test_of_requests_sent_ahead_few_are_held(start, upstream, size):
    """Twenty small ones, or one with a large body, behind an answer that takes its time."""
    client = start(linger_s=0)
    upstream.mode = "held"
    body = client.body("hello").encode()
    ahead = HEAD + b"Content-Length: %d\r\n\r\n" % size + b"x" * size
    with socket.create_connection(client.proxy.address, timeout=10) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert upstream.asked.wait(5)
        with contextlib.suppress(ConnectionError):
            connection.sendall(ahead * (20 if size < 1000 else 1))
            assert connection.recv(1000) == b""
    assert upstream.left.wait(5)
    assert client.metric("refused_requests_total", reason="ahead") == 1


def test_a_connection_without_another_request_is_closed(start):
    client = start(idle_timeout_s=1, receive_timeout_s=60)
    with socket.create_connection(client.proxy.address, timeout=10) as connection:
        connection.sendall(b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert connection.recv(1000) == b""


def test_the_limits_of_a_call_reach_the_library_that_makes_it(start, monkeypatch):
    seen = []
    make = httpx.AsyncHTTPTransport.handle_async_request

    async def noted(self, request):
        seen.append(request.extensions["timeout"])
        return await make(self, request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", noted)
    start(connect_timeout_s=3.0, read_timeout_s=7.0).ask("hello")
    assert seen == [{"connect": 3.0, "read": 7.0, "write": 7.0, "pool": None}]


def test_a_large_body_of_another_path_has_to_keep_coming(start, upstream):
    client = start(receive_timeout_s=0.3)
    answer = client.raw(
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\nx"
    )
    assert answer.startswith(b"HTTP/1.1 408")


def test_open_connections_are_capped(start):
    client = start(max_connections=4)
    waiting = [socket.create_connection(client.proxy.address, timeout=5) for _ in range(4)]
    until(lambda: client.metric("open_connections") == 4)
    assert client.raw(b"").startswith(b"HTTP/1.1 503")
    for connection in waiting:
        connection.close()
    until(lambda: client.metric("open_connections") == 0)
    assert client.ask("hello").status == 200


def test_slow_connections_start_no_threads(start):
    client = start(max_connections=60)
    before = set(threading.enumerate())
    waiting = [socket.create_connection(client.proxy.address, timeout=5) for _ in range(50)]
    for connection in waiting:
        connection.sendall(HEAD + b"Content-Length: 10\r\n\r\n{")
    until(lambda: client.metric("open_connections") == 50)
    # Threads of earlier tests may end meanwhile; none may have come.
    assert set(threading.enumerate()) <= before
    assert client.ask("hello").status == 200
    for connection in waiting:
        connection.close()


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"Foo: " + b"a" * 2000,
        HEAD + b"".join(b"Foo%d: a\r\n" % n for n in range(200)) + b"\r\n",
        b"GET /" + b"a" * 2000,
    ],
)
def test_a_head_that_is_too_large_is_refused(start, upstream, head):
    assert start(max_header_bytes=1000).raw(head).startswith(b"HTTP/1.1 431")
    assert upstream.paths == []


def test_a_client_that_takes_nothing_is_cut(start, upstream):
    client = start(send_timeout_s=0.3, max_stored_bytes=2**25, max_request_bytes=2**25)
    text = "x" * (8 * 2**20)
    client.ask(text)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(client.proxy.address)
    body = client.body(text).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    until(lambda: client.metric("open_connections") == 1)
    until(lambda: client.metric("open_connections") == 0)
    connection.close()


# --- bodies ---------------------------------------------------------------------------------------


def chunked(body):
    return (
        b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]))
        + b"0\r\n\r\n"
    )


def test_a_chunked_body_is_served(start, upstream):
    client = start()
    body = client.body("hello").encode()
    request = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(body)
    assert b"x-cache: miss" in client.raw(request)
    assert b"x-cache: hit" in client.raw(request)
    assert client.ask("hello").cache == "hit"
    assert upstream.bodies == [body]


def test_a_trailer_behind_a_chunked_body_is_no_header(start, upstream):
    client = start()
    body = client.body("hello").encode()
    plain = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(body)
    client.raw(plain)
    trailer = plain.removesuffix(b"\r\n") + b"x-forwarded-user: root\r\n\r\n"
    assert b"x-cache: hit" in client.raw(trailer)
    models = plain.replace(b"/chat/completions", b"/files")
    client.raw(models.removesuffix(b"\r\n") + b"x-forwarded-user: root\r\n\r\n")
    assert not any("x-forwarded-user" in headers for headers in upstream.sent_headers)


def test_a_query_of_any_bytes_is_passed_on_or_refused(start):
    client = start()
    body = client.body("hello").encode()
    request = (
        b"POST /v1/chat/completions?a=\xff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    )
    answer = client.raw(request + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))


def test_a_client_that_waits_to_continue_is_told_to(start, upstream):
    client = start()
    body = client.body("hello").encode()
    with socket.create_connection(client.proxy.address, timeout=5) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert "expect" not in upstream.sent_headers[0]


@pytest.mark.parametrize(
    ("coding", "compress"),
    [("gzip", gzip.compress), ("X-GZIP", gzip.compress), ("deflate", zlib.compress)],
)
def test_a_compressed_body_has_the_key_of_the_plain_one(start, upstream, coding, compress):
    client = start()
    assert client.ask("hello").cache == "miss"
    body = compress(client.body("hello").encode())
    headers = {"Content-Encoding": coding}
    assert client.send("POST", "/v1/chat/completions", body, headers).cache == "hit"


def test_a_body_that_unpacks_to_too_much_is_not_read(start, upstream):
    client = start(max_request_bytes=10_000)
    body = gzip.compress(client.body("x" * 1_000_000).encode())
    headers = {"Content-Encoding": "gzip", "Cache-Control": "only-if-cached"}
    reply = client.send("POST", "/v1/chat/completions", body, headers)
    assert (reply.status, upstream.calls) == (504, 0)


def test_a_large_body_of_another_path_is_passed_on(start, upstream):
    client = start(max_request_bytes=100)
    body = b"x" * 2**20
    assert client.send("POST", "/v1/files", body).status == 200
    assert upstream.bodies == [body]


def test_a_chunked_body_of_another_path_is_passed_on(start, upstream):
    client = start()
    request = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    answer = client.raw(request + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"some bytes"))
    assert answer.startswith(b"HTTP/1.1 200")
    assert upstream.bodies == [b"some bytes"]


def test_a_client_that_leaves_after_a_large_body_stops_what_it_began(start, upstream):
    client = start()
    upstream.mode = "stalled"
    body = client.body("x" * 200_000, stream=True).encode()
    request = b"POST /v1/other HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    upstream.streams = "/v1/other"
    with socket.create_connection(client.proxy.address, timeout=5) as connection:
        connection.sendall(request % len(body) + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert upstream.left.wait(5)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            '{"model": "m", "model": "n", "temperature": 0, "messages": [{"role": "user"}]}',
            "duplicate name",
        ),
        (
            '{"temperature": false, "messages": [{"role": "user", "content": "a"}]}',
            "temperature is no number",
        ),
        (
            '{"temperature": "0", "messages": [{"role": "user", "content": "a"}]}',
            "temperature is no number",
        ),
        (
            '{"temperature": 1e400, "messages": [{"role": "user", "content": "a"}]}',
            "not plain JSON",
        ),
        (
            '{"temperature": ' + "9" * 400 + ', "messages": [{"role": "user", "content": "a"}]}',
            "sampled",
        ),
        (
            '{"temperature": 0, "stream": 1, "messages": [{"role": "user", "content": "a"}]}',
            "stream is no boolean",
        ),
        (
            '{"temperature": 0, "a": NaN, "messages": [{"role": "user", "content": "a"}]}',
            "not plain JSON",
        ),
        (
            '{"temperature": 0, "a": ' + "[" * 80 + "]" * 80 + ', "messages": [{"content": "a"}]}',
            "nesting",
        ),
        (
            '{"temperature": 0, "messages": [{"role": "user", "content": "\\ud800"}]}',
            "not plain JSON",
        ),
        (
            '{"temperature": 0, "messages": [{"role": "user", "content": "a'
            + "\\u0301" * 100
            + '"}]}',
            "not plain JSON",
        ),
        (
            '{"temperature": 0, "messages/system": [], "messages": [{"content": "a"}]}',
            "unknown field",
        ),
    ],
)
def test_a_body_without_a_certain_meaning_is_passed_on_and_not_cached(
    start, upstream, body, reason
):
    client = start()
    for _ in range(2):
        reply = client.send("POST", "/v1/chat/completions", body)
        assert (reply.cache, reply.reason) == ("bypass", reason)
    assert upstream.calls == 2


def test_brackets_without_end_are_no_trouble(start, upstream):
    client = start()
    for text in ("[" * 1_000_000, '{"a":' * 100_000):
        headers = {"Cache-Control": "only-if-cached"}
        assert client.send("POST", "/v1/chat/completions", text, headers).status == 504
    assert client.ask("hello").status == 200


# --- what comes back ------------------------------------------------------------------------------


def test_an_interim_answer_is_not_taken_for_the_answer(start, upstream):
    client = start()
    upstream.mode = "interim"
    assert client.ask("hello").text == fake_openai.answer_to("hello")
    assert client.ask("hello").cache == "hit"


@contextlib.contextmanager
def saying(*answers):
    """A server that says these bytes, one after another, whatever it is asked."""

    def serve():
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)
                # Its side stays open until the caller is done with it.
                connection.settimeout(10)
                with contextlib.suppress(OSError):
                    connection.recv(65_536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


LENGTH_2 = b"Content-Length: 2\r\n\r\n{}"


def test_what_a_server_sends_beyond_its_answer_is_nobodys_answer(start):
    first = b"HTTP/1.1 200 OK\r\n" + LENGTH_2 + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    with saying(first, b"HTTP/1.1 200 OK\r\n" + LENGTH_2) as url:
        client = start(upstream=url)
        for key in "ab":
            assert client.ask("hello", headers={"x-api-key": key}).body == b"{}"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 999 Odd\r\n",
        b"HTTP/1.1 600 Odd\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n",
        b"HTTP/1.1 200 OK\r\nX-A: a\x01b\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n",
    ],
)
def test_an_answer_that_cannot_be_passed_on_is_a_bad_gateway(start, head):
    with saying(head + LENGTH_2) as url:
        assert start(upstream=url).ask("hello").status == 502


def test_chunks_count_where_a_server_also_names_a_length(start):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n"
    with saying(head + b"2\r\n{}\r\n0\r\n\r\n") as url:
        assert start(upstream=url).ask("hello").body == b"{}"


def test_an_error_of_the_server_is_passed_on_as_it_is_and_not_kept(start, upstream):
    client = start()
    upstream.mode, upstream.headers = "error", {"Retry-After": "7", "x-ratelimit-reset": "1s"}
    for _ in range(2):
        reply = client.ask("hello")
        assert (reply.status, reply.body) == (500, b'{"error": {"message": "no"}}')
        assert (reply.headers["retry-after"], reply.headers["x-ratelimit-reset"]) == ("7", "1s")
    assert upstream.calls == 2


def test_a_redirect_is_handed_to_the_client_and_not_followed(start, upstream):
    with saying(
        b"HTTP/1.1 307 Temporary Redirect\r\nContent-Length: 0\r\n"
        b"Location: " + upstream.url.encode() + b"/chat/completions\r\n\r\n"
    ) as url:
        reply = start(upstream=url).ask("hello")
    assert (reply.status, upstream.paths) == (307, [])


@pytest.mark.parametrize("kind", ["text/plain", "application/json; charset=utf-16"])
def test_a_body_by_another_name_has_another_answer(start, kind):
    client = start()
    client.ask("hello", headers={"Content-Type": "application/json"})
    assert client.ask("hello", headers={"Content-Type": kind}).cache == "miss"
    plain = {"Content-Type": 'Application/JSON; charset="UTF-8"'}
    assert client.ask("hello", headers=plain).cache == "hit"


def test_a_body_of_very_many_lists_is_passed_on_unread(start):
    reply = start().ask("hello", x=[[]] * 100_000)
    assert (reply.cache, reply.reason) == ("bypass", "nesting")


def test_the_servers_own_cache_headers_are_replaced(start, upstream):
    client = start()
    upstream.headers = {"x-cache": "HIT", "x-cache-reason": "mine", "X-Similarity": "2"}
    reply = client.ask("hello")
    assert reply.headers.get_all("x-cache") == ["miss"]
    assert reply.headers.get_all("x-cache-reason") == ["new"]
    assert reply.headers.get_all("x-similarity") is None


def test_a_hit_keeps_what_a_browser_needs_and_drops_what_was_the_first_askers(start, upstream):
    client = start()
    upstream.headers = {
        "Access-Control-Allow-Origin": "https://app.example",
        "Vary": "Origin",
        "Set-Cookie": "session=1",
        "x-request-id": "1",
        "x-ratelimit-remaining-requests": "9",
    }
    origin = {"Origin": "https://app.example"}
    client.ask("hello", headers=origin)
    reply = client.ask("hello", headers=origin)
    assert reply.cache == "hit"
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert reply.headers["vary"] == "Origin"
    for name in ("set-cookie", "x-request-id", "x-ratelimit-remaining-requests"):
        assert reply.headers[name] is None
    assert client.ask("hello", headers={"Origin": "https://other.example"}).cache == "miss"


@pytest.mark.parametrize("vary", ["*", "User-Agent", "Accept-Encoding, X-Stainless-Lang"])
def test_an_answer_that_varies_with_what_the_key_leaves_out_is_not_kept(start, upstream, vary):
    client = start()
    upstream.headers = {"Vary": vary}
    client.ask("hello")
    reply = client.ask("hello")
    assert (reply.cache, reply.reason) == ("miss", "not stored: vary")


def test_the_proxys_own_request_headers_are_not_forwarded(start, upstream):
    client = start()
    client.ask("hello", headers={"x-cache-namespace": "a", "x-cache-ttl": "5", "x-keep": "1"})
    assert not [name for name in upstream.sent_headers[0] if name.startswith("x-cache")]
    assert upstream.sent_headers[0]["x-keep"] == "1"


def test_no_request_leaves_for_a_proxy_of_the_environment(start, upstream, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert start().ask("hello").status == 200


@pytest.mark.parametrize(
    "target", [b"http://localhost/v1/models", b"//evil.example/v1/models", b"/@evil.example/models"]
)
def test_every_target_is_asked_of_the_configured_server(start, upstream, target):
    client = start()
    answer = client.raw(
        b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200")
    assert len(upstream.paths) == 1


# --- long texts and the encoder -------------------------------------------------------------------


def test_a_request_beside_a_text_that_is_being_encoded_is_not_held_up(start, upstream):
    started, go_on = threading.Event(), threading.Event()

    class Slow:
        dimension = 2

        def __call__(self, text):
            started.set()
            go_on.wait(10)
            return [1.0, 0.0]

        def fits(self, _text):
            return True

    client = start(encoder=Slow(), threshold=0.9)
    (slow,) = client.ask_at_once(1, "long text")
    assert started.wait(5) or slow
    began = time.monotonic()
    assert client.send("GET", "/v1/models").status == 200
    assert client.ask("hello", temperature=1).status == 200
    assert time.monotonic() - began < 5
    go_on.set()
    assert slow.result().status == 200


def test_what_the_encoder_does_not_read_takes_no_place_in_the_index(start):
    client = start(threshold=0.9)
    unread = "a" * 100_000
    client.ask(unread)
    assert client.proxy._semantic.footprint() == (0, 0)
    assert client.ask("b" * 100_000).cache == "miss"
    assert client.ask(unread).headers["x-cache-kind"] == "exact"


def test_the_vector_index_is_bounded_in_bytes(start, upstream):
    client = start(threshold=0.99, max_bytes=20_000)
    for number in range(60):
        client.ask(f"what is thing number {number} in list {number * 7}?")
    assert client.proxy._semantic.footprint()[1] <= 20_000


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "upstream_url",
    [
        "http://h:99999/v1",
        "http://h/v 1",
        "http://h/açúcar",
        "http://[::1/v1",
        "http://h/v1?key=secret",
        "http://h/v1#a",
        "http://user:secret@h/v1",
        "h",
    ],
)
def test_an_upstream_that_cannot_be_is_refused_without_showing_a_password(upstream_url):
    with pytest.raises(InputError, match="--upstream") as error:
        proxies.Settings(upstream=upstream_url).check()
    assert "\n" not in str(error.value)
    if "@" in upstream_url:
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--read-timeout", "inf"),
        ("--read-timeout", "nan"),
        ("--total-timeout", "0"),
        ("--ttl", "inf"),
        ("--receive-timeout", "-1"),
        ("--linger", "nan"),
        ("--max-bytes", "0"),
        ("--deterministic", "gpt"),
        ("--deterministic", "gpt*=sometimes"),
        ("--store", "mongodb://h"),
        ("--second-opinion", "nowhere"),
        ("--listen", "::1:0"),
    ],
)
def test_an_option_that_cannot_be_ends_the_command_in_one_line(capsys, option, value):
    arguments = ["--upstream", "http://127.0.0.1:1/v1", "--listen", "127.0.0.1:0", option, value]
    assert proxies.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {option}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("address", ["redis://:p@ss:w0rd/x@h", "rediss://u:p@ss:w0rd@h:1x/3"])
def test_no_part_of_a_password_is_shown(capsys, address):
    arguments = ["--upstream", "http://127.0.0.1:1/v1", "--listen", "127.0.0.1:0"]
    assert proxies.main([*arguments, "--store", address]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --store")
    for part in ("p@ss", "w0rd", "ss:"):
        assert part not in said


def test_the_loopback_address_of_ipv6_can_be_listened_on(upstream):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no ::1")
    settings = proxies.Settings(upstream=upstream.url, host="::1")
    with proxies.serving(settings) as proxy:
        with socket.create_connection(proxy.address, timeout=5) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert proxy.url.startswith("http://[::1]:")


def test_requests_are_logged_in_one_line_without_prompt_key_or_query(start, caplog):
    client = start(log=True)
    with caplog.at_level("INFO", logger="kvbench.proxy"):
        secret = {"Authorization": "Bearer very-secret"}
        body = client.body("my private question")
        client.send("POST", "/v1/chat/completions?token=hidden", body, secret)
        until(lambda: caplog.records)
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("POST /v1/chat/completions 200 miss (new)")
    for word in ("private", "secret", "hidden", json.loads(body)["model"] + " "):
        assert word not in line


def test_the_log_of_a_deletion_names_no_key_namespace_or_tag(start, caplog):
    client = start(log=True)
    with caplog.at_level("INFO", logger="kvbench.proxy"):
        for kind in ("keys", "namespaces", "tags"):
            client.send("DELETE", f"/cache/{kind}/somebody")
        until(lambda: len(caplog.records) == 3)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in lines] == [
        *("/cache/keys/*", "/cache/namespaces/*", "/cache/tags/*")
    ]


@pytest.mark.parametrize("name", ["proxy.md", "proxy.pt-BR.md"])
def test_the_page_tells_of_every_metric_and_of_the_options_that_change_answers(name):
    text = (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")
    metrics = Metrics()
    for family in metrics.registry.collect():
        plain = family.name.removeprefix("kvbench_proxy_")
        known = f"`{plain}_total`" if family.type == "counter" else f"`{plain}`"
        assert known in text, known
    options = "upstream listen store secret-file threshold second-opinion cache-sampled prices log"
    options += " deterministic cache-length-limited ignore-field neutral-header allow-remote linger"
    for option in options.split():
        assert f"--{option}" in text, option


def test_a_remote_listener_is_warned_about(upstream):
    command = [sys.executable, "-m", "kvbench.caching.proxy", "--upstream", upstream.url]
    command += ["--listen", "0.0.0.0:0"]
    environment = {"PYTHONPATH": str(Path(proxies.__file__).parents[3])}
    with subprocess.Popen(
        [*command, "--allow-remote"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout.readline().startswith("listening on http://0.0.0.0:")
        process.terminate()
        _, said = process.communicate(timeout=10)
    assert said.startswith("warning: http://0.0.0.0:")
    assert said.count("\n") == 1
