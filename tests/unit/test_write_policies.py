"""Write policies over a real SQLite file: staleness, coalescing, and what a crash loses."""

from __future__ import annotations

import sqlite3

import pytest
import study_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from kvbench.caching import write_policies
from kvbench.errors import InputError, Unsupported
from kvbench.studies import write_policy

KEYS = [str(number) for number in range(6)]
SYNCHRONOUS = [
    name for name in write_policies.POLICIES if name not in ("aside_stale", "write_back")
]
OPERATIONS = st.lists(st.tuples(st.sampled_from("rw"), st.sampled_from(KEYS)), max_size=60)


class Crash(Exception):
    """The process and its cache are gone."""


class Fuse:
    """Lets a number of steps pass and then fails before the next one takes effect."""

    def __init__(self, steps=None):
        self.left = steps

    def step(self):
        if self.left is not None:
            if self.left == 0:
                raise Crash
            self.left -= 1


class MemoryCache:
    def __init__(self, fuse):
        self.fuse, self.entries = fuse, {}

    def get(self, key):
        self.fuse.step()
        return self.entries.get(key)

    def set(self, key, value):
        self.fuse.step()
        self.entries[key] = value

    def delete(self, key):
        self.fuse.step()
        self.entries.pop(key, None)


class MemoryStore(write_policies.Store):
    """The real store on an SQLite database in memory, with a fuse before each commit and read."""

    def __init__(self, fuse):
        super().__init__(":memory:")
        self.fuse = Fuse()
        self.put_many(dict.fromkeys(KEYS, 0))
        self.writes = self.transactions = 0
        self.fuse = fuse

    def get(self, key):
        self.fuse.step()
        return super().get(key)

    def put_many(self, values):
        self.fuse.step()
        super().put_many(values)


def build(name, *, capacity=3, flush_every=4, steps=None):
    fuse = Fuse(steps)
    cache = write_policies.BoundedCache(MemoryCache(fuse), capacity)
    return write_policies.build(name, MemoryStore(fuse), cache, flush_every)


def run(policy, operations):
    """Do operations until the end or the crash; return acknowledged versions and stale reads."""
    acknowledged, stale = dict.fromkeys(KEYS, 0), 0
    try:
        for version, (kind, key) in enumerate(operations, 1):
            if kind == "w":
                policy.write(key, version)
                acknowledged[key] = version
            else:
                stale += policy.read(key) != acknowledged[key]
    except Crash:
        pass
    return acknowledged, stale


@pytest.mark.parametrize("name", [*SYNCHRONOUS, "write_back"])
@given(OPERATIONS, st.integers(1, 7), st.integers(1, 9))
def test_nobody_reads_an_old_value_when_all_writes_pass_through_the_policy(
    name, operations, capacity, flush_every
):
    policy = build(name, capacity=capacity, flush_every=flush_every)
    assert run(policy, operations)[1] == 0


@given(OPERATIONS, st.integers(1, 7))
def test_synchronous_policies_lose_nothing_at_any_moment(operations, capacity):
    for name in SYNCHRONOUS:
        policy = build(name, capacity=capacity)
        acknowledged, _ = run(policy, operations)
        assert policy.store.everything() == acknowledged
        assert not policy.dirty


@pytest.mark.parametrize("name", write_policies.POLICIES)
@settings(max_examples=200)
@given(OPERATIONS, st.integers(1, 7), st.integers(1, 9), st.integers(0, 150))
def test_a_crash_at_any_step_loses_exactly_the_dirty_keys(
    name, operations, capacity, flush_every, steps
):
    policy = build(name, capacity=capacity, flush_every=flush_every, steps=steps)
    acknowledged, _ = run(policy, operations)
    stored = policy.store.everything()
    lost = {key for key in KEYS if stored[key] < acknowledged[key]}
    assert lost == policy.dirty
    if name != "write_back":
        assert not lost


@given(OPERATIONS, st.integers(1, 7), st.integers(1, 9))
def test_write_back_never_writes_the_store_more_often_than_write_through(
    operations, capacity, flush_every
):
    through = build("write_through", capacity=capacity)
    back = build("write_back", capacity=capacity, flush_every=flush_every)
    acknowledged, _ = run(through, operations)
    run(back, operations)
    back.flush()
    assert back.store.writes <= through.store.writes
    assert back.store.everything() == through.store.everything() == acknowledged


@given(OPERATIONS, st.integers(1, 9))
def test_write_back_never_holds_more_dirty_keys_than_a_flush_covers(operations, flush_every):
    policy = build("write_back", capacity=6, flush_every=flush_every)
    for version, (kind, key) in enumerate(operations, 1):
        if kind == "w":
            policy.write(key, version)
        else:
            policy.read(key)
        assert len(policy.dirty) <= flush_every


@given(OPERATIONS, st.integers(1, 7))
def test_read_through_is_cache_aside_moved_into_the_cache_layer(operations, capacity):
    counts = []
    for name in ("read_through", "aside_invalidate"):
        policy = build(name, capacity=capacity)
        run(policy, operations)
        counts.append((policy.hits, policy.store.reads, policy.store.writes))
    assert counts[0] == counts[1]


def test_cache_aside_that_does_not_tell_the_cache_serves_old_values():
    operations = [("r", "0"), ("w", "0"), ("r", "0"), ("r", "0")]
    assert run(build("aside_stale"), operations)[1] == 2


def test_write_around_does_not_bring_a_written_key_into_the_cache():
    policy = build("write_around")
    policy.write("0", 1)
    assert "0" not in policy.cache
    policy.read("0")
    policy.write("0", 2)
    assert policy.read("0") == 2
    assert policy.hits == 1


def test_write_back_stores_several_writes_of_a_key_once():
    policy = build("write_back", flush_every=10)
    for version in range(1, 8):
        policy.write("0", version)
    policy.flush()
    assert (policy.store.writes, policy.store.transactions) == (1, 1)


def test_write_back_stores_a_dirty_key_before_it_is_evicted():
    policy = build("write_back", capacity=1, flush_every=100)
    policy.write("0", 1)
    policy.write("1", 2)
    assert policy.store.everything()["0"] == 1
    assert policy.dirty == {"1"}


def test_write_back_replaces_newer_values_of_another_writer_at_its_flush():
    policy = build("write_back", flush_every=100)
    policy.write("0", 1)
    policy.store.put("0", 2)
    policy.flush()
    assert policy.store.everything()["0"] == 1


@given(OPERATIONS, st.integers(1, 7))
def test_cache_never_holds_more_keys_than_its_capacity(operations, capacity):
    policy = build("write_through", capacity=capacity)
    for version, (kind, key) in enumerate(operations, 1):
        if kind == "w":
            policy.write(key, version)
        else:
            policy.read(key)
        assert len(policy.cache) <= capacity


def test_a_transaction_that_fails_half_way_stores_nothing(tmp_path):
    store = write_policies.Store(tmp_path / "store.db")
    with pytest.raises(sqlite3.IntegrityError):
        store.put_many({"a": 1, "b": None})
    other = write_policies.Store(tmp_path / "store.db")
    assert other.everything() == {}
    store.put("a", 1)
    assert other.everything() == {"a": 1}
    store.close()
    other.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("write_sideways"), "unknown write policy 'write_sideways'.*write_back"),
        (lambda: build("write_through", capacity=0), "capacity is 0"),
        (lambda: build("write_back", flush_every=0), "flush_every is 0"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- the study, over the cache server ---


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("write")
    try:
        return study_runs.table(
            "write_policy",
            folder,
            seed=5,
            operations=300,
            keys=60,
            capacity=20,
            crashes=1,
            write_shares=[0.1],
            rounds=10,
        )
    except Unsupported as error:
        pytest.skip(str(error))


def test_a_killed_process_loses_exactly_its_dirty_keys(table):
    crashes = table[table["kind"] == "crash"]
    assert len(crashes) == 8
    assert crashes["lost_is_dirty"].astype(bool).all()
    back = crashes["policy"] == "write_back"
    assert (crashes.loc[~back, "lost_keys"] == 0).all()
    assert crashes.loc[back, "lost_keys"].max() > 0


def test_stale_reads_come_from_writes_that_the_cache_is_not_told_of(table):
    values = write_policy.values(table)
    assert values["write_policy_aside_stale_stale_reads"].value > 0
    for name in ("aside_invalidate", "aside_update", "write_through", "write_around"):
        assert values[f"write_policy_{name}_stale_reads"].value == 0
        assert values[f"write_policy_{name}_external_stale_share"].value > 0
    assert values["write_policy_write_back_500_stale_reads"].value == 0


def test_study_reports_fewer_store_writes_for_write_back(table):
    values = write_policy.values(table)
    assert (
        values["write_policy_write_back_500_store_writes"].value
        < values["write_policy_write_through_store_writes"].value
    )
    assert 0 < values["write_policy_writes_saved"].value < 100
    assert values["write_policy_lost_is_dirty"].value == values["write_policy_crashes"].value == 8


def test_study_compares_writes_within_stretches_of_the_same_operations(table):
    values = write_policy.values(table)
    gain = values["write_policy_write_back_500_write_speedup"]
    assert gain.ci is not None and gain.value > 1
    assert values["write_policy_write_through_write_speedup"].value is None
    own = table[(table["kind"] == "steady") & (table["policy"] == "write_back")]
    assert (own["write_speedup_rounds"] == 10).all()


def test_a_record_in_microseconds_is_read_as_seconds():
    old = {"kind": "steady", "policy": "write_back", "external_share": 0.0, "flush_every": 50}
    old |= {"read_p50_us": 120.0, "write_p50_us": None}
    (row,) = write_policy.aggregate({"rows": [old], "samples": {}})
    assert row["read_p50_s"] == pytest.approx(120e-6) and row["write_p50_s"] is None
    assert not any(key.endswith("_us") for key in row)
