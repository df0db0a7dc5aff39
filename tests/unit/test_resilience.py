"""Dead, slow and lying cache servers, warm starts, and errors that must not stick."""

from __future__ import annotations

import socket
import threading
from contextlib import nullcontext

import jsonschema
import numpy as np
import pandas as pd
import pytest
import redis
import study_runs
from kvbench.caching.keys import Request
from kvbench.caching.resilience import (
    CircuitBreaker,
    CircuitOpen,
    GuardedBackend,
    black_hole,
    impatient,
    refused_port,
    slow_proxy,
)
from kvbench.caching.response_cache import (
    MISS,
    Answer,
    BackendError,
    MemoryBackend,
    RedisBackend,
    ResponseCache,
)
from kvbench.caching.server import running
from kvbench.caching.warmup import most_popular, preload
from kvbench.errors import Unsupported
from kvbench.studies import Context
from kvbench.studies.measuring import resilience as measuring
from kvbench.studies.resilience import CLIENTS, FAULTS, STUDY


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Flaky:
    """A backend that fails while told to, and counts how often it was asked."""

    def __init__(self):
        self.down = True
        self.asked = 0

    def get(self, key):
        self.asked += 1
        if self.down:
            raise BackendError("down")
        return MISS

    def set(self, key, value, ttl_s=None):
        self.get(key)


def fail(breaker):
    def action():
        raise BackendError

    with pytest.raises(BackendError):
        breaker.call(action)


def test_a_breaker_opens_after_failures_in_a_row():
    breaker = CircuitBreaker(failures=3, reset_s=10, clock=Clock())
    fail(breaker)
    fail(breaker)
    breaker.call(lambda: 1)
    fail(breaker)
    fail(breaker)
    assert not breaker.is_open
    fail(breaker)
    assert breaker.is_open
    with pytest.raises(CircuitOpen):
        breaker.call(lambda: pytest.fail("asked although open"))


def test_a_breaker_lets_one_call_through_after_its_reset_time():
    clock = Clock()
    breaker = CircuitBreaker(failures=1, reset_s=10, clock=clock)
    fail(breaker)
    clock.now = 10.0

    def probe():
        # While the probe runs, everybody else is kept away.
        with pytest.raises(CircuitOpen):
            breaker.call(lambda: 1)
        return "back"

    assert breaker.call(probe) == "back"
    assert not breaker.is_open


def test_a_failed_probe_opens_the_breaker_again():
    clock = Clock()
    breaker = CircuitBreaker(failures=2, reset_s=10, clock=clock)
    fail(breaker)
    fail(breaker)
    clock.now = 10.0
    fail(breaker)
    with pytest.raises(CircuitOpen):
        breaker.call(lambda: 1)


def test_errors_that_are_not_the_stores_do_not_open_the_breaker():
    breaker = CircuitBreaker(failures=1, reset_s=10)
    with pytest.raises(ZeroDivisionError):
        breaker.call(lambda: 1 // 0)
    assert not breaker.is_open


@pytest.mark.parametrize("options", [{"failures": 0, "reset_s": 1}, {"failures": 1, "reset_s": 0}])
def test_a_breaker_that_could_not_work_is_refused(options):
    with pytest.raises(ValueError):
        CircuitBreaker(**options)


def test_a_dead_store_is_asked_only_until_the_breaker_opens():
    clock, flaky = Clock(), Flaky()
    cache = ResponseCache(GuardedBackend(flaky, CircuitBreaker(3, 10, clock)))
    request = Request("m", "p", parameters={"temperature": 0})
    for _ in range(50):
        assert cache.answer(request, lambda _: Answer("right")).answer.text == "right"
    assert flaky.asked == 3
    flaky.down = False
    clock.now = 10.0
    cache.answer(request, lambda _: Answer("right"))
    assert flaky.asked == 5  # the probe that found it back, and the store of the answer


def fallback(port):
    """One request through an impatient client; the answer must come from the source."""
    client = redis.Redis(host="127.0.0.1", port=port, protocol=2, **impatient(0.05))
    cache = ResponseCache(RedisBackend(client, "n:"))
    request = Request("m", "p", parameters={"temperature": 0})
    reply = cache.answer(request, lambda _: Answer("right"))
    client.close()
    assert (reply.answer.text, reply.hit) == ("right", False)
    return cache.stats.backend_errors


def test_a_refused_connection_falls_back_to_the_source():
    with refused_port() as port:
        assert fallback(port) == 1


def test_a_black_hole_falls_back_to_the_source():
    with black_hole() as port:
        assert fallback(port) == 1


def test_a_server_that_talks_rubbish_falls_back_to_the_source():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk():
            end, _ = listener.accept()
            with end:
                end.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                end.recv(1000)

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        assert fallback(listener.getsockname()[1]) == 1
        thread.join(5)


def test_a_refused_port_refuses_and_a_black_hole_says_nothing():
    with refused_port() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    with black_hole() as port, socket.create_connection(("127.0.0.1", port), timeout=0.05) as end:
        end.sendall(b"PING\r\n")
        with pytest.raises(TimeoutError):
            end.recv(1)


def test_the_slow_proxy_passes_everything_on(tmp_path):
    with running(None, tmp_path, tcp=True) as server:
        host, _, port = server.address.partition(":")
        with slow_proxy(lambda: socket.create_connection((host, int(port))), 0.001) as near:
            client = redis.Redis(host="127.0.0.1", port=near, protocol=2)
            client.set("k", b"v" * 200_000)
            assert client.get("k") == b"v" * 200_000
            client.close()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", near), timeout=1)


def test_the_most_popular_come_first_and_ties_in_order_of_appearance():
    assert most_popular("cabbac", 2) == ["c", "a"]
    assert most_popular("abbb", 5) == ["b", "a"]
    assert most_popular("", 3) == []


def test_preloading_generates_only_what_is_missing():
    cache = ResponseCache(MemoryBackend(10))
    requests = [Request("m", str(n), parameters={"temperature": 0}) for n in range(3)]
    calls = []

    def source(request):
        calls.append(request.prompt)
        return Answer("x")

    cache.answer(requests[1], source)
    assert preload(cache, requests, source) == 2
    assert calls == ["1", "0", "2"]
    assert all(cache.answer(request, source).hit for request in requests)


def run(tmp_path, cells, **changed):
    return study_runs.table("resilience", tmp_path, only=lambda name, _: name in cells, **changed)


def test_study_bounded_clients_always_succeed_and_never_lie(tmp_path):
    # A server that never answers in time costs every request its limit; one that does answer is given
    # all the time that it needs here.
    silent = ["black_hole", "slow"]
    prompt = [fault for fault in FAULTS if fault not in silent]
    tables = [
        run(
            tmp_path / str(timeout_ms),
            {"fallback"},
            clients=["short_timeout", "breaker"],
            requests=10,
            keys=3,
            service_ms=0.2,
            timeout_ms=timeout_ms,
            slow_ms=90,
            faults=faults,
        )
        for faults, timeout_ms in ((silent, 30), (prompt, 10_000))
    ]
    table = pd.concat(tables)
    assert len(table) == 2 * len(FAULTS)
    assert (table["success_rate"] == 1).all()
    assert (table["wrong_answers"] == 0).all()
    assert not table["blocked"].any()
    rows = table.set_index(["client", "fault"])
    assert (rows["hits"].xs("black_hole", level="fault") == 0).all()
    for client in ("short_timeout", "breaker"):
        assert rows.loc[(client, "up"), "hits"] == 7
        assert rows.loc[(client, "corrupt"), "corrupt_entries_refused"] == 7
        assert rows.loc[(client, "wrong_type"), "corrupt_entries_refused"] == 7
        assert rows.loc[(client, "out_of_memory"), "backend_errors"] == 10
        assert rows.loc[(client, "refused"), "hits"] == 0


def test_study_the_default_client_blocks_on_faults_that_are_waited_for_together(
    tmp_path, monkeypatch
):
    both, waits = threading.Barrier(2), measuring._waits

    def beside_the_other(*arguments):
        both.wait(60)
        return waits(*arguments)

    monkeypatch.setattr(measuring, "_waits", beside_the_other)
    table = run(
        tmp_path,
        {"fallback"},
        clients=["default"],
        faults=["black_hole", "refused"],
        give_up_s=0.5,
    )
    assert table["blocked"].tolist() == [True, True]


def test_a_wait_that_ends_because_it_is_given_up_was_given_up(monkeypatch):
    closed, over = threading.Event(), threading.Event()

    class Hanging(measuring._Asker):
        def __init__(self, *_):
            self._cache = ResponseCache(MemoryBackend(10))
            self.wrong = self.failed = 0

        def ask(self, _key):
            assert closed.wait(60)
            over.set()
            return {"added_s": 0.1, "met": "miss"}

        def close(self):
            closed.set()
            assert over.wait(60)

    monkeypatch.setattr(measuring, "_Asker", Hanging)
    monkeypatch.setattr(measuring, "_broken", lambda *_: nullcontext())
    found = measuring._waits("black_hole", "default", {"give_up_s": 0.01}, None)
    assert found["blocked"] and found["row"]["answered"] == 0


def test_study_tells_nothing_about_requests_that_it_did_not_wait_for(tmp_path):
    table = run(
        tmp_path, {"fallback"}, clients=["default"], faults=["up", "black_hole"], give_up_s=0.5
    )
    assert table.set_index("fault")["success_rate"].isna().to_dict() == {
        "up": False,
        "black_hole": True,
    }
    values = STUDY.values(table)
    assert values["resilience_default_success_min"].value == 100
    assert values["resilience_default_blocked_faults"].value == 1


@pytest.fixture(scope="module")
def in_rounds(tmp_path_factory):
    """The record of all clients before a server that works and one that refuses."""
    return study_runs.records(
        "resilience",
        tmp_path_factory.mktemp("fallback"),
        only=lambda name, _: name == "fallback",
        faults=["up", "refused"],
        requests=12,
        keys=3,
        service_ms=0.2,
        give_up_s=0.5,
    )["fallback"]


def test_study_every_client_asks_once_in_each_round_and_who_waits_in_none(in_rounds):
    arms = in_rounds["samples"]["arms"]
    clients = {*CLIENTS, "control-short_timeout"}
    assert set(arms) == {f"{client}-up" for client in clients} | {
        f"{client}-refused" for client in clients - {"default"}
    }
    assert all(arm["round"] == list(range(12)) for arm in arms.values())
    # Within a round of four turns nobody is further than three from another.
    slots = [arms[f"{client}-up"]["slot"] for client in clients]
    assert all(max(turn) - min(turn) == 3 for turn in zip(*slots, strict=True))
    assert set(in_rounds["samples"]["waits"]) == {"default-refused"}


def test_study_the_control_has_a_cache_of_its_own_and_no_row(in_rounds):
    control = in_rounds["samples"]["arms"]["control-short_timeout-up"]
    assert control["met"].count("miss") == 3
    assert {row["client"] for row in in_rounds["rows"]} == set(CLIENTS)
    rows = {(row["client"], row["fault"]): row for row in STUDY.aggregate(in_rounds)}
    assert rows["breaker", "up"]["added_gap_s_control_ratio"] > 0
    assert "added_gap_s_control_ratio" not in rows["short_timeout", "up"]


def test_study_tells_what_became_of_every_request(in_rounds):
    arms = in_rounds["samples"]["arms"]
    assert [arms["breaker-up"]["met"].count(met) for met in ("miss", "hit")] == [3, 9]
    assert arms["breaker-refused"]["met"] == ["error"] * 3 + ["open"] * 9
    assert arms["short_timeout-refused"]["met"] == ["error"] * 12


def drifting(pace, met):
    """Turns of a client on a machine that is slowed down threefold between first and last."""
    weather = np.linspace(1, 3, len(met))
    return {"round": list(range(len(met))), "added_s": list(pace * weather), "met": list(met)}


def compared(**arms):
    rows = [
        {"kind": "fallback", "fault": "up", "client": client, "blocked": False} for client in arms
    ]
    samples = {"arms": {f"{client}-up": arm for client, arm in arms.items()}}
    return {row["client"]: row for row in STUDY.aggregate({"rows": rows, "samples": samples})}


def test_a_client_is_compared_within_rounds():
    rng, met = np.random.default_rng(1), ["miss"] * 4 + ["hit"] * 12
    other = drifting(1, met)
    own = other | {"added_s": list(np.add(other["added_s"], 0.2 + rng.normal(0, 0.02, 16)))}
    rows = compared(short_timeout=other, breaker=own)
    assert rows["breaker"]["added_gap_s"] == pytest.approx(0.2, abs=0.02)
    assert 0 < rows["breaker"]["added_gap_s_ci_low"] < rows["breaker"]["added_gap_s_ci_high"] < 0.3
    assert "added_gap_s" not in rows["short_timeout"]
    # One after the other, on a machine that slows down so, the gap would have been another.
    assert np.mean(own["added_s"][8:]) - np.mean(other["added_s"][:8]) > 1


def test_one_slow_request_is_no_verdict_on_a_client():
    """A ratio of the sums would have been about 3, its interval above 1."""
    rng = np.random.default_rng(2)
    times = 6e-5 * np.exp(rng.normal(0, 0.1, (2, 20)))
    times[0, 3] += 3e-3
    met = ["miss"] * 5 + ["hit"] * 15
    own, other = ({"round": list(range(20)), "added_s": list(one), "met": met} for one in times)
    row = compared(short_timeout=other, breaker=own)["breaker"]
    assert row["added_gap_s_ci_low"] < 0 < row["added_gap_s_ci_high"]


def test_a_breaker_is_compared_by_what_all_its_requests_took():
    """Three wait for the timeout of 50 ms and the others for nothing: 13 in 16 are spared it."""
    rng = np.random.default_rng(1)
    times = 0.05 * np.exp(rng.normal(0, 0.05, (2, 16)))
    met = ["error"] * 3 + ["open"] * 13
    own = {"round": list(range(16)), "added_s": [*times[0][:3], *[1e-5] * 13], "met": met}
    other = {"round": list(range(16)), "added_s": list(times[1]), "met": ["error"] * 16}
    row = compared(short_timeout=other, breaker=own)["breaker"]
    assert row["added_gap_s"] == pytest.approx(-0.05 * 13 / 16, rel=0.1)
    assert row["added_gap_s_ci_high"] < 0


def test_clients_of_a_record_without_rounds_are_not_compared():
    rows = [{"kind": "fallback", "fault": "up", "client": "breaker", "blocked": False}]
    samples = {"up": {"added_s": [0.1], "blocked": False}}
    assert "added_gap_s" not in STUDY.aggregate({"rows": rows, "samples": samples})[0]


def test_study_changes_no_settings_of_a_server_that_is_not_its_own(tmp_path):
    options = {name: entry["default"] for name, entry in STUDY.options["properties"].items()}
    cell = STUDY.plan(options)["fallback"]
    with running(None, tmp_path, tcp=True) as real:
        context = Context(tmp_path, seed=1, server_url=f"redis://{real.address}")
        with pytest.raises(Unsupported, match="out_of_memory"):
            STUDY.measure(cell.factors, context)
        assert real.client().config_get("maxmemory")["maxmemory"] == "0"


def test_study_warming_up_never_saves_a_generation_and_stays_below_its_limit(tmp_path):
    table = run(tmp_path, {"warm-up"}, warm_requests=800, warm_keys=200, seeds=3)
    assert (table["generations"] >= table["unique_requests"]).all()
    for today in ("same", "shifted"):
        rows = table[table["popularity"] == today].sort_values("preload_share")
        cold = rows.iloc[0]
        assert cold["preload_share"] == 0 and cold["generations"] == cold["unique_requests"]
        gained = (rows["hit_ratio_window"] - cold["hit_ratio_window"]) * rows["window"]
        # Each preloaded answer saves at most the one first miss of its request.
        assert (gained <= rows["preloaded"] + 1e-6).all()
        assert (gained.diff().dropna() >= -1e-6).all()
    same = table[table["popularity"] == "same"].set_index("preload_share")
    shifted = table[table["popularity"] == "shifted"].set_index("preload_share")
    assert same.loc[0.2, "hit_ratio_window"] > shifted.loc[0.2, "hit_ratio_window"]


def test_study_skipped_errors_never_come_out_of_the_cache(tmp_path):
    table = run(tmp_path, {"errors"}, error_requests=800)
    rows = table.set_index(["policy", "error_rate"])
    skip = rows.loc["skip_errors"]
    assert (skip["errors_from_cache"] == 0).all()
    assert (skip["errors_served"] == skip["source_errors"]).all()
    assert (table[table["error_rate"] == 0]["errors_served"] == 0).all()
    assert rows.loc[("cache_all", 0.2), "errors_from_cache"] > 0
    assert (
        0
        < rows.loc[("negative_ttl", 0.2), "errors_from_cache"]
        < rows.loc[("cache_all", 0.2), "errors_from_cache"]
    )


def test_study_options_refuse_what_means_nothing():
    options = {name: entry["default"] for name, entry in STUDY.options["properties"].items()}
    for changed in (
        {"faults": ["mood"]},
        {"error_rates": [1.5]},
        {"preload_shares": [-0.1]},
        {"breaker_reset_s": 0},
        {"warm_keys": 0},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(options | changed, STUDY.options)


def test_study_values_are_empty_without_rows():
    named = STUDY.values(pd.DataFrame(columns=list(STUDY.columns)))
    assert named and all(value.value is None for value in named.values())
