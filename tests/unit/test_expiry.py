"""Lifetimes on a virtual clock against renewal theory, and invalidation on a real server."""

from __future__ import annotations

import math

import pytest
import study_runs
from hypothesis import given
from hypothesis import strategies as st
from kvbench.caching import expiry, invalidation
from kvbench.caching.server import running
from kvbench.errors import InputError, Unsupported
from kvbench.studies import expiry as study


def cache(lifetime):
    clock = expiry.VirtualClock()
    return expiry.TTLCache(lifetime, clock), clock


def test_fixed_entry_is_served_until_its_time_is_up_and_not_after():
    entries, clock = cache(expiry.Fixed(10))
    entries.set("a", 1)
    clock.advance(9.99)
    assert entries.get("a") == 1
    clock.advance(0.01)
    assert entries.get("a") is None


def test_sliding_entry_lives_as_long_as_it_is_used():
    entries, clock = cache(expiry.Sliding(10))
    entries.set("a", 1)
    for _ in range(5):
        clock.advance(9)
        assert entries.get("a") == 1
    clock.advance(10)
    assert entries.get("a") is None


def test_fixed_entry_does_not_live_longer_for_being_used():
    entries, clock = cache(expiry.Fixed(10))
    entries.set("a", 1)
    for _ in range(2):
        clock.advance(5)
        entries.get("a")
    assert entries.get("a") is None


def test_storing_again_starts_the_time_anew():
    entries, clock = cache(expiry.Fixed(10))
    entries.set("a", 1)
    clock.advance(9)
    entries.set("a", 2)
    clock.advance(9)
    assert entries.expire() == 0
    assert entries.get("a") == 2


@pytest.mark.parametrize("value", [None, 0, "", False])
def test_false_values_are_told_from_absent_ones(value):
    entries, _ = cache(expiry.Fixed(10))
    entries.set("a", value)
    absent = object()
    assert entries.get("a", absent) is value
    assert entries.get("b", absent) is absent


def test_each_class_has_its_own_time():
    entries, clock = cache(expiry.ByClass(lambda key: key[0], {"s": 100, "v": 1}))
    entries.set("s1", 1)
    entries.set("v1", 1)
    clock.advance(2)
    assert (entries.get("s1"), entries.get("v1")) == (1, None)


@pytest.mark.parametrize("kind", [expiry.Fixed, expiry.Sliding])
@given(st.lists(st.tuples(st.sampled_from("gsx"), st.integers(0, 4), st.floats(0, 4)), max_size=60))
def test_cache_agrees_with_a_list_of_times(kind, steps):
    entries, clock = cache(kind(5))
    until: dict[int, float] = {}
    for step, key, gap in steps:
        clock.advance(gap)
        alive = until.get(key, -math.inf) > clock.now
        if step == "s":
            entries.set(key, key)
            until[key] = clock.now + 5
        elif step == "g":
            assert (entries.get(key) is not None) == alive
            if alive and kind is expiry.Sliding:
                until[key] = clock.now + 5
        else:
            assert len(entries) == sum(end > clock.now for end in until.values())


@pytest.mark.parametrize("ttl_s", [10.0, 60.0, 3600.0])
@pytest.mark.parametrize("change_rate", [0.0, 1 / 86_400, 1 / 30])
@pytest.mark.parametrize("policy", ["fixed", "jittered", "sliding"])
def test_simulation_meets_renewal_theory_within_three_standard_errors(policy, change_rate, ttl_s):
    lifetime, theory = {
        "fixed": (expiry.Fixed(ttl_s), expiry.predict_fixed(0.1, change_rate, ttl_s)),
        "jittered": (
            expiry.Jittered(ttl_s, 0.2, 1),
            expiry.predict_jittered(0.1, change_rate, ttl_s, 0.2),
        ),
        "sliding": (expiry.Sliding(ttl_s), expiry.predict_sliding(0.1, change_rate, ttl_s)),
    }[policy]
    entries, clock = cache(lifetime)
    seen = expiry.observe(entries, clock, "key", 0.1, change_rate, 20_000, seed=2)
    if seen.hit_error is None:
        # So long a sliding lifetime is never interrupted: there is no second cycle to judge by.
        assert policy == "sliding"
        assert seen.hit_ratio == pytest.approx(theory.hit_ratio, abs=1e-3)
        return
    assert abs(seen.hit_ratio - theory.hit_ratio) < 3 * seen.hit_error
    if change_rate == 0:
        assert seen.stale_share == theory.stale_share == 0
    elif seen.stale_error is not None:
        assert abs(seen.stale_share - theory.stale_share) < 3 * seen.stale_error


@pytest.mark.parametrize(
    ("rate", "ttl_s", "change_rate", "hit_ratio", "stale_share"),
    [(0.1, 10, 0.01, 0.5, 0.0484), (0.1, 60, 0.01, 0.8571, 0.2480), (1, 60, 0.05, 0.9836, 0.6833)],
)
def test_fixed_formula_gives_the_known_numbers(rate, ttl_s, change_rate, hit_ratio, stale_share):
    theory = expiry.predict_fixed(rate, change_rate, ttl_s)
    assert theory.hit_ratio == pytest.approx(hit_ratio, abs=5e-5)
    assert theory.stale_share == pytest.approx(stale_share, abs=5e-5)


def test_jittered_formula_tends_to_the_fixed_one_as_the_spread_vanishes():
    jittered, fixed = expiry.predict_jittered(1, 0.05, 60, 1e-6), expiry.predict_fixed(1, 0.05, 60)
    assert jittered.stale_share == pytest.approx(fixed.stale_share, rel=1e-6)


def test_jitter_spreads_expiries_that_would_fall_into_one_second():
    assert expiry.most_expiries_per_second(expiry.Fixed(60), 5_000, 73) == 5_000
    # Even over 24 s: 208 a second, standard deviation 14; the worst of 24 stays below 5 of them.
    jittered = expiry.most_expiries_per_second(expiry.Jittered(60, 0.2, 3), 5_000, 73)
    assert 208 <= jittered < 208 + 5 * 14.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: expiry.Fixed(0), "time to live of 0 s"),
        (lambda: expiry.Sliding(-1), "time to live of -1 s"),
        (lambda: expiry.Fixed(float("nan")), "time to live of nan s"),
        (lambda: expiry.Jittered(60, 1), "spread of 1"),
        (lambda: expiry.ByClass(str, {"a": 0}), "time to live of 0 s"),
        (lambda: expiry.VirtualClock().advance(-1), "does not run backwards"),
    ],
)
def test_impossible_times_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- invalidation on a real server ---


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    try:
        with running(None, tmp_path_factory.mktemp("server")) as found:
            yield found
    except Unsupported as error:
        pytest.skip(str(error))


@pytest.fixture
def method(server, request):
    if not server.private:
        pytest.skip("needs a private server")
    client = server.client()
    client.flushall()
    return invalidation.build(request.param, client, "test*[a]:", parts=3, ttl_s=600)


def fill(method, version, entities=("1", "11", "2")):
    method.put_many([(e, part, b"v%d" % version) for e in entities for part in range(3)])


everything = pytest.mark.parametrize("method", invalidation.METHODS, indirect=True)
promising = pytest.mark.parametrize(
    "method", ["event", "tag", "pattern", "version", "flush"], indirect=True
)
precise = pytest.mark.parametrize(
    "method", ["ttl", "event", "tag", "pattern", "version"], indirect=True
)


@everything
def test_what_was_put_is_there(method):
    fill(method, 1)
    assert [method.get("11", part) for part in range(3)] == [b"v1"] * 3
    assert method.get("3", 0) is None


@promising
def test_nothing_old_is_read_after_the_acknowledgement(method):
    assert method.promises_fresh
    for version in range(1, 4):
        fill(method, version)
        method.invalidate("1")
        assert [method.get("1", part) for part in range(3)] == [None] * 3


@precise
def test_other_entities_keep_their_entries(method):
    # Entity 11 starts like entity 1: a sloppy pattern would take it too.
    fill(method, 1)
    method.invalidate("1")
    assert [method.get(entity, 2) for entity in ("11", "2")] == [b"v1"] * 2


@pytest.mark.parametrize("method", ["ttl"], indirect=True)
def test_time_to_live_alone_keeps_serving_the_old_value(method):
    fill(method, 1)
    method.invalidate("1")
    assert not method.promises_fresh
    assert method.get("1", 0) == b"v1"


@pytest.mark.parametrize("method", ["version"], indirect=True)
def test_version_in_key_leaves_the_old_entries_as_garbage_that_expires(method):
    fill(method, 1)
    method.invalidate("1")
    assert len(method.garbage()) == 3
    assert all(0 < method.client.ttl(key) <= 600 for key in method.garbage())


@pytest.mark.parametrize("method", ["event", "tag", "pattern"], indirect=True)
def test_deleting_methods_leave_nothing_of_the_entity(method):
    fill(method, 1, entities=("1",))
    method.invalidate("1")
    assert method.client.dbsize() == 0


@everything
def test_every_key_expires_in_the_end_unless_it_is_a_version_counter(method):
    fill(method, 1)
    method.invalidate("2")
    keys = [key for key in method.client.scan_iter() if b"version:" not in key]
    assert all(method.client.ttl(key) > 0 for key in keys)


def test_unknown_method_is_refused_and_the_known_ones_are_named():
    with pytest.raises(InputError, match=r"unknown invalidation 'hope'.*tag"):
        invalidation.build("hope", None, "", 1, 1)


# --- the study ---


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expiry")
    try:
        return study_runs.table(
            "expiry",
            folder,
            seed=4,
            requests=5_000,
            burst_entries=1_000,
            invalidation_keys=[200],
            updates=5,
        )
    except Unsupported as error:
        pytest.skip(str(error))


def test_study_finds_no_broken_promise_and_stale_reads_without_one(table):
    values = study.values(table)
    assert values["expiry_broken_promises"].value == 0
    assert values["expiry_ttl_stale_reads"].value == values["expiry_ttl_reads"].value == 50


def test_study_sees_that_only_a_flush_takes_what_had_not_changed(table):
    shares = table[table["kind"] == "invalidation"].set_index("policy")["collateral_share"]
    assert shares["flush"] == 1
    assert (shares.drop("flush") == 0).all()


def test_study_measures_the_garbage_of_version_in_key(table):
    rows = table[table["kind"] == "invalidation"].set_index("policy")
    assert rows.loc["version", "garbage_keys"] == 50
    assert rows.loc["version", "garbage_bytes"] > 50 * 500
    assert rows.drop("version")["garbage_keys"].sum() == 0


def test_methods_take_turns_and_are_compared_within_rounds(table):
    rows = table[table["kind"] == "invalidation"].set_index("policy")
    assert (rows["updates"] == 5).all()
    assert (rows.drop("event")["over_event_rounds"] == 5).all()
    assert rows.loc["pattern", "over_event"] > 0
    assert "over_event_ci_low" not in rows or rows["over_event_ci_low"].isna().all()


def test_another_clients_reads_are_counted_beside_the_method_at_work(table):
    rows = table[table["kind"] == "invalidation"]
    assert (rows["bystander_p50_s"].dropna() > 0).all()
    assert rows["bystander_p50_s"].notna().any()


def test_a_method_is_compared_over_ten_rounds_with_an_interval():
    def arm(seconds):
        return {"round": list(range(12)), "slot": list(range(12)), "seconds": seconds}

    drift = [1.0 + 0.1 * (number % 4) for number in range(12)]
    record = {
        "rows": [{"kind": "invalidation", "policy": name} for name in ("event", "pattern", "ttl")],
        "samples": {"event": arm(drift), "pattern": arm([8 * one for one in drift])},
    }
    event, pattern, ttl = study.aggregate(record)
    assert pattern["over_event"] == pytest.approx(8.0)
    assert pattern["over_event_ci_low"] == pytest.approx(8.0)
    assert "over_event" not in event and "over_event" not in ttl


def test_study_compares_every_row_with_theory(table):
    rows = table[table["kind"] == "ttl"]
    assert rows["predicted_hit_ratio"].notna().all()
    assert rows["hit_z"].abs().max() < 4


def test_telling_classes_apart_is_fresher_than_one_long_time_and_hits_more_than_one_short(table):
    values = study.values(table)
    assert (
        values["expiry_by_class_stale_share"].value < values["expiry_fixed_3600s_stale_share"].value
    )
    assert values["expiry_by_class_hit_ratio"].value > values["expiry_fixed_10s_hit_ratio"].value


def test_the_guides_times_to_live_by_type_are_measured(table):
    own = table[(table["kind"] == "ttl") & (table["policy"] == "guide")]
    assert dict(zip(own["query_class"], own["ttl_s"], strict=True)) == {
        "static": 86_400,
        "daily": 3_600,
        "volatile": 300,
    }


def test_a_record_in_microseconds_is_read_as_seconds():
    (row,) = study.aggregate({"rows": [{"kind": "invalidation", "invalidate_p50_us": 80.0}]})
    assert row == {"kind": "invalidation", "invalidate_p50_s": pytest.approx(80e-6)}
