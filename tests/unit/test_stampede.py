"""Many threads, one expensive value: who loads it, and how often."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import jsonschema
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import study_runs
from kvbench.caching.server import running
from kvbench.caching.stampede import EXCLUSIVE, PROTECTIONS, SingleFlight, protect, xfetch
from kvbench.figures import _language, app_stampede
from kvbench.studies.measuring import stampede as measuring
from kvbench.studies.measuring.stampede import Source, minimum_loads
from kvbench.studies.stampede import STUDY

THREADS = 20


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with running(None, tmp_path_factory.mktemp("server")) as server:
        yield server.client()


def together(action, count=THREADS):
    """Run ``action`` in threads that begin together; return results and exceptions."""
    barrier = threading.Barrier(count)
    results = []

    def run():
        barrier.wait()
        try:
            results.append(action())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return results


class Crowd:
    """A load that goes on only when a whole crowd is inside it, or nobody else came for long."""

    def __init__(self, expected, patience_s):
        self.barrier = threading.Barrier(expected)
        self.patience_s = patience_s
        self.calls = 0
        self.lock = threading.Lock()

    def __call__(self):
        with self.lock:
            self.calls += 1
        with suppress(threading.BrokenBarrierError):
            self.barrier.wait(self.patience_s)
        return {"value": 1}


@pytest.mark.parametrize("name", ["none", "lru_cache", "cachetools_lock", "xfetch"])
def test_without_exclusion_every_cold_thread_loads(name):
    """The load ends only if all threads are inside it at once: a stampede, proven."""
    load = Crowd(THREADS, patience_s=20)
    results = together(protect(name, load, ttl_s=100_000.0))
    assert load.calls == THREADS and not load.barrier.broken
    assert results == [{"value": 1}] * THREADS


@pytest.mark.parametrize("name", sorted(EXCLUSIVE))
def test_with_exclusion_one_cold_thread_loads_for_all(name, client):
    load = Crowd(2, patience_s=0.1)
    results = together(protect(name, load, ttl_s=60.0, client=client, namespace=f"cold:{name}:"))
    assert load.calls == 1
    assert results == [{"value": 1}] * THREADS


@pytest.mark.parametrize("name", sorted(PROTECTIONS))
def test_a_stored_value_is_served_without_a_load(name, client):
    calls = []

    def load():
        calls.append(1)
        return {"n": len(calls)}

    get = protect(name, load, ttl_s=100_000.0, client=client, namespace=f"stored:{name}:")
    assert [get() for _ in range(5)] == [{"n": 1}] * 5


@pytest.mark.parametrize("name", sorted(PROTECTIONS))
def test_an_expired_value_is_loaded_again(name, client):
    calls = []

    def load():
        calls.append(1)
        return len(calls)

    get = protect(name, load, ttl_s=0.02, client=client, namespace=f"expired:{name}:")
    assert get() >= 1
    deadline = time.monotonic() + 5
    while get() < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert get() >= 3


@pytest.mark.parametrize("name", sorted(PROTECTIONS))
def test_a_failed_load_is_not_stored_and_blocks_nobody(name, client):
    calls = []

    def load():
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        return "fine"

    get = protect(name, load, ttl_s=100_000.0, client=client, namespace=f"failed:{name}:")
    with pytest.raises(ZeroDivisionError):
        get()
    assert get() == "fine"


def test_stale_while_revalidate_makes_only_the_first_wait():
    refreshing, release = threading.Event(), threading.Event()
    calls = []

    def load():
        calls.append(1)
        if len(calls) > 1:
            refreshing.set()
            release.wait()
        return len(calls)

    get = protect("stale_while_revalidate", load, ttl_s=0.01)
    assert get() == 1
    time.sleep(0.02)
    # The refresh hangs, and still nobody waits for it.
    assert together(get) == [1] * THREADS
    assert refreshing.wait(20)
    assert len(calls) == 2
    release.set()


def test_xfetch_refreshes_early_the_more_the_larger_beta():
    def loads(beta):
        calls = []

        def load():
            calls.append(1)
            time.sleep(0.001)

        get = xfetch(load, ttl_s=1000.0, beta=beta, seed=1)
        for _ in range(300):
            get()
        return len(calls)

    # A head start of about 1 ms times beta leaves a life of 1000 s whole unless beta is huge.
    assert loads(1.0) == 1
    assert loads(1e9) > 250


def test_a_lock_on_the_server_is_released_only_by_its_holder(client):
    """A load longer than its lock must not free the lock that somebody else took meanwhile."""

    def load():
        client.set("holder:lock", "somebody else")
        return 1

    protect("set_nx", load, ttl_s=60.0, client=client, namespace="holder:")()
    assert client.get("holder:lock") == b"somebody else"


def test_the_lock_of_a_dead_loader_expires(client):
    client.set("dead:lock", "died", px=30)
    get = protect("set_nx", lambda: 1, ttl_s=60.0, client=client, namespace="dead:")
    assert get() == 1


def test_set_nx_without_a_server_is_refused():
    with pytest.raises(ValueError, match="client"):
        protect("set_nx", lambda: 1, ttl_s=1.0)


def test_an_unknown_protection_is_refused():
    with pytest.raises(ValueError, match="known: none"):
        protect("hope", lambda: 1, ttl_s=1.0)


def test_single_flight_shares_an_exception_and_forgets_it():
    flights = SingleFlight()
    entered, release = threading.Event(), threading.Event()

    def fails():
        entered.set()
        release.wait(10)
        raise TimeoutError

    results = []

    def ask(action):
        try:
            results.append(flights.do("k", action))
        except TimeoutError as error:
            results.append(error)

    leader = threading.Thread(target=ask, args=(fails,))
    leader.start()
    assert entered.wait(10)
    follower = threading.Thread(target=ask, args=(lambda: "never run",))
    follower.start()
    # The leader may fail only once the follower hangs on its future.
    waiters = flights._running["k"]._condition._waiters
    while not waiters:
        time.sleep(0.002)
    release.set()
    leader.join(10)
    follower.join(10)
    assert len(results) == 2 and results[0] is results[1]
    assert flights.do("k", lambda: "again") == "again"


def test_single_flight_keeps_keys_apart():
    flights = SingleFlight()
    assert flights.do("a", lambda: flights.do("b", lambda: "inner")) == "inner"


def test_the_minimum_counts_lives_and_loads():
    assert minimum_loads(2000, 300, 50) == 6
    assert minimum_loads(100, 300, 50) == 1


def test_a_load_after_the_time_is_over_is_none_of_that_time():
    source = Source(0.0)
    source.loads = [(1.9, 2.0), (1.0, 1.1), (2.0, 2.1), (2.5, 2.6)]
    assert source.loads_within(1.0) == 2


def test_study_exclusive_protections_load_at_most_the_minimum(tmp_path):
    """The life of a value begins when its load has ended, so that no period can be shorter."""
    table = study_runs.table(
        "stampede",
        tmp_path / "run",
        threads=[10],
        service_ms=20,
        ttl_ms=60,
        duration_ms=100,
        rounds=2,
    )
    assert set(table["rounds"]) == {2}
    exclusive = table[table["exclusive"].astype(bool)]
    assert set(exclusive["protection"]) == EXCLUSIVE
    assert (exclusive["loads"] <= exclusive["loads_minimum"]).all()
    assert (exclusive["loads_at_once"] == 1).all()
    assert (table["loads_at_once"] <= table["threads"]).all()
    # Every turn begins with nothing stored.
    assert (table["loads_cold"] >= 2).all()


def test_study_the_server_is_compared_with_no_protection_in_its_own_cell(tmp_path):
    found = study_runs.records(
        "stampede",
        tmp_path,
        protections=["set_nx"],
        threads=[2],
        service_ms=1,
        ttl_ms=10,
        duration_ms=10,
        rounds=3,
    )["server"]
    assert [row["protection"] for row in found["rows"]] == ["set_nx"]
    arms = found["samples"]["arms"]
    assert arms["set_nx-2"]["round"] == arms["none-2"]["round"] == [0, 1, 2]
    # Beside it a control, which has no row either.
    assert set(arms) == {"set_nx-2", "none-2", "control-none-2"}
    assert sorted(slot for arm in arms.values() for slot in arm["slot"]) == list(range(9))
    assert STUDY.aggregate(found)[0]["wait_ratio_rounds"] == 3


def arm(seconds, rounds):
    return {"round": list(rounds), "wait_mean_s": list(seconds), "wait_p99_s": list(seconds)}


def record(**arms):
    rows = [
        {"protection": name.removesuffix("_50"), "beta": None, "threads": 50, "wait_p99_s": 1.0}
        for name in arms
    ]
    samples = {"arms": {name.replace("_50", "-50"): held for name, held in arms.items()}}
    return {"rows": rows, "samples": samples}


def test_a_machine_that_slows_down_leaves_the_ratio_of_waiting_times_as_it_is():
    weather = np.exp(np.random.default_rng(1).normal(0, 0.15, 12)) * np.linspace(1, 2, 12)
    rows = STUDY.aggregate(
        record(none_50=arm(weather, range(12)), single_flight_50=arm(0.9 * weather, range(12)))
    )
    own = next(row for row in rows if row["protection"] == "single_flight")
    assert own["wait_ratio"] == pytest.approx(0.9)
    assert own["wait_p99_ratio_ci_high"] < 1
    # One after the other, the slower half of that time would have turned it round.
    assert 0.9 * weather[6:].mean() > weather[:6].mean()


def test_a_protection_that_differs_by_chance_is_not_called_quicker():
    rng = np.random.default_rng(2)
    base, other = np.exp(rng.normal(0, 0.1, (2, 12)))
    rows = STUDY.aggregate(
        record(none_50=arm(base, range(12)), single_flight_50=arm(other, range(12)))
    )
    own = next(row for row in rows if row["protection"] == "single_flight")
    assert own["wait_ratio_ci_low"] < 1 < own["wait_ratio_ci_high"]


def test_where_no_protection_differs_from_itself_nothing_is_said_of_the_others():
    base = np.exp(np.random.default_rng(3).normal(0, 0.02, 12))
    found = record(none_50=arm(base, range(12)), single_flight_50=arm(0.8 * base[::-1], range(12)))
    found["samples"]["arms"]["control-none-50"] = arm(1.5 * base[::-1], range(12))
    own = next(row for row in STUDY.aggregate(found) if row["protection"] == "single_flight")
    assert own["wait_ratio"] == pytest.approx(0.8, rel=0.05)
    assert "wait_ratio_ci_low" not in own
    assert own["wait_ratio_not_judged"]


@pytest.mark.parametrize(("pace", "said"), [(1.0, True), (0.5, False)])
def test_the_figure_says_which_protection_is_not_told_apart_from_none(pace, said):
    base, other = np.exp(np.random.default_rng(4).normal(0, 0.02, (2, 12)))
    found = record(none_50=arm(base, range(12)), single_flight_50=arm(pace * other, range(12)))
    rows = pd.DataFrame(STUDY.aggregate(found)).reindex(columns=["machine", *STUDY.columns])
    rows = rows.assign(machine="here", loads=3, loads_minimum=2, wait_p99_s=0.1)
    rows = rows.assign(wait_p99_s_ci_low=0.09, wait_p99_s_ci_high=0.11, requests=50)
    figure = app_stampede.draw(rows)
    assert list(_language.localise(figure, "pt")) == []
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("não se distingue de nenhuma, por rodada" in legend) is said
    plt.close(figure)


def test_a_record_without_rounds_has_one_turn_and_no_ratio():
    old = record(none_50={}, single_flight_50={})
    old["samples"] = {"none-50": {"latency_s": [0.1], "loads": []}}
    row = STUDY.aggregate(old)[1]
    assert row["rounds"] == 1
    assert "wait_ratio" not in row


def test_a_load_in_the_background_ends_before_the_next_turn(monkeypatch):
    entered, release, seen = threading.Event(), threading.Event(), []

    def held_up(_seconds):
        entered.set()
        release.wait(10)

    monkeypatch.setattr(measuring.time, "sleep", held_up)
    source = Source(0.01)

    def settle():
        source.settle()
        seen.append(len(source.loads))

    background, waiting = threading.Thread(target=source.load), threading.Thread(target=settle)
    background.start()
    assert entered.wait(10)
    waiting.start()
    release.set()
    waiting.join(10)
    background.join(10)
    assert seen == [1]


def test_study_only_set_nx_needs_a_server():
    options = {name: entry["default"] for name, entry in STUDY.options["properties"].items()}
    cells = STUDY.plan(options)
    with_server = {name for name, cell in cells.items() if "set_nx" in cell.factors["protections"]}
    assert with_server == {"server"}


def test_study_options_refuse_what_means_nothing():
    options = {name: entry["default"] for name, entry in STUDY.options["properties"].items()}
    for changed in ({"threads": [0]}, {"protections": ["hope"]}, {"betas": [0]}, {"ttl_ms": 0}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(options | changed, STUDY.options)


def test_study_values_are_empty_without_rows():
    named = STUDY.values(pd.DataFrame(columns=list(STUDY.columns)))
    assert named and all(value.value is None for value in named.values())
