"""Arms in rounds: everyone once a round, in an order drawn anew, and ratios paired within rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kvbench.analysis import paired
from kvbench.studies import _paired
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
