"""Two levels: who answers, what an invalidation reaches, and what the study must find."""

from __future__ import annotations

import threading
import time
from functools import partial

import jsonschema
import pandas as pd
import pytest
import redis
import study_runs
from kvbench.caching import layered
from kvbench.caching.layered import LayeredCache
from kvbench.caching.resilience import impatient
from kvbench.caching.response_cache import MemoryBackend
from kvbench.caching.server import ServerRefused, running
from kvbench.studies.layered import STUDY
from kvbench.studies.measuring.layered import GuideLayers


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(None, tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture
def make(server, request):
    """Make caches that share one namespace, and close them at the end."""
    made = []

    def build(with_server=True, **options):
        settings = {"ttl_s": 60.0, "l1_capacity": 10, **options}
        client = server.client() if with_server else None
        cache = LayeredCache(client, f"{request.node.name}:", **settings)
        assert cache.wait_until_coherent()
        made.append(cache)
        return cache

    yield build
    for cache in made:
        cache.close()


def until(condition, timeout_s=5.0):
    """Whether ``condition()`` becomes true in time; not asked again once it has."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return False


def never():
    raise AssertionError("loaded although it was cached")


def test_a_loaded_value_is_then_found_in_l1(make):
    cache = make()
    assert cache.get("k", lambda: b"1").level == 3
    assert cache.get("k", never) == cache.get("k", never)
    assert cache.get("k", never).level == 1


def test_another_worker_finds_it_in_l2_and_then_in_its_own_l1(make):
    make().get("k", lambda: b"1")
    other = make()
    assert [other.get("k", never).level for _ in range(2)] == [2, 1]


def test_without_promotion_an_l2_hit_stays_an_l2_hit(make):
    make().get("k", lambda: b"1")
    other = make(promote=False)
    assert [other.get("k", never).level for _ in range(2)] == [2, 2]


def test_without_l1_and_without_l2_the_other_level_works_alone(make):
    l2 = make(l1_capacity=0)
    assert [l2.get("k", lambda: b"").level for _ in range(2)] == [3, 2]
    l1 = make(with_server=False)
    assert [l1.get("k", lambda: b"").level for _ in range(2)] == [3, 1]


def test_no_level_at_all_is_refused():
    with pytest.raises(ValueError, match="neither"):
        LayeredCache(None, "", ttl_s=1, l1_capacity=0)


def test_a_promoted_entry_never_outlives_its_source(make, server, request, monkeypatch):
    """L2 has 100 s left when L1 copies it, although L1 may keep entries for an hour."""
    now = [1000.0]
    monkeypatch.setattr(layered, "MemoryBackend", partial(MemoryBackend, clock=lambda: now[0]))
    make().get("k", lambda: b"old")
    server.client().pexpire(f"{request.node.name}:e:k", 100_000)
    other = make(ttl_s=3600.0)
    assert [other.get("k", never).level for _ in range(2)] == [2, 1]
    now[0] += 101
    server.client().delete(f"{request.node.name}:e:k")
    assert other.get("k", lambda: b"new").value == b"new"


def test_l1_may_be_shorter_than_l2(make):
    cache = make(l1_ttl_s=0.02)
    cache.get("k", lambda: b"1")
    assert until(lambda: cache.get("k", never).level == 2)


@pytest.mark.parametrize("coherence", ["broadcast", "validate"])
def test_an_invalidation_reaches_the_l1_of_every_worker(make, coherence):
    workers = [make(coherence=coherence) for _ in range(3)]
    for worker in workers:
        worker.get("k", lambda: b"old")
    workers[0].invalidate("k")
    for worker in workers:
        assert until(lambda w=worker: w.get("k", lambda: b"new").value == b"new")


def test_validated_reads_after_the_acknowledgement_are_never_stale(make):
    writer, reader = make(coherence="validate"), make(coherence="validate")
    for number in range(200):
        expected = str(number).encode()
        writer.invalidate("k")
        assert reader.get("k", lambda value=expected: value).value == expected
        assert reader.get("k", never).level == 1


def test_a_value_loaded_while_its_key_was_invalidated_is_stored_nowhere(make):
    slow, other = make(), make()

    def load():
        other.invalidate("k")
        return b"outdated"

    assert slow.get("k", load).value == b"outdated"
    assert other.get("k", lambda: b"fresh").value == b"fresh"
    assert until(lambda: slow.get("k", lambda: b"fresh").value == b"fresh")


def test_a_failed_load_is_passed_on_and_not_stored(make):
    cache = make()
    with pytest.raises(ZeroDivisionError):
        cache.get("k", lambda: 1 // 0)
    assert cache.get("k", lambda: b"1").level == 3


def test_a_worker_that_cannot_hear_the_server_does_not_trust_its_l1(tmp_path):
    with running(None, tmp_path) as own:
        cache = LayeredCache(own.client(), "n:", ttl_s=60, l1_capacity=10)
        assert cache.wait_until_coherent()
        cache.get("k", lambda: b"old")
        assert cache.get("k", never).level == 1
        own.client().execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        # Emptied on the loss of the connection; the value then comes from L2 again.
        assert until(lambda: cache.get("k", never).level == 2)
        cache.close()


def test_a_dead_server_costs_a_load_and_fills_no_l1(tmp_path):
    with running(None, tmp_path) as own:
        client = own.client(**impatient(0.5))
        cache = LayeredCache(client, "n:", ttl_s=60, l1_capacity=10)
        assert cache.wait_until_coherent()
        client.shutdown(nosave=True)
        assert until(lambda: not cache.wait_until_coherent(0))
        assert [cache.get("k", lambda: b"1").level for _ in range(2)] == [3, 3]
        with pytest.raises(redis.RedisError):
            cache.invalidate("k")
        cache.close()


def test_many_threads_never_see_another_keys_value(make):
    cache = make(l1_capacity=3)
    wrong = []

    def hammer(seed):
        for turn in range(150):
            key = str((turn * seed) % 7)
            if cache.get(key, lambda k=key: k.encode()).value != key.encode():
                wrong.append(key)
            if turn % 20 == 0:
                cache.invalidate(key)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def run(tmp_path, **changed):
    return study_runs.table("layered", tmp_path, **{"rounds": 2, **changed})


def test_study_levels_answer_what_they_must(tmp_path):
    table = run(tmp_path, requests=200, keys=30, service_ms=[0.2], workers=[1, 2])
    shares = [f"l{level}_share_of_requests" for level in (1, 2, 3)]
    assert (table[shares].sum(axis=1).round(12) == 1).all()
    assert (table["wrong_answers"] == 0).all()
    cached = table[table["configuration"] != "source"]
    assert (cached["generations"] >= cached["unique_requests"]).all()
    alone = cached[cached["workers"] == 1].set_index("configuration")
    for name in ("l2", "l1_l2", "l1_l2_promotion", "guide"):
        assert alone.loc[name, "generations"] == alone.loc[name, "unique_requests"]
    # One stream, one L1 size: with promotion L1 sees what it would see alone.
    assert (
        alone.loc["l1_l2_promotion", "l1_share_of_requests"]
        == alone.loc["l1", "l1_share_of_requests"]
        > alone.loc["l1_l2", "l1_share_of_requests"]
    )


def test_study_two_workers_share_l2_and_not_l1(tmp_path):
    table = run(
        tmp_path, requests=300, keys=30, service_ms=[0.2], workers=[2], l1_share=[1.0]
    ).set_index("configuration")
    assert table.loc["l1", "generations"] == table.loc["l1", "unique_per_worker"]
    assert table.loc["l2", "generations"] < table.loc["l2", "unique_per_worker"]


def test_study_gives_gains_with_intervals_and_none_above_what_free_hits_would_give(tmp_path):
    table = run(tmp_path, rounds=10, keys=20, service_ms=[0.5], workers=[1])
    cached = table[table["configuration"] != "source"]
    assert cached["speedup_ci_low"].notna().all()
    assert (cached["speedup_limit"] > 1).all()
    values = STUDY.values(table)
    assert values["layered_speedups_beyond_limit"].value == 0
    assert values["layered_l1_gain_over_l2"].ci is not None


def test_the_guides_dict_gives_up_its_oldest_entry_and_finds_it_on_the_server(server):
    layers = GuideLayers(server.client(), f"{server.namespace}guide:", entries=2)
    for key in ("a", "b"):
        assert layers.get(key, lambda: b"value").level == 3
    # A hit does not make an entry younger: the third key drives out the first.
    assert layers.get("a", lambda: b"value").level == 1
    assert layers.get("c", lambda: b"value").level == 3
    assert layers.get("b", lambda: b"value").level == 1
    assert layers.get("a", lambda: b"value").level == 2


def test_a_server_that_refuses_to_store_gives_no_times(tmp_path, monkeypatch):
    """As a read-only replica would: the cache serves on from the source, the study must not."""

    def refuse(self, *args, **options):
        raise redis.exceptions.ReadOnlyError("You can't write against a read only replica.")

    monkeypatch.setattr("redis.commands.core.Script.__call__", refuse)
    with pytest.raises(ServerRefused, match="read only replica"):
        run(tmp_path, workers=[1], configurations=["l2"], service_ms=[0.1])


def test_study_options_refuse_what_means_nothing():
    options = {name: entry["default"] for name, entry in STUDY.options["properties"].items()}
    for changed in ({"l1_share": [0]}, {"workers": [0]}, {"service_ms": []}, {"keys": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(options | changed, STUDY.options)


def test_study_values_are_empty_without_rows():
    named = STUDY.values(pd.DataFrame(columns=list(STUDY.columns)))
    assert named and all(value.value is None for value in named.values())
