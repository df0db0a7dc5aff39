"""The proxy's calls in flight: shared by equal requests, stopped when nobody waits."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import threading

import fake_openai
import openai
import pytest
from kvbench.caching.proxy import app
from kvbench.caching.proxy.flights import Flight, Flights
from kvbench.caching.proxy.upstream import Call
from proxying import said, until


def test_twenty_equal_requests_at_once_make_one_call(start, upstream):
    client = start()
    upstream.mode = "held"
    asked = client.ask_at_once(20, "hello")
    until(lambda: client.metric("joined_total") == 19)
    upstream.release.set()
    assert {future.result().text for future in asked} == {fake_openai.answer_to("hello")}
    assert upstream.calls == 1


def test_a_request_whose_look_outlasts_another_call_finds_its_answer(start, upstream, monkeypatch):
    client = start()
    looks, empty, go = [], threading.Event(), threading.Event()
    stored = app.Proxy._stored

    async def slow(self, key):
        found = await stored(self, key)
        looks.append(found)
        if len(looks) == 2:
            # The first request looks for the last time before it would call.
            empty.set()
            while not go.is_set():
                await asyncio.sleep(0.001)
        return found

    monkeypatch.setattr(app.Proxy, "_stored", slow)
    (first,) = client.ask_at_once(1, "hello")
    assert empty.wait(5)
    assert client.ask("hello").cache == "miss"
    until(lambda: len(client.proxy._flights) == 0)
    go.set()
    assert first.result().text == fake_openai.answer_to("hello")
    assert looks[:2] == [None, None]
    assert upstream.calls == 1


def test_a_later_reader_gets_the_stream_from_its_beginning(start, upstream):
    client = start()
    upstream.mode = "stalled"
    (first,) = client.ask_at_once(1, "hello", stream=True)
    assert upstream.asked.wait(5)
    (second,) = client.ask_at_once(1, "hello", stream=True)
    until(lambda: client.metric("joined_total") == 1)
    upstream.release.set()
    assert said(first.result().body) == fake_openai.answer_to("hello")
    assert second.result().body == first.result().body
    assert upstream.calls == 1


def test_a_whole_answer_waits_for_the_stream_that_is_on_its_way(start, upstream):
    client = start()
    upstream.mode = "stalled"
    (stream,) = client.ask_at_once(1, "hello", stream=True)
    assert upstream.asked.wait(5)
    (whole,) = client.ask_at_once(1, "hello")
    until(lambda: client.metric("misses_total", reason="new") >= 1)
    upstream.release.set()
    assert said(stream.result().body) == whole.result().text
    assert upstream.calls == 1


def test_different_tenants_share_no_call(start, upstream):
    client = start()
    upstream.mode = "held"
    asked = [client.ask_at_once(1, "hello", headers={"x-api-key": name})[0] for name in ("a", "b")]
    until(lambda: upstream.calls == 2)
    upstream.release.set()
    assert [future.result().cache for future in asked] == ["miss", "miss"]


def test_draws_of_their_own_share_no_call(start, upstream):
    client = start()
    upstream.mode = "held"
    asked = client.ask_at_once(3, "hello", temperature=1)
    until(lambda: upstream.calls == 3)
    upstream.release.set()
    assert [future.result().status for future in asked] == [200, 200, 200]


def test_a_failed_call_fails_for_all_and_is_not_kept(start, upstream):
    client = start()
    upstream.mode = "held"
    asked = client.ask_at_once(3, "hello")
    until(lambda: client.metric("joined_total") == 2)
    upstream.stop.set()
    assert {future.result().status for future in asked} == {502}
    upstream.stop.clear()
    upstream.mode = "ok"
    assert client.ask("hello").cache == "miss"


def test_a_client_that_leaves_before_the_first_byte_stops_the_generation(start, upstream):
    client = start(linger_s=0)
    upstream.mode = "held"
    connection = client.leave_early("hello")
    assert upstream.asked.wait(5)
    connection.close()
    assert upstream.left.wait(5)
    assert client.metric("stopped_generations_total") == 1


def test_a_client_that_sent_a_request_ahead_and_leaves_stops_the_generation_too(start, upstream):
    client = start(linger_s=0)
    upstream.mode = "held"
    connection = client.leave_early("hello")
    assert upstream.asked.wait(5)
    connection.sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.close()
    assert upstream.left.wait(5)
    until(lambda: len(client.proxy._flights) == 0)


class Silent:
    """A server that takes a call and never answers."""

    @contextlib.asynccontextmanager
    async def answer(self, call):
        await asyncio.Event().wait()
        yield


def test_nobody_joins_a_generation_that_is_being_stopped():
    """Between the order to stop and its end others may ask: they would get an error that is not theirs."""

    async def found():
        async def settle(flight):
            raise AssertionError("a stopped call has no answer")

        flights = Flights(0, lambda: None)
        call = Call("POST", b"/v1/chat/completions", [], b"{}")
        flight = flights.start("key", Flight("whole", 1000), Silent(), call, settle)
        reader = flight.join()
        await asyncio.sleep(0)
        before = flights.get("key")
        flights.leave(flight, reader)
        after, done = flights.get("key"), flight.done
        other = flights.start("key", Flight("whole", 1000), Silent(), call, settle)
        await flight.end()
        kept = flights.get("key")
        await flights.close()
        return before is flight, after, done, kept is other

    assert asyncio.run(found()) == (True, None, False, True)


class Connecting(Silent):
    """Cancels the task of its caller for its own ends, as the library that connects does."""

    @contextlib.asynccontextmanager
    async def answer(self, call):
        asyncio.current_task().cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        await asyncio.Event().wait()
        yield


def test_a_call_that_connects_is_not_taken_for_one_that_is_being_stopped():
    async def found():
        async def settle(flight):
            raise AssertionError("it has no answer")

        flights = Flights(0, lambda: None)
        call = Call("POST", b"/v1/chat/completions", [], b"{}")
        flight = flights.start("key", Flight("whole", 1000), Connecting(), call, settle)
        flight.join()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled, joined = flight.task.cancelling(), flights.get("key")
        await flights.close()
        return cancelled, joined is flight

    assert asyncio.run(found()) == (1, True)


def test_a_client_that_leaves_does_not_stop_a_generation_that_others_wait_for(start, upstream):
    client = start(linger_s=0)
    upstream.mode = "held"
    connection = client.leave_early("hello")
    assert upstream.asked.wait(5)
    (other,) = client.ask_at_once(1, "hello")
    until(lambda: client.metric("joined_total") == 1)
    connection.close()
    (third,) = client.ask_at_once(1, "hello")
    until(lambda: client.metric("joined_total") == 2)
    upstream.release.set()
    assert other.result().text == third.result().text == fake_openai.answer_to("hello")
    assert not upstream.left.is_set()


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_clients_retry_joins_the_generation_that_it_began(start, upstream, temperature):
    client = start(linger_s=30)
    upstream.mode = "held"
    connection = client.leave_early("hello", temperature=temperature)
    assert upstream.asked.wait(5)
    connection.close()
    until(lambda: client.proxy._flights._flights and not _readers(client))
    retry = {"x-stainless-retry-count": "1"}
    (again,) = client.ask_at_once(1, "hello", headers=retry, temperature=temperature)
    until(lambda: _readers(client) == 1)
    upstream.release.set()
    assert again.result().text == fake_openai.answer_to("hello")
    assert upstream.calls == 1


def _readers(client):
    return sum(flight.readers for flight in list(client.proxy._flights._flights.values()))


def test_a_generation_may_take_as_long_as_the_client_waits(start):
    settings = start().proxy.settings
    assert (settings.read_timeout_s, settings.total_timeout_s) == (None, None)


def test_a_server_that_takes_too_long_is_asked_once_by_a_client_with_retries(start, upstream):
    upstream.mode = "held"
    proxied = start(total_timeout_s=0.2)
    host, port = proxied.proxy.address
    url = f"http://{host}:{port}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="k") as client,
        pytest.raises(openai.InternalServerError, match="too long"),
    ):
        client.chat.completions.create(
            model="m", temperature=0, messages=[{"role": "user", "content": "hello"}]
        )
    # Counted where the client asks: so short a limit may be over before the server is reached.
    assert proxied.metric("misses_total", reason="new") == 1
    assert upstream.calls <= 1


def test_a_renewal_does_not_wait_for_an_older_call(start, upstream):
    client = start()
    upstream.mode = "held"
    (old,) = client.ask_at_once(1, "hello")
    until(lambda: upstream.calls == 1)
    (new,) = client.ask_at_once(1, "hello", headers={"Cache-Control": "no-cache"})
    until(lambda: upstream.calls == 2)
    upstream.release.set()
    assert {old.result().status, new.result().status} == {200}


def test_an_answer_larger_than_is_kept_flows_at_the_pace_of_its_reader(start, upstream):
    client = start(max_stored_bytes=64)
    reply = client.ask("x" * 200_000)
    assert reply.text == fake_openai.answer_to("x" * 200_000)
    until(lambda: len(client.proxy._flights) == 0)


def test_a_client_of_http_1_0_gets_a_stream_with_a_length(start, upstream):
    client = start()
    body = client.body("hello", stream=True).encode()
    answer = client.raw(
        b"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert said(rest) == fake_openai.answer_to("hello")


def test_a_stream_cut_off_breaks_off_for_every_reader(start, upstream):
    client = start()
    upstream.mode = "cut_stream"
    for future in client.ask_at_once(2, "hello", stream=True):
        with pytest.raises(http.client.IncompleteRead):
            future.result()
