"""Arms in rounds: everyone once a round, in an order drawn anew, and ratios paired within rounds."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from kvbench.analysis import metrics, paired
from kvbench.measurement import noise
from kvbench.studies import _paired, control_of
from kvbench.studies.measuring import _known, _rounds
from kvbench.studies.measuring._rounds import Log, turns

ARMS = ["none", "dict", "lru_cache"]


def test_every_arm_has_one_turn_in_every_round():
    order = list(turns(ARMS, 4, seed=1))
    for number in range(4):
        assert sorted(arm for turn, arm in order if turn == number) == sorted(ARMS)


def test_the_order_is_drawn_anew_and_follows_from_the_seed():
    orders = list(turns(ARMS, 30, seed=1))
    by_round = {tuple(arm for turn, arm in orders if turn == number) for number in range(30)}
    assert len(by_round) == math.factorial(len(ARMS))
    assert orders == list(turns(ARMS, 30, seed=1)) != list(turns(ARMS, 30, seed=2))


def test_a_log_keeps_round_and_running_position_of_every_turn():
    log = Log()
    for number, arm in turns(ARMS, 2, seed=3):
        log.add(arm, number, seconds=1.0)
    slots = sorted(slot for arm in ARMS for slot in log.of(arm, "slot"))
    assert slots == list(range(6))
    assert log.of("dict", "round") == [0, 1]
    assert log.of("unknown", "seconds") == []


def arm(seconds, rounds=None):
    rounds = range(len(seconds)) if rounds is None else rounds
    return {"round": list(rounds), "seconds": list(seconds)}


def test_drift_that_both_arms_meet_leaves_no_trace_in_their_ratio():
    drift = np.exp(np.random.default_rng(1).normal(0, 0.5, 20))
    row = _paired.columns_of("speedup", _paired.log_ratios(arm(3 * drift), arm(2 * drift)))
    assert row["speedup"] == pytest.approx(1.5)
    assert row["speedup_ci_low"] == pytest.approx(row["speedup_ci_high"]) == pytest.approx(1.5)


def test_only_rounds_in_which_both_had_a_turn_count():
    logs = _paired.log_ratios(arm([2, 100, 2], [0, 1, 2]), arm([1, 1], [0, 2]))
    assert logs == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(("rounds", "known"), [(1, False), (9, False), (10, True)])
def test_a_ratio_has_an_interval_from_ten_rounds_on(rounds, known):
    assert paired.FEWEST_ROUNDS == 10
    row = _paired.columns_of("speedup", np.linspace(0.1, 0.2, rounds))
    assert row["speedup_rounds"] == rounds
    assert ("speedup_ci_low" in row) is known
    assert ("speedup_smallest_difference" in row) is known
    assert set(row) <= set(_paired.meanings("speedup", "time over time"))


def test_a_ratio_tells_what_it_would_have_found_nine_times_out_of_ten():
    logs = np.random.default_rng(4).normal(0, 0.05, 40)
    told = _paired.columns_of("speedup", logs)["speedup_smallest_difference"]
    value = _paired.value(_paired.columns_of("speedup", logs), "speedup")
    assert (value.rounds, value.smallest_difference) == (40, told)
    others = np.random.default_rng(5).normal(math.log1p(told), 0.05, (400, 40))
    found = [_paired.columns_of("speedup", row)["speedup_ci_low"] > 1 for row in others]
    # Its own estimate of the spread is one draw: of a spread a tenth off, 83 to 95 % are found.
    assert 0.8 < np.mean(found) < 0.97


def test_a_difference_tells_the_least_one_in_its_own_unit():
    more, less = np.random.default_rng(6).normal(1.0, 0.01, (2, 50))
    row = _paired.difference(
        "overhead_s", {"proxy": arm(more), "direct": arm(less)}, "proxy", "direct"
    )
    half = (row["overhead_s_ci_high"] - row["overhead_s_ci_low"]) / 2
    # (t(0.975) + t(0.90)) / t(0.975) with 49 degrees of freedom.
    assert row["overhead_s_smallest_difference"] == pytest.approx(half * 3.3087 / 2.0096, rel=1e-3)


def test_arms_without_a_common_round_have_no_ratio():
    assert _paired.columns_of("speedup", _paired.log_ratios(arm([1]), {})) == {}
    assert _paired.value({}, "speedup").value is None


def stream(rng, hit_ratio=0.4, requests=50, noise=0.1):
    """Requests with and without a cache whose hits are free: the ratio is 1/(1 - hit ratio)."""
    weather = np.exp(rng.normal(0, 0.3, requests))
    hits = np.arange(requests) < hit_ratio * requests
    without = weather * np.exp(rng.normal(0, noise, requests))
    with_cache = np.where(hits, 1e-6, weather * np.exp(rng.normal(0, noise, requests)))
    return without, with_cache, hits


def test_the_interval_of_a_ratio_of_sums_holds_the_truth_95_times_in_100():
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(1000):
        # The stream is fixed, so the truth is what the same weather gives without noise.
        weather = np.ones(50)
        hits = np.arange(50) < 20
        above = weather * np.exp(rng.normal(0, 0.1, 50))
        below = np.where(hits, 1e-6, weather * np.exp(rng.normal(0, 0.1, 50)))
        row = _paired.ratio_of_sums("speedup", above, below, hits)
        inside += row["speedup_ci_low"] <= 50 / 30 <= row["speedup_ci_high"]
    # Standard error of a share of 95 % in 1000: 0.7 %.
    assert 930 <= inside <= 970


def test_free_hits_never_show_more_than_the_limit_beyond_the_interval():
    rng = np.random.default_rng(6)
    rows = []
    for _ in range(200):
        without, with_cache, hits = stream(rng)
        row = _paired.ratio_of_sums("speedup", without, with_cache, hits)
        rows.append(row | {"limit": 1 / (1 - hits.mean())})
    # The lower end alone is beyond in 2.5 % of the cases.
    assert _paired.beyond_limit(rows, "speedup", "limit") <= 12


def test_a_speedup_whose_whole_interval_is_above_the_limit_is_counted():
    row = {"speedup_ci_low": 1.7, "limit": 1.5625}
    assert _paired.beyond_limit([row, {"limit": 1.5}], "speedup", "limit") == 1


def test_a_ratio_of_sums_of_few_requests_has_no_interval():
    row = _paired.ratio_of_sums("speedup", [1.0, 2.0], [1.0, 1.0], ["hit", "miss"])
    assert row == {"speedup": 1.5, "speedup_rounds": 2}


# ------------------------------------------------------------------ turns that others disturbed


def marked(seconds, disturbed=(), rounds=None):
    found = arm(seconds, rounds)
    return found | {"disturbed": [number in disturbed for number in found["round"]]}


def test_a_round_in_which_either_was_disturbed_is_left_out_of_the_ratio():
    above = marked([2, 80, 2, 2], disturbed={1})
    below = marked([1, 1, 50, 1], disturbed={2})
    assert _paired.log_ratios(above, below) == pytest.approx([math.log(2)] * 2)


def test_a_disturbed_round_does_not_turn_a_verdict():
    """The cache gains 2 %; a third of its turns met another program and took half as long again."""
    hit = set(range(0, 30, 3))
    noise_of = np.exp(np.random.default_rng(7).normal(0, 0.002, 30))
    seconds = [noise_of[n] / 1.02 * (1.5 if n in hit else 1) for n in range(30)]
    arms = {"none": marked([1.0] * 30), "cache": marked(seconds, hit)}
    clean = _paired.compare("speedup", arms, "none", "cache")
    assert clean["speedup_rounds"] == 20 and clean["speedup_ci_low"] > 1
    unmarked = {name: arm(held["seconds"]) for name, held in arms.items()}
    assert _paired.compare("speedup", unmarked, "none", "cache")["speedup_ci_low"] < 1


def test_a_ratio_all_of_whose_rounds_were_disturbed_is_a_value_and_says_why():
    arms = {"none": marked([2.0] * 12, set(range(12))), "cache": marked([1.0] * 12)}
    row = _paired.compare("speedup", arms, "none", "cache")
    assert row["speedup"] == pytest.approx(2)
    assert (row["speedup_rounds"], row["speedup_not_judged"]) == (0, metrics.ALL_DISTURBED)
    assert "speedup_ci_low" not in row
    assert _paired.value(row, "speedup").not_judged == metrics.ALL_DISTURBED


def test_a_difference_leaves_disturbed_rounds_out():
    more = marked([3.0] * 11 + [90.0], disturbed={11})
    row = _paired.difference(
        "overhead_s", {"more": more, "less": marked([1.0] * 12)}, "more", "less"
    )
    assert (row["overhead_s"], row["overhead_s_rounds"]) == (2.0, 11)


def test_a_ratio_of_sums_leaves_disturbed_requests_out():
    arms = {"none": marked([1.0] * 12), "exact": marked([0.5] * 11 + [90.0], disturbed={11})}
    row = _paired.of_streams("speedup", arms, "none", "exact", [False] * 12)
    assert (row["speedup"], row["speedup_rounds"]) == (pytest.approx(2), 11)


def test_a_limit_is_that_of_the_rounds_that_count():
    below = marked([1.0] * 3, disturbed={2}) | {"limit": [2.0, 8.0, 1000.0]}
    assert _paired.limit({"none": marked([1.0] * 3), "cache": below}, "none", "cache") == (
        pytest.approx(4)
    )


@pytest.mark.parametrize(("rounds", "reason"), [(1, "one run"), (9, "not enough rounds: 9 of 10")])
def test_few_rounds_are_given_as_the_reason(rounds, reason):
    arms = {"none": arm([2.0] * rounds), "cache": arm([1.0] * rounds)}
    assert _paired.compare("speedup", arms, "none", "cache")["speedup_not_judged"] == reason


def test_an_older_record_without_marks_is_judged_as_it_was():
    logs = np.random.default_rng(8).normal(0.7, 0.05, 20)
    arms = {"none": arm(np.exp(logs)), "cache": arm(np.ones(20))}
    assert _paired.compare("speedup", arms, "none", "cache") == (
        pytest.approx(_paired.columns_of("speedup", logs))
    )


class Machine:
    """Readings of a machine on which others take one core from ``busy_from`` to ``busy_until``."""

    def __init__(self, busy_from, busy_until):
        self.now, self._from, self._until = 0.0, busy_from, busy_until
        self.readings = 0

    def clock(self):
        return self.now

    def read(self, children_s=0.0, children_involuntary=0):
        self.readings += 1
        others = min(max(self.now - self._from, 0.0), self._until - self._from)
        # The measurement itself keeps one core busy all the time.
        return noise.Reading(self.now, self.now + others, 0.0, self.now, 0)


def played(monkeypatch, machine, rounds, turn_s, spare=0):
    monkeypatch.setattr(noise, "read", machine.read)
    monkeypatch.setattr(noise.time, "perf_counter", machine.clock)
    monkeypatch.setattr(_rounds.noise, "descendants", lambda pid: set())
    log = Log(known=())
    for number, name in log.turns(["one", "other"], rounds, seed=1, spare=spare):
        machine.now += turn_s
        log.add(name, number, seconds=turn_s)
    return log.arms()


def test_long_turns_are_marked_one_by_one(monkeypatch):
    arms = played(monkeypatch, Machine(5.0, 8.0), rounds=6, turn_s=1.0)
    marks = {
        slot: mark
        for held in arms.values()
        for slot, mark in zip(held["slot"], held["disturbed"], strict=True)
    }
    assert [slot for slot in sorted(marks) if marks[slot]] == [5, 6, 7]


def test_short_turns_are_judged_together_and_not_read_one_by_one(monkeypatch):
    machine = Machine(0.9, 1.1)
    arms = played(monkeypatch, machine, rounds=1000, turn_s=0.001)
    slots = sorted(
        slot
        for held in arms.values()
        for slot, mark in zip(held["slot"], held["disturbed"], strict=True)
        if mark
    )
    assert slots[0] in range(495, 505) and slots[-1] in range(1495, 1510)
    assert machine.readings < 10


@pytest.mark.parametrize("breaks_off", [False, True])
def test_what_disturbs_a_later_run_of_turns_marks_none_of_an_earlier(monkeypatch, breaks_off):
    machine = Machine(1.0, 10.0)
    monkeypatch.setattr(noise, "read", machine.read)
    monkeypatch.setattr(noise.time, "perf_counter", machine.clock)
    monkeypatch.setattr(_rounds.noise, "descendants", lambda pid: set())
    log = Log(known=())

    def run(name):
        for number, arm in log.turns([name], 3, seed=1):
            if breaks_off and number == 2:
                break
            machine.now += 0.1
            log.add(arm, number, seconds=0.1)

    run("before")
    machine.now = 5.0
    run("after")
    arms = log.arms()
    assert not any(arms["before"]["disturbed"])
    assert all(arms["after"]["disturbed"])


def test_further_rounds_stand_in_for_disturbed_ones(monkeypatch):
    arms = played(monkeypatch, Machine(5.0, 8.0), rounds=6, turn_s=1.0, spare=3)
    assert arms["one"]["round"] == arms["other"]["round"] == list(range(8))


def test_a_machine_that_stays_busy_gets_no_more_than_the_spare_rounds(monkeypatch):
    arms = played(monkeypatch, Machine(0.0, 1e9), rounds=6, turn_s=1.0, spare=3)
    assert arms["one"]["round"] == list(range(9))


def test_a_quiet_machine_gets_no_further_round(monkeypatch):
    arms = played(monkeypatch, Machine(1e9, 2e9), rounds=6, turn_s=1.0, spare=3)
    assert arms["one"]["round"] == list(range(6))


def test_a_cell_whose_server_cannot_be_told_from_others_marks_nothing():
    log = Log(known=None)
    for number, name in log.turns(["one"], 2, seed=1):
        log.add(name, number, seconds=1.0)
    assert "disturbed" not in log.arms()["one"]


def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_child_processes_use_is_the_cells_own_while_they_run_and_when_they_have_ended():
    def work(done, end):
        burn(0.2)
        done.send(True)
        end.recv()

    own = _rounds.Own()
    before = own.cpu_s
    fork = multiprocessing.get_context("fork")
    (done, there), (here, end) = fork.Pipe(duplex=False), fork.Pipe(duplex=True)
    process = fork.Process(target=work, args=(there, end))
    process.start()
    done.recv()
    running = own.cpu_s - before
    here.send(True)
    process.join()
    assert 0.15 < running < 2 and own.cpu_s - before >= running - 0.03


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_grandchildren_belong_to_a_process_too():
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as child:
        while not noise.descendants(child.pid) and child.poll() is None:
            os.sched_yield()
        assert len(noise.descendants(os.getpid()) - {child.pid}) >= 1
        child.communicate(b"\n")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only root sees who listens")
def test_a_server_of_this_process_itself_is_known_by_its_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert _known.programs([None, f"redis://127.0.0.1:{port}/0"]) == frozenset()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only root sees who listens")
def test_a_server_behind_a_socket_file_is_known_by_its_peer(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        assert _known.programs([f"unix://{path}?db=0"]) == {os.getpid()}


def test_a_server_of_this_machine_that_no_process_here_owns_is_unknown(monkeypatch):
    monkeypatch.setattr(_known, "_listening", lambda port: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert _known.programs([f"http://localhost:{server.getsockname()[1]}/v1"]) is None


def test_an_address_that_nobody_answers_has_no_program():
    assert _known.programs(["redis://127.0.0.1:1/0", None]) == frozenset()


# ------------------------------------------------------------------ controls


def test_an_arm_may_take_part_in_some_rounds_that_are_evenly_spread():
    taken = [number for number, name in turns(["a", "b"], 36, 1, {"b": 12}) if name == "b"]
    assert taken == list(range(0, 36, 3))
    assert sum(name == "a" for _, name in turns(["a", "b"], 36, 1, {"b": 12})) == 36


def test_an_arm_takes_part_in_no_more_rounds_than_there_are():
    assert sum(name == "b" for _, name in turns(["a", "b"], 5, 1, {"b": 12})) == 5


def test_only_a_reference_that_is_measured_has_a_control():
    found = _rounds.with_controls(["none", "memory"], "none", "l2")
    assert found == {"none": "none", "memory": "memory", control_of("none"): "none"}


def controlled(factor, rounds=30):
    drift = np.exp(np.random.default_rng(9).normal(0, 0.4, rounds))
    jitter = np.exp(np.random.default_rng(10).normal(0, 0.01, (3, rounds)))
    return {
        "none": arm(2 * drift * jitter[0]),
        "cache": arm(drift * jitter[1]),
        control_of("none"): arm(2 * drift * jitter[2] / factor),
    }


def test_the_control_stands_beside_the_ratio_free_of_the_drift():
    row = _paired.compare("speedup", controlled(1.0), "none", "cache")
    assert row["speedup_control_ratio"] == pytest.approx(1, abs=0.02)
    assert row["speedup_control_ci_low"] < 1 < row["speedup_control_ci_high"]
    assert row["speedup_ci_low"] < 2.01 and "speedup_not_judged" not in row
    assert set(row) <= set(_paired.meanings("speedup", "time over time"))


def test_a_comparison_whose_control_is_off_is_a_value_and_says_why():
    row = _paired.compare("speedup", controlled(1.2), "none", "cache")
    assert row["speedup"] == pytest.approx(2, rel=0.02)
    assert row["speedup_not_judged"].startswith(metrics.CONTROL_OFF)
    assert "speedup_ci_low" not in row
    value = _paired.value(row, "speedup")
    assert value.ci is None and value.not_judged == row["speedup_not_judged"]


def test_a_control_of_few_rounds_voids_nothing():
    arms = controlled(1.2)
    arms[control_of("none")] = arm(arms[control_of("none")]["seconds"][:5])
    row = _paired.compare("speedup", arms, "none", "cache")
    assert "speedup_not_judged" not in row and "speedup_control_ci_low" not in row


def test_the_control_of_a_difference_is_that_of_its_reference():
    arms = controlled(1.2)
    row = _paired.difference("overhead_s", arms, "cache", "none")
    assert row["overhead_s_not_judged"].startswith(metrics.CONTROL_OFF)
