"""The caching proxy: what it serves again, to whom, and what it never keeps."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_openai
import kvbench
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvbench.caching import proxy as proxies
from kvbench.caching.resilience import black_hole, refused_port
from kvbench.errors import InputError
from proxying import said

# --- hits -----------------------------------------------------------------------------------------


def test_a_repeated_call_is_answered_without_the_server(start, upstream):
    client = start()
    first, second = client.ask("hello"), client.ask("hello")
    assert (first.cache, second.cache) == ("miss", "hit")
    assert second.headers["x-cache-kind"] == "exact"
    assert second.text == first.text == fake_openai.answer_to("hello")
    assert upstream.calls == 1


def test_the_spelling_of_the_json_does_not_matter(start, upstream):
    client = start()
    client.ask("hello")
    body = '{"messages": [{"content": "hello", "role": "user"}], "temperature": 0, "model": "m"}'
    assert client.send("POST", "/v1/chat/completions", body).cache == "hit"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"max_tokens": 5},
        {"seed": 1},
        {"temperature": 0.0, "top_p": 0.5},
        {"messages": [{"role": "system", "content": "Be brief."}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_any_other_field_makes_another_request(start, upstream, change):
    client = start(threshold=0.5)
    client.ask("hello")
    assert client.ask("hello", **change).cache == "miss"
    assert upstream.calls == 2


def test_tenants_never_see_each_others_answers(start, upstream):
    client = start(threshold=0.5)
    client.ask("my secret question", headers={"Authorization": "Bearer a"})
    for headers in (
        {"Authorization": "Bearer b"},
        {},
        {"Authorization": "Bearer a", "OpenAI-Organization": "o"},
        {"api-key": "Bearer a"},
    ):
        assert client.ask("my secret question", headers=headers).cache == "miss"
    assert client.ask("my secret question", headers={"Authorization": "Bearer a"}).cache == "hit"


@pytest.mark.parametrize(
    "name", ["x-api-key", "Cookie", "x-gateway-key", "x-forwarded-user", "cf-access-token"]
)
def test_any_header_that_may_carry_an_identity_separates_tenants(start, upstream, name):
    client = start(threshold=0.5)
    client.ask("my secret question", headers={name: "a"})
    assert client.ask("my secret question", headers={name: "b"}).cache == "miss"
    assert client.ask("my secret question").cache == "miss"
    assert client.ask("my secret question", headers={name: "a"}).cache == "hit"


def test_a_key_in_the_query_separates_tenants(start, upstream):
    client = start()
    body = client.body("my secret question")
    for key, expected in (("a", "miss"), ("b", "miss"), ("a", "hit")):
        reply = client.send("POST", f"/v1/chat/completions?key={key}", body)
        assert reply.cache == expected


def test_headers_that_say_nothing_of_who_asks_keep_a_hit(start, upstream):
    client = start()
    client.ask("hello", headers={"User-Agent": "one", "traceparent": "00-1", "X-B3-TraceId": "1"})
    reply = client.ask("hello", headers={"User-Agent": "two", "x-stainless-retry-count": "1"})
    assert reply.cache == "hit"


def test_api_keys_are_not_kept_in_memory(start):
    client = start(threshold=0.5)
    client.ask("hello", headers={"Authorization": "Bearer very-secret"})
    held = repr(vars(client.proxy.store)) + repr(vars(client.proxy._semantic._cache))
    held += repr(vars(client.proxy._reasons)) + client.send("GET", "/metrics").body.decode()
    assert "very-secret" not in held


def test_a_question_alike_is_a_semantic_hit(start, upstream):
    client = start(threshold=0.8)
    client.ask("how long is the warranty on a lamp")
    reply = client.ask("how long is the warranty on the lamp")
    assert (reply.cache, reply.headers["x-cache-kind"]) == ("hit", "semantic")
    assert 0.8 <= float(reply.headers["x-similarity"]) < 1
    assert reply.text == fake_openai.answer_to("how long is the warranty on a lamp")
    assert upstream.calls == 1


def test_guards_stand_before_a_semantic_hit(start, upstream):
    question, near = "What do 10 lamps from Porto cost?", "What do 20 lamps from Porto cost?"
    client = start(threshold=0.5)
    client.ask(question)
    assert client.ask(near).cache == "miss"
    unguarded = start(threshold=0.5, guarded=False)
    unguarded.ask(question)
    assert unguarded.ask(near).cache == "hit"


def test_the_same_follow_up_in_another_conversation_is_no_hit(start, upstream):
    client = start(threshold=0.5)
    for subject in ("lamps", "boats"):
        history = [
            {"role": "user", "content": subject},
            {"role": "assistant", "content": "Two kinds."},
        ]
        assert client.ask("What about the second one?", messages=history).cache == "miss"


def test_expired_answers_are_generated_again(start, upstream):
    client = start(ttl_s=0.05, threshold=0.5)
    client.ask("hello")
    time.sleep(0.1)
    assert client.ask("hello").cache == "miss"


def test_a_kept_alive_connection_serves_many_requests(start, upstream):
    client = start()
    connection = http.client.HTTPConnection(*client.proxy.address, timeout=10)
    body = json.dumps(
        {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "hello"}]}
    )
    seen = []
    for _ in range(3):
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        response.read()
        seen.append(response.headers["x-cache"])
    connection.close()
    assert seen == ["miss", "hit", "hit"]


# --- what is not cached ---------------------------------------------------------------------------


def test_no_store_neither_reads_nor_writes_the_cache(start, upstream):
    client = start()
    private = {"Cache-Control": "no-store"}
    assert client.ask("hello", headers=private).cache == "bypass"
    assert client.ask("hello").cache == "miss"
    assert client.ask("hello", headers=private).cache == "bypass"
    assert upstream.calls == 3


def test_no_cache_skips_the_lookup_and_renews_the_answer(start, upstream):
    client = start()
    client.ask("hello")
    assert client.ask("hello", headers={"Cache-Control": "no-cache"}).cache == "miss"
    assert client.ask("hello").cache == "hit"
    assert upstream.calls == 2
    counted = client.send("GET", "/metrics").body.decode()
    assert 'kvbench_proxy_misses_total{reason="no-cache"} 1.0' in counted


@pytest.mark.parametrize("temperature", [None, 0.7, 1])
def test_sampled_answers_are_not_frozen(start, upstream, temperature):
    client = start()
    for _ in range(2):
        assert client.ask("hello", temperature=temperature).cache == "bypass"
    assert upstream.calls == 2


def test_sampled_answers_are_frozen_if_asked(start, upstream):
    client = start(cache_sampled=True)
    client.ask("hello", temperature=1)
    assert client.ask("hello", temperature=1).cache == "hit"


@pytest.mark.parametrize("mode", ["error", "rubbish", "tool", "empty", "length", "no_store"])
def test_what_is_no_complete_successful_answer_is_passed_on_and_not_kept(start, upstream, mode):
    client = start(threshold=0.5)
    upstream.mode = mode
    assert client.ask("hello").status == (500 if mode == "error" else 200)
    upstream.mode = "ok"
    reply = client.ask("hello")
    assert (reply.status, reply.cache) == (200, "miss")
    assert reply.text == fake_openai.answer_to("hello")


def test_answers_cut_at_max_tokens_are_kept_if_asked(start, upstream):
    client = start(cache_length_limited=True)
    upstream.mode = "length"
    client.ask("hello", max_tokens=3)
    assert client.ask("hello", max_tokens=3).cache == "hit"


def test_a_server_that_closes_early_breaks_the_answer_and_nothing_is_kept(start, upstream):
    client = start()
    upstream.mode = "short"
    with pytest.raises(http.client.IncompleteRead):
        client.ask("hello")
    upstream.mode = "ok"
    assert client.ask("hello").cache == "miss"


def test_a_server_that_speaks_no_http_is_a_bad_gateway(start, upstream):
    client = start()
    upstream.mode = "not_http"
    reply = client.ask("hello")
    assert reply.status == 502
    assert "cannot be used" in json.loads(reply.body)["error"]["message"]


def test_a_server_that_is_not_there_is_a_bad_gateway(start):
    with refused_port() as port:
        client = start(upstream=f"http://127.0.0.1:{port}/v1")
        assert client.ask("hello").status == 502


def test_a_server_that_never_answers_ends_in_time(start):
    with black_hole() as port:
        client = start(upstream=f"http://127.0.0.1:{port}/v1", read_timeout_s=0.2)
        reply = client.ask("hello")
        assert reply.status == 504
        assert reply.seconds < 5


def test_a_server_that_drips_for_ever_is_cut_at_the_total_limit(start, upstream):
    client = start(total_timeout_s=0.4)
    upstream.mode = "drip"
    started = time.monotonic()
    with contextlib.suppress(http.client.IncompleteRead):
        # The limit may be over before the stream begins.
        assert client.ask("hello", stream=True).status == 504
    assert time.monotonic() - started < 5
    assert client.metric("misses_total", reason="new") == 1


def test_answers_larger_than_the_limit_pass_through_and_are_not_kept(start, upstream):
    client = start(max_stored_bytes=50)
    assert client.ask("hello").text == fake_openai.answer_to("hello")
    assert client.ask("hello").cache == "miss"


# --- streams --------------------------------------------------------------------------------------


def test_a_complete_stream_is_passed_on_and_replayed(start, upstream):
    client = start()
    first, second = client.ask("hello", stream=True), client.ask("hello", stream=True)
    assert (first.cache, second.cache) == ("miss", "hit")
    assert first.body == second.body
    assert said(second.body) == fake_openai.answer_to("hello")
    assert second.headers["content-type"].startswith("text/event-stream")


def test_a_whole_answer_is_served_from_a_stream(start, upstream):
    client = start()
    first = client.ask("hello", stream=True)
    second, third = client.ask("hello", stream=False), client.ask("hello")
    assert (first.cache, second.cache, third.cache) == ("miss", "hit", "hit")
    assert second.text == fake_openai.answer_to("hello")
    assert second.body == third.body
    assert second.headers["content-type"] == "application/json"


def test_a_stream_is_served_from_a_whole_answer(start, upstream):
    client = start()
    upstream.usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    first = client.ask("hello")
    second = client.ask("hello", stream=True)
    counted = client.ask("hello", stream=True, stream_options={"include_usage": True})
    assert (first.cache, second.cache, counted.cache) == ("miss", "hit", "hit")
    assert said(second.body) == fake_openai.answer_to("hello")
    assert b"usage" not in second.body
    assert b'"completion_tokens":4' in counted.body
    assert second.body.endswith(b"data: [DONE]\n\n")


def test_counts_that_the_server_did_not_send_are_not_made_up(start, upstream):
    client = start()
    upstream.usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    client.ask("hello", stream=True)
    counted = client.ask("hello", stream=True, stream_options={"include_usage": True})
    assert (counted.cache, counted.headers["x-cache-reason"]) == ("miss", "form")
    assert client.ask("hello", stream=True).cache == "hit"
    assert b"usage" not in client.ask("hello", stream=True).body


def test_a_stream_that_is_cut_off_is_not_kept(start, upstream):
    client = start()
    upstream.mode = "cut_stream"
    with pytest.raises(http.client.IncompleteRead):
        client.ask("hello", stream=True)
    upstream.mode = "ok"
    assert client.ask("hello", stream=True).cache == "miss"


def test_a_stream_with_an_error_in_it_is_not_kept(start, upstream):
    client = start()
    upstream.mode = "stream_error"
    client.ask("hello", stream=True)
    upstream.mode = "ok"
    assert client.ask("hello", stream=True).cache == "miss"


def test_a_stream_arrives_piece_by_piece(start, upstream):
    client = start(total_timeout_s=3)
    upstream.mode = "drip"
    connection = http.client.HTTPConnection(*client.proxy.address, timeout=5)
    body = {"stream": True, "temperature": 0, "messages": [{"role": "user", "content": "x"}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    # The server never ends: whatever is read was passed on before the end.
    assert b"still there" in connection.getresponse().read1(100)
    connection.close()


def test_a_client_that_leaves_stops_the_generation_and_nothing_is_kept(start, upstream):
    client = start(linger_s=0)
    upstream.mode = "stalled"
    connection = http.client.HTTPConnection(*client.proxy.address, timeout=5)
    body = {"model": "m", "stream": True, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "x"}]
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    connection.getresponse().read1(10)
    connection.close()
    assert upstream.left.wait(5)
    upstream.mode = "ok"
    assert client.ask("x", stream=True).cache == "miss"


# --- everything else ------------------------------------------------------------------------------


def test_other_paths_pass_through_uncached(start, upstream):
    client = start()
    replies = [client.send("GET", "/v1/models") for _ in range(2)]
    assert [reply.cache for reply in replies] == ["bypass", "bypass"]
    assert upstream.paths == ["/v1/models", "/v1/models"]


def test_a_body_that_is_no_json_is_left_to_the_server(start, upstream):
    client = start()
    reply = client.send("GET", "/v1/chat/completions")
    assert reply.cache == "bypass"


def test_a_request_that_is_too_large_is_refused(start, upstream):
    client = start(max_request_bytes=100)
    assert client.ask("x" * 200).status == 413
    assert upstream.calls == 0


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 20])
def test_a_senseless_content_length_is_refused(start, length):
    client = start()
    with socket.create_connection(client.proxy.address, timeout=5) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %b\r\n\r\n"
            % length.encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_the_openai_client_works_through_the_proxy(start, upstream):
    import openai

    host, port = start().proxy.address
    url = f"http://{host}:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=10) as client:
        for expected in ("miss", "hit"):
            response = client.chat.completions.with_raw_response.create(
                model="m", temperature=0, messages=[{"role": "user", "content": "hello"}]
            )
            assert response.headers["x-cache"] == expected
            content = response.parse().choices[0].message.content
            assert content == fake_openai.answer_to("hello")


@given(st.text(max_size=300))
def test_whatever_a_server_says_is_judged_without_an_exception(text):
    for kind in ("application/json", "text/event-stream"):
        proxies.finish_reason(text.encode(), kind)
        assert proxies.finish_reason(b"data: " + text.encode() + b"\n\n", kind) is None


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists))
def test_no_json_but_a_chat_answer_is_complete(value):
    assert proxies.finish_reason(json.dumps(value).encode(), "application/json") is None
    assert proxies.finish_reason(json.dumps({"choices": value}).encode(), "") is None


# --- settings and command line --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"host": "0.0.0.0"}, "--allow-remote"),
        ({"host": "192.0.2.1"}, "--allow-remote"),
        ({"threshold": 1.5}, "--threshold"),
        ({"upstream": "127.0.0.1:8000"}, "--upstream"),
        ({"upstream": "ftp://host/v1"}, "--upstream"),
        ({"capacity": 0}, "--capacity"),
        ({"read_timeout_s": 0}, "--read-timeout"),
        ({"ttl_s": -1}, "--ttl"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(change, word):
    settings = proxies.Settings(**({"upstream": "http://127.0.0.1:1/v1"} | change))
    with pytest.raises(InputError, match=word) as error:
        settings.check()
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken_is_refused(start, upstream):
    port = start().proxy.address[1]
    with pytest.raises(InputError, match=f"--listen 127.0.0.1:{port}"):
        proxies.Proxy(proxies.Settings(upstream=upstream.url, port=port))


@pytest.mark.parametrize("listen", ["8001", "127.0.0.1:", "127.0.0.1:99999", "0.0.0.0:0"])
def test_a_wrong_address_ends_the_command_with_one_line(listen, capsys):
    arguments = ["--upstream", "http://127.0.0.1:1/v1", "--listen", listen]
    assert proxies.main(arguments) == 2
    assert re.fullmatch(r"error: --listen .*\n", capsys.readouterr().err)


def test_the_command_serves_until_it_is_terminated(upstream):
    command = [sys.executable, "-m", "kvbench.caching.proxy", "--upstream", upstream.url]
    process = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(kvbench.__file__).parents[1])},
    )
    try:
        address = re.fullmatch(r"listening on http://(.+):(\d+)\n", process.stdout.readline())
        connection = http.client.HTTPConnection(address[1], int(address[2]), timeout=10)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        process.terminate()
        status = process.wait(10)
        process.stdout.close()
    assert status == 0
