"""Keys, directives, stores and counters of the proxy: what is a hit, for how long, and for whom."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import re
import sqlite3
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvbench.caching import proxy as proxies
from kvbench.caching import server as servers
from kvbench.caching.proxy import answers, app, directives, stores, tenancy
from kvbench.caching.proxy.questions import NotCacheable, parsed
from kvbench.caching.proxy.semantic import Semantic
from kvbench.caching.resilience import refused_port
from kvbench.errors import InputError, Unsupported
from proxying import Client, WordEncoder, said, until

USAGE = {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["user", "metadata", "store"])
def test_a_field_that_cannot_change_the_answer_is_left_out_of_the_key_if_asked(start, field):
    values = {"user": ("u-1", "u-2"), "metadata": ({"a": "1"}, {}), "store": (True, False)}[field]
    strict, lenient = start(), start(ignored_fields=(field,))
    for client, second in ((strict, "miss"), (lenient, "hit")):
        assert client.ask("hello", **{field: values[0]}).cache == "miss"
        assert client.ask("hello", **{field: values[1]}).cache == second
    assert strict.metric("missed_only_total", part=field) == 1


def test_both_spellings_of_an_accent_have_one_key(start, upstream):
    client = start()
    client.ask("café")
    assert client.ask("cafe\u0301").cache == "hit"
    assert client.ask("cafe").cache == "miss"


def test_names_that_are_one_in_normal_form_have_no_key(start):
    reply = start().ask("hello", metadata={"é": 1, "e\u0301": 2})
    assert (reply.cache, reply.reason) == ("bypass", "not plain JSON")


@pytest.mark.parametrize(
    ("rule", "fields", "cache"),
    [
        ("seed", {"temperature": 1, "seed": 7}, "miss"),
        ("seed", {"temperature": 1, "seed": True}, "bypass"),
        ("seed", {"temperature": 1}, "bypass"),
        ("always", {"temperature": 1}, "miss"),
        ("never", {}, "bypass"),
        ("temperature", {"temperature": 1, "seed": 7}, "bypass"),
    ],
)
def test_what_is_deterministic_is_a_rule_of_the_model(start, rule, fields, cache):
    client = start(deterministic=(("m*", rule), ("*", "never")))
    assert client.ask("hello", **fields).cache == cache
    assert client.ask("hello", **(fields | {"model": "other"})).cache == "bypass"


def test_keys_differ_between_installations(start):
    first, second = start(), start()
    assert first.ask("hello").headers["x-cache-key"] != second.ask("hello").headers["x-cache-key"]


def test_whatever_a_store_or_an_index_holds_is_hashed_with_the_secret():
    settings = proxies.Settings(upstream="http://h/v1")
    body = {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "hello"}]}
    first, second = (proxies.question_of(body, settings, secret=key) for key in (b"one", b"two"))
    assert (first.exact != second.exact, first.context != second.context) == (True, True)
    assert set(first.parts.values()).isdisjoint(second.parts.values())
    headers = [(b"authorization", b"Bearer a")]
    assert tenancy.tenant(headers, (), b"one") != tenancy.tenant(headers, (), b"two")


@given(st.binary(max_size=200))
def test_no_body_makes_the_key_fail_in_another_way(body):
    settings = proxies.Settings(upstream="http://h/v1")
    for encoding in ("", "gzip", "br"):
        with contextlib.suppress(NotCacheable):
            proxies.question_of(parsed(body, encoding, settings), settings)


# --- why it missed --------------------------------------------------------------------------------


def test_a_clock_in_the_system_prompt_is_named_as_the_reason(start, upstream):
    client = start()
    for second in range(10):
        system = [{"role": "system", "content": f"It is 12:00:{second:02}."}]
        reply = client.ask("hello", messages=system)
        assert reply.cache == "miss"
        assert reply.reason == ("system changed" if second else "new")
    assert client.metric("misses_total", reason="system changed") == 9
    assert client.metric("missed_only_total", part="system") == 9


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "n"}, "model changed"),
        ({"seed": 1}, "seed changed"),
        ({"messages": [{"role": "user", "content": "a"}]}, "history changed"),
        ({"made_up": 1}, "other changed"),
        ({"seed": None}, "seed changed"),
        ({"model": "n", "seed": 1}, "new"),
    ],
)
def test_the_one_part_that_changed_is_the_reason(start, change, reason):
    client = start()
    client.ask("hello", seed=0)
    assert client.ask("hello", **({"seed": 0} | change)).reason == reason


def test_a_field_that_is_left_out_is_the_reason_too(start):
    client = start()
    client.ask("hello", seed=0)
    assert client.ask("hello").reason == "seed changed"


def test_a_request_of_very_many_fields_is_not_compared_field_by_field(start):
    client = start()
    fields = {f"field{number}": 1 for number in range(2_000)}
    assert client.ask("hello", **fields).reason == "new"
    reply = client.ask("hello", **(fields | {"seed": 1}))
    assert (reply.cache, reply.reason) == ("miss", "new")


def test_another_question_is_the_ordinary_reason(start):
    client = start()
    client.ask("hello")
    assert client.ask("good bye").reason == "question changed"


def test_reasons_tell_nothing_of_other_tenants(start):
    client = start()
    client.ask("hello", headers={"x-api-key": "a"})
    assert client.ask("hello", headers={"x-api-key": "b"}, seed=1).reason == "new"


def test_an_expired_answer_and_one_that_was_not_kept_are_told_apart(start, upstream):
    client = start()
    client.ask("hello", headers={"x-cache-ttl": "0"})
    assert client.ask("hello").reason == "not stored: no-store"
    upstream.mode = "tool"
    client.ask("call it")
    assert client.ask("call it").reason == "not stored: incomplete"


# --- directives -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "cache", "reason"),
    [
        ("max-age=60", "hit", None),
        ("max-age=0", "miss", "max-age"),
        ("MAX-AGE = 0", "miss", "max-age"),
        ('max-age="60"', "hit", None),
        ("max-age=soon", "miss", "max-age"),
        ("max-age=-1", "miss", "max-age"),
        ("max-age=1000000000000", "hit", None),
        ("max-age=" + "9" * 5000, "hit", None),
        ("min-fresh=60", "hit", None),
        ("min-fresh=999999", "miss", "min-fresh"),
        ("no-cache", "miss", "no-cache"),
        ("only-if-cached", "hit", None),
        ("no-transform", "hit", None),
    ],
)
def test_a_request_says_what_it_accepts(start, header, cache, reason):
    client = start()
    client.ask("hello")
    reply = client.ask("hello", headers={"Cache-Control": header})
    assert (reply.cache, reply.reason) == (cache, reason)


def test_the_older_header_counts_where_the_newer_one_is_silent(start):
    client = start()
    client.ask("hello")
    assert client.ask("hello", headers={"Pragma": "no-cache"}).reason == "no-cache"
    both = {"Pragma": "no-cache", "Cache-Control": "max-age=60"}
    assert client.ask("hello", headers=both).cache == "hit"


@pytest.mark.parametrize("fields", [{}, {"temperature": 1}, {"temperature": None}])
def test_only_if_cached_asks_nobody(start, upstream, fields):
    reply = start().ask("hello", headers={"Cache-Control": "only-if-cached"}, **fields)
    assert (reply.status, upstream.calls) == (504, 0)


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ("no-store", False),
        ("no-cache", False),
        ("max-age=0", False),
        ("max-age=60", True),
        ("private", True),
        ("public, max-age=junk", False),
        ("max-age=" + "9" * 5000, True),
    ],
)
def test_an_answer_says_whether_it_may_be_kept(start, upstream, header, kept):
    client = start()
    upstream.headers = {"Cache-Control": header}
    client.ask("hello")
    assert client.ask("hello").cache == ("hit" if kept else "miss")


def test_an_answer_is_kept_no_longer_than_its_server_says(start, upstream):
    client = start()
    upstream.headers = {"Cache-Control": "max-age=100"}
    client.ask("hello")
    assert client.ask("hello", headers={"Cache-Control": "min-fresh=50"}).cache == "hit"
    assert client.ask("hello", headers={"Cache-Control": "min-fresh=101"}).cache == "miss"


def test_a_request_sets_the_life_of_its_answer_within_the_limit(start):
    client = start(max_ttl_s=1000)
    for text, asked, life in (("a", "50", 50), ("b", "99999", 1000), ("c", "9" * 5000, 1000)):
        client.ask(text, headers={"x-cache-ttl": asked})
        assert client.ask(text, headers={"Cache-Control": f"min-fresh={life // 2}"}).cache == "hit"
        assert client.ask(text, headers={"Cache-Control": f"min-fresh={life + 1}"}).cache == "miss"


@pytest.mark.parametrize(
    "headers",
    [
        {"x-cache-ttl": "soon"},
        {"x-cache-ttl": "-1"},
        {"x-cache-namespace": "a b"},
        {"x-cache-tags": ",".join("abcdefghijklmnopq")},
    ],
)
def test_a_cache_header_that_cannot_be_read_is_refused(start, upstream, headers):
    reply = start().ask("hello", headers=headers)
    assert reply.status == 400
    assert next(iter(headers)) in json.loads(reply.body)["error"]["message"]
    assert upstream.calls == 0


def test_tags_in_two_lines_are_one_list_and_a_namespace_stands_once():
    two = [(b"x-cache-tags", b"a, b"), (b"x-cache-tags", b"c")]
    assert directives.wishes(two).tags == ("a", "b", "c")
    for name in (b"x-cache-namespace", b"x-cache-ttl"):
        with pytest.raises(ValueError, match=f"{name.decode()} stands there twice"):
            directives.wishes([(name, b"1"), (name, b"2")])


@given(st.text(max_size=100))
def test_no_cache_control_is_too_strange_to_read(text):
    value = text.encode("utf-8", "replace")
    directives.freshness([(b"cache-control", value)])
    directives.wishes([(b"cache-control", value), (b"pragma", value)])


# --- namespaces, tags and deletion ----------------------------------------------------------------


def test_namespaces_never_see_each_other(start):
    client = start(threshold=0.5)
    client.ask("hello", headers={"x-cache-namespace": "a"})
    assert client.ask("hello", headers={"x-cache-namespace": "b"}).cache == "miss"
    assert client.ask("hello").cache == "miss"
    assert client.ask("hello", headers={"x-cache-namespace": "a"}).cache == "hit"


STORES = ("memory", "sqlite", "redis")


@pytest.fixture
def place(request, tmp_path):
    """Return the settings of a store: its address and the secret that goes with it."""
    kind = request.param
    if kind != "redis":
        address = "memory" if kind == "memory" else f"sqlite:{tmp_path / 'answers.db'}"
        yield {"store": address, "secret_file": str(tmp_path / "secret")}
        return
    try:
        with servers.running(None, tmp_path) as server:
            path = server.address.removeprefix("unix:")
            yield {"store": f"unix://{path}", "secret_file": str(tmp_path / "secret")}
    except Unsupported as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def no_server_of_the_environment(monkeypatch):
    monkeypatch.delenv("REDIS_URL", raising=False)


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_answers_are_deleted_by_key_namespace_and_tag(start, place):
    client = start(**place)
    marks = {"x-cache-namespace": "n", "x-cache-tags": "one, two"}

    def fill():
        return {
            "plain": client.ask("plain").headers["x-cache-key"],
            "marked": client.ask("marked", headers=marks).headers["x-cache-key"],
        }

    def hits():
        alone = {"Cache-Control": "only-if-cached"}
        return (
            client.ask("plain", headers=alone).status == 200,
            client.ask("marked", headers=marks | alone).status == 200,
        )

    keys = fill()
    assert hits() == (True, True)
    for path, left in (
        (f"/cache/keys/{keys['plain']}", (False, True)),
        ("/cache/namespaces/n", (True, False)),
        ("/cache/tags/two", (True, False)),
        ("/cache", (False, False)),
    ):
        fill()
        reply = client.send("DELETE", path)
        assert reply.status == 200
        assert json.loads(reply.body)["deleted"] == left.count(False)
        assert hits() == left


def test_a_name_with_a_slash_is_deleted_here_and_not_asked_of_the_server(start, upstream):
    client = start()
    for kind, header in (("namespaces", "x-cache-namespace"), ("tags", "x-cache-tags")):
        client.ask("hello", headers={header: "team/one"})
        reply = client.send("DELETE", f"/cache/{kind}/team%2Fone")
        assert json.loads(reply.body) == {"deleted": 1}
    asked = upstream.paths[:]
    for path in ("/cache/", "/cache/keys/", "/cache/keys/a/b", "/cache/nothing/x"):
        assert client.send("DELETE", path).status == 404
    assert upstream.paths == asked


@pytest.mark.parametrize("place", STORES, indirect=True)
def test_nobody_deletes_what_belongs_to_another(start, place):
    client = start(**place)
    key = client.ask("hello", headers={"x-api-key": "a", "x-cache-tags": "t"}).headers[
        "x-cache-key"
    ]
    for path in (f"/cache/keys/{key}", "/cache/tags/t", "/cache", "/cache/namespaces/x"):
        for headers in ({}, {"x-api-key": "b"}):
            assert json.loads(client.send("DELETE", path, headers=headers).body) == {"deleted": 0}
    assert client.ask("hello", headers={"x-api-key": "a"}).cache == "hit"


def test_a_question_without_a_word_is_like_no_other(start):
    client = start(threshold=0.0)
    assert client.ask("...").reason == "new"
    assert client.ask("?!").reason == "question changed"
    assert client.ask("...").headers["x-cache-kind"] == "exact"


def test_a_word_list_that_cannot_be_read_is_told_at_the_start(start, monkeypatch):
    def languages():
        raise InputError("en.yaml: cannot be read")

    monkeypatch.setattr("kvbench.caching.guards.languages", languages)
    with pytest.raises(InputError, match=r"en\.yaml"):
        start(threshold=0.5)
    start(threshold=0.5, guarded=False)


def test_a_deleted_answer_is_no_semantic_hit(start):
    client = start(threshold=0.8)
    client.ask("how long is the warranty on a lamp")
    client.send("DELETE", "/cache")
    assert client.proxy._semantic.footprint() == (0, 0)
    assert client.ask("how long is the warranty on the lamp").cache == "miss"


def test_a_semantic_hit_names_the_key_by_which_its_answer_is_deleted(start):
    client = start(threshold=0.8)
    stored = client.ask("how long is the warranty on a lamp").headers["x-cache-key"]
    hit = client.ask("how long is the warranty on the lamp")
    assert hit.headers["x-cache-kind"] == "semantic"
    assert hit.headers["x-cache-key"] == stored
    assert json.loads(client.send("DELETE", f"/cache/keys/{stored}").body) == {"deleted": 1}
    assert client.ask("how long is the warranty on the lamp").cache == "miss"


def test_a_dead_entry_does_not_stand_before_one_that_lives(start):
    client = start(threshold=0.5)
    first = client.ask("how long is the warranty on a lamp")
    other = "how long is the warranty on the very big and heavy lamp"
    client.ask(other, headers={"Cache-Control": "no-cache"})
    client.proxy.store._drop(first.headers["x-cache-key"])  # as if it had to make room
    question = "how long is the warranty on the lamp"
    headers = {"Cache-Control": "only-if-cached"}
    assert client.ask(question, headers=headers).status == 504
    assert client.ask(question, headers=headers).headers["x-cache-kind"] == "semantic"


@pytest.mark.parametrize("path", ["/cache", "/cache/tags/a", "/metrics", "/healthz"])
def test_the_proxys_own_paths_are_never_asked_of_the_server(start, upstream, path):
    client = start()
    for method in ("POST", "OPTIONS", "PUT"):
        assert client.send(method, path).status == 405
    assert upstream.paths == []


@pytest.mark.parametrize("place", ["sqlite", "redis"], indirect=True)
def test_answers_outlive_the_process(upstream, place):
    settings = proxies.Settings(upstream=upstream.url, **place)
    seen = []
    for _ in range(2):
        with proxies.serving(settings) as proxy:
            reply = Client(proxy).ask("hello")
            seen.append((reply.cache, reply.text))
    assert seen == [("miss", seen[0][1]), ("hit", seen[0][1])]


@pytest.mark.parametrize("place", ["sqlite", "redis"], indirect=True)
def test_questions_alike_are_found_after_a_restart(upstream, place):
    settings = proxies.Settings(upstream=upstream.url, threshold=0.8, **place)
    with proxies.serving(settings, WordEncoder()) as proxy:
        Client(proxy).ask("how long is the warranty on a lamp")
        gone = {"x-cache-tags": "gone"}
        Client(proxy).ask("who made this chair of beech wood", headers=gone)
        Client(proxy).send("DELETE", "/cache/tags/gone")
    with proxies.serving(settings, WordEncoder()) as proxy:
        until(lambda: proxy._semantic.footprint()[0] == 1)
        reply = Client(proxy).ask("how long is the warranty on the lamp")
        assert (reply.cache, reply.headers["x-cache-kind"]) == ("hit", "semantic")
        assert Client(proxy).ask("who made that chair of beech wood").cache == "miss"


@pytest.mark.parametrize("place", ["sqlite", "redis"], indirect=True)
def test_without_a_threshold_no_question_is_kept(upstream, place):
    with proxies.serving(proxies.Settings(upstream=upstream.url, **place)) as proxy:
        Client(proxy).ask("hello")
        assert asyncio.run(questions_at(place)) == []


async def questions_at(place):
    """Return what a further store at the same place says was asked."""
    secret = bytes.fromhex(Path(place["secret_file"]).read_text())
    store = stores.opened(place["store"], 100, 10**6, secret)
    try:
        return await store.questions()
    finally:
        await store.close()


def test_what_is_deleted_while_the_index_is_built_again_does_not_come_back():
    settings = proxies.Settings(upstream="http://127.0.0.1:1/v1", threshold=0.8)

    class Slow(WordEncoder):
        def __call__(self, text):
            begun.set()
            assert goes_on.wait(10)
            return super().__call__(text)

    async def run():
        index = Semantic(settings, Slow(), None)
        life = time.time() + 100
        asked = [stores.Asked(key, "", f"question {key}", life) for key in "abc"]
        restoring = asyncio.create_task(index.restore(asked))
        await asyncio.to_thread(begun.wait, 10)
        deleting = asyncio.create_task(index.discard(["a", "b"]))
        await asyncio.sleep(0)
        goes_on.set()
        await asyncio.gather(restoring, deleting)
        index.close()
        return index.footprint()[0]

    begun, goes_on = threading.Event(), threading.Event()
    assert asyncio.run(run()) == 1


def test_a_redis_server_is_bounded_in_entries(tmp_path):
    async def fill(store):
        for number in range(12):
            await store.put(str(number), entry(life=100.0 + number, now=time.time()))
        found = [number for number in range(12) if await store.get(str(number)) is not None]
        footprint = await store.footprint()
        await store.close()
        return found, footprint[0]

    try:
        with servers.running(None, tmp_path) as server:
            address = f"unix://{server.address.removeprefix('unix:')}"
            store = stores.RedisStore(address, "t:", 5, 10**6)
            # What expires first made room.
            assert asyncio.run(fill(store)) == ([7, 8, 9, 10, 11], 5)
    except Unsupported as reason:
        pytest.skip(str(reason))


def test_a_redis_server_is_bounded_in_bytes_too(tmp_path):
    async def fill(store):
        for number in range(12):
            await store.put(str(number), entry(b"x" * 1000, life=100.0 + number, now=time.time()))
        found = [str(n) for n in range(12) if await store.get(str(n)) is not None]
        measured = await store.footprint()
        await store.put("huge", entry(b"x" * 5000, now=time.time()))
        huge = await store.get("huge")
        await store.delete("11", "")
        after = await store.footprint()
        await store.close()
        return found, measured, huge, after

    try:
        with servers.running(None, tmp_path) as server:
            address = f"unix://{server.address.removeprefix('unix:')}"
            found, measured, huge, after = asyncio.run(
                fill(stores.RedisStore(address, "t:", 100, 5_000))
            )
            redis = server.client()
            kept = {name.decode() for name in redis.keys("t:entry:*")}
            sizes = redis.hgetall("t:sizes")
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert found
    # What expires first made room.
    assert found == [str(number) for number in range(12 - len(found), 12)]
    assert measured[0] == len(found)
    assert len(found) * 1_000 < measured[1] <= 5_000
    assert huge is None
    assert after[0] == len(found) - 1
    assert kept == {f"t:entry:{number}" for number in found[:-1]}
    assert {name.decode() for name in sizes} == set(found[:-1])


@pytest.mark.parametrize("place", ["sqlite", "redis"], indirect=True)
def test_another_secret_finds_nothing(upstream, place, tmp_path):
    for secret in ("one", "two"):
        place["secret_file"] = str(tmp_path / secret)
        with proxies.serving(proxies.Settings(upstream=upstream.url, **place)) as proxy:
            assert Client(proxy).ask("hello").cache == "miss"


def test_every_key_of_a_redis_server_has_a_time_to_live(start, tmp_path):
    try:
        with servers.running(None, tmp_path) as server:
            path = server.address.removeprefix("unix:")
            client = start(store=f"unix://{path}", secret_file=str(tmp_path / "secret"))
            client.ask("hello", headers={"x-cache-tags": "t"})
            redis = server.client()
            assert {redis.pttl(key) > 0 for key in redis.keys("*")} == {True}
            stored = b"".join(redis.keys("*"))
            assert b"hello" not in stored
    except Unsupported as reason:
        pytest.skip(str(reason))


def test_a_store_that_is_gone_costs_generations_and_no_answers(start, tmp_path):
    with refused_port() as port:
        secret = str(tmp_path / "secret")
        client = start(store=f"redis://:pass@127.0.0.1:{port}/0", secret_file=secret)
        for _ in range(3):
            assert client.ask("hello").text == fake_openai.answer_to("hello")
        assert client.metric("store_errors_total") > 0
        health = client.send("GET", "/healthz")
        assert json.loads(health.body)["status"] == "degraded"
        assert b"pass" not in health.body
        assert client.send("DELETE", "/cache").status == 503


def test_the_secret_is_readable_to_its_owner_alone(tmp_path):
    place = tmp_path / "state" / "secret"
    settings = proxies.Settings(upstream="http://127.0.0.1:1/v1", secret_file=str(place))
    from kvbench.caching.proxy.secret import secret_of

    assert secret_of(settings) == secret_of(settings)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    place.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        secret_of(settings)


# --- the stores themselves ------------------------------------------------------------------------


def entry(body=b"x", life=100.0, now=0.0, **facts):
    return stores.Entry(body, "application/json", "whole", now, now + life, **facts)


@pytest.fixture(params=["memory", "sqlite"])
def make(request, tmp_path):
    """Return a function that opens a store with bounds on a clock of its own."""

    def opened(capacity=100, max_bytes=10**6):
        now = [0.0]
        if request.param == "memory":
            return stores.MemoryStore(capacity, max_bytes, lambda: now[0]), now
        store = stores.SQLiteStore(tmp_path / "s.db", capacity, max_bytes, lambda: now[0])
        return store, now

    return opened


def run(*steps):
    """Await each step and return the results."""
    import asyncio

    async def all_of_them():
        return [await step() for step in steps]

    return asyncio.run(all_of_them())


def test_a_store_is_bounded_in_entries(make):
    store, now = make(capacity=3)
    for number in range(5):
        now[0] += 1
        run(lambda n=number: store.put(f"k{n}", entry()))
    found = run(*(lambda n=n: store.get(f"k{n}") for n in range(5)))
    assert [one is not None for one in found] == [False, False, True, True, True]


def test_a_store_is_bounded_in_bytes(make):
    store, _ = make(max_bytes=20_000)
    for number in range(20):
        run(lambda n=number: store.put(f"k{n}", entry(b"x" * 4000)))
    (footprint,) = run(store.footprint)
    assert 3 <= footprint[0] <= 5
    assert footprint[1] <= 20_000


def test_an_answer_larger_than_the_store_is_not_kept(make):
    store, _ = make(max_bytes=5000)
    small, large = entry(), entry(b"x" * 6000)
    run(lambda: store.put("a", small), lambda: store.put("b", large))
    assert run(lambda: store.get("a"), lambda: store.get("b")) == [small, None]


def test_an_expired_answer_is_gone(make):
    store, now = make()
    run(lambda: store.put("a", entry(life=10)))
    now[0] = 9.9
    assert run(lambda: store.get("a"))[0] is not None
    now[0] = 10.0
    assert run(lambda: store.get("a")) == [None]


def test_a_stored_answer_comes_back_as_it_was(make):
    store, _ = make()
    stored = entry(b"\x00\n\xff", headers=((b"vary", b"Origin"),), tokens=(1, 2), groups=("g",))
    assert run(lambda: store.put("a", stored), lambda: store.get("a"))[1] == stored


@given(st.binary(max_size=300))
def test_damaged_data_is_no_entry(data):
    assert stores.decoded(data) is None
    good = stores.encoded(entry(b"body"))
    for place in range(0, len(good), 7):
        bad = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        found = stores.decoded(bad)
        assert found is None or found.body == b"body"


def test_a_database_that_is_none_is_refused_in_one_line(tmp_path):
    place = tmp_path / "answers.db"
    place.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(InputError, match="--store sqlite:"):
        stores.SQLiteStore(place, 10, 10**6)


def test_the_database_holds_no_prompt_and_no_key(start, tmp_path):
    place = tmp_path / "answers.db"
    client = start(store=f"sqlite:{place}", secret_file=str(tmp_path / "secret"))
    upstream_answer = client.ask("zyxw", headers={"Authorization": "Bearer very-secret"}).text
    client.proxy.close()
    until(lambda: not client.proxy._server.started or place.exists())
    with sqlite3.connect(place) as database:
        rows = repr(database.execute("SELECT key, tenant FROM entries").fetchall())
        rows += repr(database.execute("SELECT * FROM members").fetchall())
    assert "very-secret" not in rows
    assert "zyxw" in upstream_answer
    assert "zyxw" not in rows
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


def test_no_thread_gets_a_wrong_answer_while_entries_expire_and_are_evicted(start, upstream):
    client = start(capacity=10, ttl_s=0.05, max_bytes=30_000, linger_s=0.01)

    def ask(seed):
        draw = random.Random(seed)
        wrong = []
        for _ in range(15):
            text, tenant = f"question {draw.randrange(30)}", {"x-api-key": draw.choice("ab")}
            if draw.random() < 0.1:
                client.leave_early(text, headers=tenant).close()
                continue
            stream = draw.random() < 0.5
            reply = client.ask(text, headers=tenant, stream=stream)
            answer = said(reply.body) if stream else reply.text
            if answer != fake_openai.answer_to(text):
                wrong.append((text, answer))
        return wrong

    with ThreadPoolExecutor(20) as pool:
        assert [wrong for one in pool.map(ask, range(20)) for wrong in one] == []


# --- other interfaces -----------------------------------------------------------------------------


def test_embeddings_are_cached_by_their_input(start, upstream):
    client = start()

    def embed(text, **fields):
        body = json.dumps({"model": "e", "input": text} | fields)
        return client.send("POST", "/v1/embeddings", body)

    assert embed("a").cache == "miss"
    assert (embed("a").cache, embed("a").body) == ("hit", embed("a").body)
    assert embed("b").cache == "miss"
    assert embed("a", dimensions=8).cache == "miss"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/completions", "/v1/audio/speech"])
def test_other_interfaces_pass_through(start, upstream, path):
    client = start()
    for _ in range(2):
        reply = client.send("POST", path, '{"model": "m", "input": "a", "temperature": 0}')
        assert (reply.cache, reply.reason) == ("bypass", "path")
    assert upstream.paths == [path, path]


# --- counters -------------------------------------------------------------------------------------


def test_paid_and_replayed_tokens_are_told_apart(start, upstream):
    client = start(prices=(1.0, 10.0), currency="BRL")
    upstream.usage = USAGE
    replies = [client.ask("hello") for _ in range(10)]
    assert [reply.headers["x-cache-tokens-saved"] for reply in replies] == [
        None,
        *["prompt=30, completion=20"] * 9,
    ]
    for kind, count in (("prompt", 30), ("completion", 20)):
        assert client.metric("tokens_total", kind=kind, source="upstream") == count
        assert client.metric("tokens_total", kind=kind, source="cache") == 9 * count
    saved = 9 * (30 * 1.0 + 20 * 10.0) / 1e6
    assert client.metric("money_saved_total", currency="BRL") == pytest.approx(saved)


def test_tokens_of_a_stream_are_counted_if_the_server_says_them(start, upstream):
    client = start()
    upstream.usage = USAGE
    for _ in range(2):
        client.ask("hello", stream=True, stream_options={"include_usage": True})
    assert client.metric("tokens_total", kind="completion", source="cache") == 20


def test_metrics_are_in_the_format_of_prometheus(start):
    from prometheus_client.parser import text_string_to_metric_families

    client = start(threshold=0.5)
    for text in ("hello", "hello", "What do 10 lamps cost?", "What do 20 lamps cost?"):
        client.ask(text)
    reply = client.send("GET", "/metrics")
    families = {
        family.name: family for family in text_string_to_metric_families(reply.body.decode())
    }
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["kvbench_proxy_hits_total", "exact"] == 1
    assert values["kvbench_proxy_misses_total", "guard numbers"] == 1
    assert values["kvbench_proxy_guard_refusals_total", "numbers"] == 1
    assert values["kvbench_proxy_entries",] == 3
    assert values["kvbench_proxy_store_bytes",] > 0
    assert values["kvbench_proxy_index_entries",] == 3
    assert values["kvbench_proxy_upstream_duration_seconds_count", "end"] == 3


def test_every_kind_of_request_and_answer_is_counted(start, upstream):
    client = start(threshold=0.5)
    began = time.monotonic()
    for headers in ({}, {}, {"Cache-Control": "no-cache"}, {"Host": "evil.example"}):
        client.ask("hello", headers=headers)
    client.ask("hello", temperature=1)
    upstream.mode = "error"
    client.ask("good bye")
    until(lambda: client.metric("hit_duration_seconds_count") == 1)
    took = time.monotonic() - began
    for name, labels, count in (
        ("hits_total", {"kind": "exact"}, 1),
        ("misses_total", {"reason": "no-cache"}, 1),
        ("bypasses_total", {"reason": "sampled"}, 1),
        ("refused_requests_total", {"reason": "host"}, 1),
        ("stored_total", {}, 2),
        ("not_stored_total", {"reason": "status"}, 1),
        ("upstream_calls_total", {"status": "2xx"}, 3),
        ("upstream_calls_total", {"status": "5xx"}, 1),
        ("upstream_duration_seconds_count", {"until": "first_byte"}, 4),
        ("upstream_duration_seconds_count", {"until": "end"}, 4),
        ("semantic_duration_seconds_count", {}, 2),
    ):
        assert client.metric(name, **labels) == count, (name, labels)
    # In seconds: requests one after another cannot have taken longer than all of them.
    for name, labels in (
        ("hit_duration_seconds_sum", {}),
        ("upstream_duration_seconds_sum", {"until": "first_byte"}),
        ("upstream_duration_seconds_sum", {"until": "end"}),
        ("semantic_duration_seconds_sum", {}),
    ):
        assert 0 < client.metric(name, **labels) < took, name
    assert client.metric("open_connections") <= 1
    page = client.send("GET", "/metrics").body.decode()
    for name in ("index_bytes", "store_bytes"):
        assert re.search(rf"^kvbench_proxy_{name} [1-9]", page, re.MULTILINE), name


def test_calls_in_flight_are_shown(start, upstream):
    client = start()
    upstream.mode = "held"
    (asked,) = client.ask_at_once(1, "hello")
    assert upstream.asked.wait(5)
    assert "kvbench_proxy_calls_in_flight 1.0" in client.send("GET", "/metrics").body.decode()
    upstream.release.set()
    assert asked.result().status == 200


def test_a_made_up_field_makes_no_label_of_its_own(start):
    client = start()
    for number in range(5):
        client.ask("hello", **{f"field{number}": 1})
    assert "field" not in client.send("GET", "/metrics").body.decode()


def test_the_proxy_says_that_it_is_well(start):
    client = start()
    client.ask("hello")
    assert json.loads(client.send("GET", "/healthz").body) == {"status": "ok", "entries": 1}
    assert (client.send("HEAD", "/healthz").status, client.send("HEAD", "/healthz").body) == (
        200,
        b"",
    )


# --- forms ----------------------------------------------------------------------------------------


WHOLE = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Olá, mundo", "refusal": None},
            "logprobs": {"content": [{"token": "O", "logprob": -0.1}], "refusal": None},
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
}


def test_an_answer_survives_being_made_a_stream_and_back():
    stream = answers.translated(json.dumps(WHOLE).encode(), "whole", "counted")
    back = json.loads(answers.translated(stream, "counted", "whole"))
    assert back["choices"][0]["message"]["content"] == "Olá, mundo"
    assert back["choices"][0]["logprobs"]["content"] == WHOLE["choices"][0]["logprobs"]["content"]
    assert back["choices"][0]["finish_reason"] == "stop"
    assert back["usage"] == USAGE
    assert {name: back[name] for name in ("id", "created", "model")} == {
        name: WHOLE[name] for name in ("id", "created", "model")
    }


@pytest.mark.parametrize(
    "change",
    [
        {"message": {"role": "assistant", "content": "a", "annotations": [{"type": "url"}]}},
        {"message": {"role": "assistant", "content": "a", "made_up": 1}},
        {"made_up": 1},
    ],
)
def test_an_answer_with_unknown_fields_is_not_translated(change):
    answer = {**WHOLE, "choices": [WHOLE["choices"][0] | change]}
    assert answers.translated(json.dumps(answer).encode(), "whole", "stream") is None


@given(st.text(min_size=1, max_size=200))
def test_any_text_survives_the_translation(text):
    choice = {"index": 0, "finish_reason": "stop"}
    choice["message"] = {"role": "assistant", "content": text}
    stream = answers.translated(
        json.dumps({**WHOLE, "choices": [choice]}).encode(), "whole", "stream"
    )
    if stream is not None:  # lone surrogates are no text
        assert said(stream) == text
        assert answers.finish_reason(stream, answers.EVENTS) == "stop"


def test_a_hit_says_for_how_many_seconds_it_has_been_kept(start, monkeypatch):
    begun = time.time()
    monkeypatch.setattr(time, "time", lambda: begun)
    client = start()
    client.ask("hello")
    monkeypatch.setattr(time, "time", lambda: begun + 7.9)
    assert client.ask("hello").headers["age"] == "7"


def test_a_late_clock_does_not_make_a_negative_age(start, monkeypatch):
    client = start()
    client.ask("hello")
    earlier = time.time() - 100
    monkeypatch.setattr(time, "time", lambda: earlier)
    assert client.ask("hello").headers["age"] == "0"


def test_a_hit_leaves_nothing_to_the_collector_whose_rounds_hold_up_others(start):
    client = start()
    client.ask("hello")
    client.ask("hello")
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            assert client.ask("hello").cache == "hit"
        # The server is done with the last one a moment after its answer.
        until(lambda: not any(isinstance(one, app._Exchange) for one in gc.get_objects()))
    finally:
        gc.enable()
