"""The exact response cache, its backends, and the study that measures them."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import jsonschema
import numpy as np
import pandas as pd
import pytest
import study_runs
from hypothesis import given
from hypothesis import strategies as st
from kvbench.caching.keys import Request, request_key
from kvbench.caching.response_cache import (
    MISS,
    Answer,
    BackendError,
    MemoryBackend,
    RedisBackend,
    ResponseCache,
    SQLiteBackend,
    decode,
    encode,
)
from kvbench.caching.server import running
from kvbench.caching.workload import STREAMS, popularity, shift, zipf
from kvbench.studies import control_of
from kvbench.studies.response_cache import STUDY

GREEDY = {"temperature": 0}


def asking(prompt: str = "p", **fields) -> Request:
    return Request("m", prompt, parameters=fields.pop("parameters", GREEDY), **fields)


class Source:
    """Counts its calls and answers with the number of the call."""

    def __init__(self, **fields):
        self.calls = 0
        self.fields = fields

    def __call__(self, request):
        self.calls += 1
        return Answer(**{"text": f"{request.prompt} {self.calls}", **self.fields})


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with running(None, tmp_path_factory.mktemp("server")) as server:
        yield server.client()


@pytest.fixture(params=["memory", "sqlite", "redis"])
def backend(request, tmp_path):
    if request.param == "memory":
        made = MemoryBackend(100)
    elif request.param == "sqlite":
        made = SQLiteBackend(tmp_path / "cache.sqlite")
    else:
        client = request.getfixturevalue("client")
        made = RedisBackend(client, f"{tmp_path.name}:")
    yield made
    if request.param != "redis":
        made.close()


def test_a_backend_returns_what_was_set_and_misses_what_was_not(backend):
    assert backend.get("k") is MISS
    backend.set("k", b"")
    assert backend.get("k") == b""
    backend.set("k", b"\x00new")
    assert backend.get("k") == b"\x00new"
    backend.delete("k")
    backend.delete("k")
    assert backend.get("k") is MISS


def test_a_backend_counts_entries_and_at_least_their_bytes(backend):
    for number in range(10):
        backend.set(f"key{number}", b"v" * 1000)
    entries, size = backend.footprint()
    assert entries == 10
    assert 10_000 < size < 100_000


def test_a_backend_serves_many_threads(backend):
    failures = []

    def hammer(number):
        try:
            for turn in range(30):
                backend.set(f"{number}", f"{number}".encode() * 100)
                found = backend.get(f"{(number + turn) % 8}")
                if found is not MISS and found != f"{(number + turn) % 8}".encode() * 100:
                    failures.append(found)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_an_entry_expires_after_its_ttl_and_not_before(kind, tmp_path):
    clock = Clock()
    made = MemoryBackend(9, clock) if kind == "memory" else SQLiteBackend(tmp_path / "c", clock)
    made.set("short", b"1", ttl_s=10)
    made.set("long", b"2")
    clock.now = 9.9
    assert made.get("short") == b"1"
    clock.now = 10.0
    assert made.get("short") is MISS
    assert made.get("long") == b"2"
    made.close()


def test_the_server_gets_the_ttl_in_milliseconds(client):
    backend = RedisBackend(client, "ttl:")
    backend.set("k", b"1", ttl_s=12.5)
    assert 12_000 < client.pttl("ttl:k") <= 12_500


def test_sqlite_entries_survive_the_process_and_can_be_purged(tmp_path):
    clock = Clock()
    first = SQLiteBackend(tmp_path / "c", clock)
    first.set("old", b"1", ttl_s=1)
    first.set("kept", b"2", ttl_s=100)
    first.close()
    second = SQLiteBackend(tmp_path / "c", clock)
    clock.now = 2.0
    assert second.purge() == 1
    assert second.get("kept") == b"2"
    second.close()


def test_memory_evicts_the_least_recently_used(tmp_path):
    backend = MemoryBackend(2)
    backend.set("a", b"1")
    backend.set("b", b"2")
    backend.get("a")
    backend.set("c", b"3")
    assert [backend.get(key) is MISS for key in "abc"] == [False, True, False]


def test_a_capacity_of_zero_is_refused():
    with pytest.raises(ValueError, match="capacity is 0"):
        MemoryBackend(0)


@pytest.mark.parametrize(
    "options", [{"ttl_s": 0}, {"ttl_s": math.nan}, {"sampled": "on"}, {"draws": 0}]
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError):
        ResponseCache(MemoryBackend(1), **options)


def test_the_second_equal_request_is_a_hit_with_the_same_answer(backend):
    cache, source = ResponseCache(backend), Source(prompt_tokens=3, completion_tokens=5)
    first = cache.answer(asking(), source)
    second = cache.answer(asking(), source)
    assert (first.hit, second.hit, source.calls) == (False, True, 1)
    assert second.answer == first.answer
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.hit_ratio) == (1, 1, 0.5)
    assert (stats.prompt_tokens_saved, stats.completion_tokens_saved) == (3, 5)


@pytest.mark.parametrize("text", ["0", " ", "null", "false", "naïve ☃ \x00"])
def test_an_answer_that_looks_like_nothing_is_still_an_answer(backend, text):
    cache, source = ResponseCache(backend), Source(text=text)
    cache.answer(asking(), source)
    assert cache.answer(asking(), source).hit
    assert cache.get(asking()).text == text


@pytest.mark.parametrize(
    "answer",
    [
        Answer("cut", finish_reason="length"),
        Answer("no", finish_reason="content_filter"),
        Answer("", finish_reason="tool_calls"),
        Answer("half a stre", finish_reason=""),
        Answer("oops", finish_reason="error"),
        Answer(""),
    ],
)
def test_only_complete_successful_answers_are_stored(answer):
    cache = ResponseCache(MemoryBackend(10))
    cache.answer(asking(), lambda _: answer)
    assert cache.get(asking()) is MISS
    assert cache.stats.not_stored == 1


def test_an_exception_is_passed_on_and_nothing_is_stored():
    cache = ResponseCache(MemoryBackend(10))

    def fails(_):
        raise TimeoutError

    with pytest.raises(TimeoutError):
        cache.answer(asking(), fails)
    assert cache.get(asking()) is MISS


def test_sampled_answers_are_not_stored_unless_asked():
    cache, source = ResponseCache(MemoryBackend(10)), Source()
    warm = asking(parameters={"temperature": 0.7})
    assert not any(cache.answer(warm, source).hit for _ in range(3))
    assert (source.calls, cache.stats.bypassed) == (3, 3)
    assert cache.put(warm, Answer("x")) is False


def test_freezing_returns_the_one_first_draw():
    cache, source = ResponseCache(MemoryBackend(10), sampled="freeze"), Source()
    warm = asking(parameters={"temperature": 0.7})
    assert {cache.answer(warm, source).answer.text for _ in range(20)} == {"p 1"}


def test_a_pool_holds_as_many_draws_as_asked():
    cache, source = ResponseCache(MemoryBackend(99), sampled="freeze", draws=4, seed=1), Source()
    warm = asking(parameters={"temperature": 0.7})
    assert len({cache.answer(warm, source).answer.text for _ in range(200)}) == 4
    assert source.calls == 4
    cache.invalidate(warm)
    assert not cache.answer(warm, source).hit


def test_a_seed_makes_a_sampled_answer_cacheable():
    cache, source = ResponseCache(MemoryBackend(10), sampled="seed"), Source()
    seeded = asking(parameters={"temperature": 1, "seed": 3})
    other = asking(parameters={"temperature": 1, "seed": 4})
    unseeded = asking(parameters={"temperature": 1})
    cache.answer(seeded, source)
    assert cache.answer(seeded, source).hit
    assert not cache.answer(other, source).hit
    assert not cache.answer(unseeded, source).hit
    assert not cache.answer(unseeded, source).hit


def test_tenants_never_share_an_answer():
    cache, source = ResponseCache(MemoryBackend(10)), Source()
    mine = cache.answer(asking(namespace="me"), source).answer
    yours = cache.answer(asking(namespace="you"), source).answer
    assert mine != yours


def test_invalidating_forgets(backend):
    cache, source = ResponseCache(backend), Source()
    cache.answer(asking(), source)
    cache.invalidate(asking())
    assert cache.answer(asking(), source).answer.text == "p 2"


class Broken:
    def get(self, key):
        raise BackendError("gone")

    set = delete = get


def test_a_failing_store_costs_a_generation_and_never_an_answer():
    cache, source = ResponseCache(Broken()), Source()
    assert cache.answer(asking(), source).answer.text == "p 1"
    assert cache.get(asking()) is MISS
    assert cache.stats.backend_errors == 2


def test_an_invalidation_that_failed_does_not_look_like_one():
    with pytest.raises(BackendError):
        ResponseCache(Broken()).invalidate(asking())


@given(st.binary(max_size=200))
def test_rubbish_in_the_store_is_never_an_answer(data):
    assert decode("key", data) is None


@given(st.text(st.characters(exclude_categories=["Cs"])), st.data())
def test_a_flipped_bit_is_never_another_answer(text, data):
    answer = Answer(text, prompt_tokens=7)
    stored = bytearray(encode("key", answer))
    position = data.draw(st.integers(0, len(stored) - 1))
    stored[position] ^= 1 << data.draw(st.integers(0, 7))
    assert decode("key", bytes(stored)) in (None, answer)


def test_an_entry_under_another_key_is_refused():
    assert decode("a", encode("a", Answer("x"))) == Answer("x")
    assert decode("b", encode("a", Answer("x"))) is None


def test_a_corrupt_entry_is_generated_again_and_replaced(backend):
    cache, source = ResponseCache(backend), Source()
    cache.answer(asking(), source)
    backend.set(request_key(asking()), b'{"key": "x"}')
    assert cache.answer(asking(), source).answer.text == "p 2"
    assert cache.answer(asking(), source).hit
    assert cache.stats.corrupt == 1


def test_an_entry_of_another_type_is_replaced(client):
    cache, source = ResponseCache(RedisBackend(client, "type:")), Source()
    client.rpush(f"type:{request_key(asking())}", "a list")
    assert cache.answer(asking(), source).answer.text == "p 1"
    assert cache.answer(asking(), source).hit


def test_counts_are_exact_under_threads():
    cache = ResponseCache(MemoryBackend(10))
    cache.put(asking(), Answer("x"))
    threads = [
        threading.Thread(target=lambda: [cache.get(asking()) for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.stats.hits == 2000


@pytest.mark.parametrize("name", sorted(STREAMS))
def test_a_stream_repeats_with_its_seed_and_has_the_asked_length(name):
    one, two = (STREAMS[name](500, 50, 3) for _ in range(2))
    assert len(one) == 500 and (one == two).all() and one.min() >= 0
    assert name == "loop" or (one != STREAMS[name](500, 50, 4)).any()


def test_zipf_frequencies_follow_the_popularity():
    counts = np.bincount(zipf(100_000, 20, 5, 1.1), minlength=20)
    expected = 100_000 * popularity(20, 1.1)
    # Chi-square with 19 degrees of freedom: 43.8 is its 0.999 quantile.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_a_shift_changes_which_key_is_most_popular():
    stream = shift(20_000, 100, 2, 1.2, phases=2)
    tops = [np.bincount(half).argmax() for half in np.split(stream, 2)]
    assert tops[0] == 0 and tops[1] != 0


def defaults(study, **changed):
    options = {name: entry["default"] for name, entry in study.options["properties"].items()}
    return {**options, **changed}


def run(study, tmp_path, cells=None, **changed):
    only = (lambda name, _cell: True) if cells is None else (lambda name, _cell: name in cells)
    return study_runs.table(study.name, tmp_path, only=only, **changed)


def test_study_hit_ratio_reaches_its_limit_without_wrong_answers(tmp_path):
    table = run(
        STUDY,
        tmp_path,
        cells={"latency"},
        backends=["none", "memory", "sqlite", "server_unix"],
        keys=20,
        service_ms=0.3,
    )
    cached = table[table["backend"] != "none"]
    assert len(cached) == 6
    assert np.isclose(cached["hit_ratio"], cached["hit_ratio_limit"]).all()
    assert (cached["hits"] > 0).all()
    assert (cached["wrong_answers"] == 0).all()
    assert (cached["bytes_per_entry"] > 2048).all()
    # Ten rounds: every gain has its interval, and none lies above what free hits would give.
    assert (cached["speedup_rounds"] == 10).all()
    assert cached["speedup_ci_low"].notna().all()
    assert STUDY.values(table)["response_cache_speedups_beyond_limit"].value == 0


def test_study_sends_every_backend_the_same_requests_in_every_round(tmp_path):
    found = study_runs.records(
        "response_cache",
        tmp_path,
        only=lambda name, _cell: name == "latency",
        backends=["none", "memory", "sqlite"],
        exponents=[0.9],
        rounds=3,
        service_ms=0.1,
    )
    (arms,) = found["latency"]["samples"]["arms"].values()
    assert arms["memory"]["limit"] == arms["sqlite"]["limit"]
    # Three arms and the control of the run without a cache.
    assert sorted(slot for arm in arms.values() for slot in arm["slot"]) == list(range(12))
    assert len(arms[control_of("none")]["round"]) == 3
    assert {row["backend"] for row in found["latency"]["rows"]} == {"none", "memory", "sqlite"}
    assert len(set(arms["memory"]["limit"])) > 1


def test_the_guides_key_answers_wrongly_for_every_field_it_leaves_out(tmp_path):
    table = run(STUDY, tmp_path, cells={"key"}, key_prompts=5, key_repeats=3)
    wrong = table.set_index("key_fields")["wrong_answers"]
    # Of the eight fields, max_tokens (within parameters) is the only one in its key.
    assert wrong["guide md5"] == 5 * 3 * 7


def test_study_every_omitted_field_costs_exactly_its_variants(tmp_path):
    table = run(STUDY, tmp_path, cells={"key"}, key_prompts=5, key_repeats=3)
    wrong = table.set_index("key_fields")["wrong_answers"]
    assert wrong["every field"] == wrong["with timestamp"] == wrong["with user"] == 0
    omitted = wrong[wrong.index.str.startswith("without")]
    # Of a prompt's plain and varied request, asked 3 times each, one is answered by the other.
    assert len(omitted) == 8 and (omitted == 5 * 3).all()
    assert wrong["prompt only"] == 5 * 3 * 8
    lost = table.set_index("key_fields")["hits_lost"]
    assert lost["every field"] == 0
    assert lost["with timestamp"] == table["requests"].iloc[0] - table["unique_requests"].iloc[0]


def test_study_a_cache_freezes_sampling_and_leaves_greedy_alone(tmp_path):
    table = run(STUDY, tmp_path, cells={"sampling"})
    warm = table[table["temperature"] > 0].set_index(["policy", "temperature"])
    assert (warm.loc["freeze"]["distinct_answers"] == 1).all()
    assert (warm.loc["off"]["distinct_answers"] > 2).all()
    assert (warm.loc["skip"]["distinct_answers"] == warm.loc["off"]["distinct_answers"]).all()
    assert (warm.loc["pool"]["generations"] <= 50).all()
    assert (warm.loc["seed"]["same_as_uncached"] == 1).all()
    greedy = table[table["temperature"] == 0]
    assert (greedy["same_as_uncached"] == 1).all()


@pytest.mark.parametrize(
    "changed",
    [
        {"backends": ["dictionary"]},
        {"backends": []},
        {"keys": 0},
        {"exponents": [-1]},
        {"service_ms": 0},
        {"pool": 1},
        {"speed": 1},
    ],
)
def test_study_options_refuse_what_means_nothing(changed):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(defaults(STUDY, **changed), STUDY.options)


def test_study_values_are_empty_without_rows():
    empty = pd.DataFrame(columns=list(STUDY.columns))
    named = STUDY.values(empty)
    assert named and all(value.value is None for value in named.values())


def test_requests_of_other_history_are_other_requests():
    assert request_key(asking()) != request_key(
        replace(asking(), history=[{"role": "user", "content": "hi"}])
    )
