"""Replayed caches: hand-computed runs, an independent simulator, a real trace, and their limits."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from kvbench import physics
from kvbench.analysis import capacity
from kvbench.caching import policies, workload
from kvbench.errors import InputError
from kvbench.physics import Ceilings
from kvbench.traffic import exact, fleet, prefix, replay, semantic, simulators, together, worth
from kvbench.traffic import log as logs

ROOT = Path(__file__).resolve().parents[2]
LLAMA_1B = capacity.architecture("llama-3.2-1b")


def blocks(requests: list[list[int]], tokens: int = 10) -> prefix.Blocks:
    """Blocks of full length."""
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in requests])])
    lengths = np.array([len(one) * tokens for one in requests])
    flat = np.array([block for one in requests for block in one], dtype=np.uint32)
    return prefix.Blocks(flat, offsets, lengths, tokens, lengths)


def shared_data() -> Path | None:
    """Folder of the trace that is not part of the project, if it is there."""
    given = os.environ.get("KVBENCH_SHARED_DATA")
    places = [Path(given)] if given else [ROOT.parent / "shared" / "data"]
    return next((p for p in places if (p / "mooncake_conversation.jsonl").is_file()), None)


# ------------------------------------------------------------------ prefix cache


def test_a_run_ends_at_the_first_missing_block():
    # In three places the second request pushes block 0 out: of the third, 1 and 2 are there.
    reuse = prefix.replay(blocks([[0, 1, 2], [3], [0, 1, 2]]), "lru", 3)
    assert reuse.tokens.tolist() == [0, 0, 0]
    # 0 misses and pushes out 1, which pushes out 2: a cache one too small finds nothing at all.
    assert reuse.block_share == 0


def test_blocks_behind_a_gap_are_found_but_not_reused():
    reuse = prefix.replay(blocks([[0, 1], [1], [2], [0, 1]]), "lru", 2)
    assert reuse.tokens.tolist() == [0, 10, 0, 0]
    assert reuse.block_share == pytest.approx(1 / 6)


def test_a_touched_block_becomes_the_newest():
    reuse = prefix.replay(blocks([[0], [1], [0], [2], [0]]), "lru", 2)
    assert reuse.tokens.tolist() == [0, 0, 10, 0, 10]
    assert prefix.replay(blocks([[0], [1], [0], [2], [0]]), "fifo", 2).tokens[-1] == 0


def test_reused_tokens_are_at_most_the_request():
    asked = blocks([[0, 1], [0, 1]])
    short = np.array([15, 15])
    asked = prefix.Blocks(asked.ids, asked.offsets, short, 10, short)
    assert prefix.unlimited(asked).tokens.tolist() == [0, 15]


def test_reuse_is_told_in_the_tokens_of_the_log_when_blocks_were_cut_by_bytes():
    asked = blocks([[0, 1], [0, 2]])
    asked = prefix.Blocks(asked.ids, asked.offsets, np.array([40, 40]), 10, asked.cut_tokens)
    assert prefix.unlimited(asked).tokens.tolist() == [0, 20]


REQUESTS = some.lists(some.lists(some.integers(0, 12), max_size=6), min_size=1, max_size=40).map(
    blocks
)


@given(REQUESTS)
def test_a_cache_as_large_as_the_log_is_unlimited(asked):
    whole = prefix.unlimited(asked)
    for policy in prefix.POLICIES:
        large = prefix.replay(asked, policy, max(1, prefix.distinct(asked)) * 20)
        assert large.tokens.tolist() == whole.tokens.tolist(), policy


@given(REQUESTS, some.integers(1, 10))
def test_more_memory_never_hurts_lru(asked, size):
    small, large = (prefix.replay(asked, "lru", n).tokens.sum() for n in (size, size + 1))
    assert small <= large <= prefix.unlimited(asked).tokens.sum()


@given(REQUESTS, some.integers(0, 3))
def test_sharing_never_hurts_an_unlimited_cache(asked, seed):
    clients = np.random.default_rng(seed).integers(0, 3, asked.requests)
    own = prefix.unlimited(prefix.per_client(asked, clients))
    assert (own.tokens <= prefix.unlimited(asked).tokens).all()


def test_clients_do_not_find_each_others_blocks():
    own = prefix.per_client(blocks([[0], [0], [0]]), np.array([0, 1, 0]))
    assert prefix.unlimited(own).tokens.tolist() == [0, 0, 10]


def text_log(folder: Path) -> logs.Log:
    words = "All requests of this log begin with these words, word for word. " * 20
    rows = [
        {"messages": [{"role": "user", "content": words + str(n % 7) * 100}]} for n in range(30)
    ]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return logs.read([path])


def test_coarser_blocks_are_the_same_prefixes_with_fewer_ends(tmp_path):
    log = text_log(tmp_path)
    assert prefix.sizes(log) == [16, 32, 64, 128, 256, 512]
    shares = [prefix.unlimited(prefix.blocks(log, size)).token_share for size in prefix.sizes(log)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.9
    coarse = prefix.blocks(log, 64)
    assert np.diff(coarse.offsets).tolist() == (np.diff(log.offsets) // 4).tolist()


def test_a_log_of_fixed_blocks_gives_multiples_only(tmp_path):
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 1500, "output_length": 1, "hash_ids": [0, 1, 2]}
    path.write_text(2 * (json.dumps(row) + "\n"))
    log = logs.read([path])
    assert prefix.sizes(log) == [512, 1024, 2048]
    # The last, incomplete block counts, as it does in the trace itself.
    assert prefix.unlimited(prefix.blocks(log, 1024)).tokens.tolist() == [0, 1500]
    with pytest.raises(InputError, match="ask for a multiple"):
        prefix.blocks(log, 256)


@pytest.mark.skipif(shared_data() is None, reason="the trace is not on this machine")
def test_a_production_trace_gives_the_published_shares():
    folder = shared_data()
    log = logs.read([folder / "mooncake_conversation.jsonl"])
    assert (log.requests, log.prompt_tokens) == (12_031, 144_793_823)
    assert int(log.output_tokens.sum()) == 4_122_048
    asked = prefix.blocks(log)
    assert (len(asked.ids), prefix.distinct(asked)) == (288_500, 182_790)
    expected = {
        1_000: (0.0445, 0.0454),
        10_000: (0.2112, 0.2153),
        30_000: (0.3257, 0.3321),
        50_000: (0.3546, 0.3615),
        100_000: (0.3637, 0.3708),
        None: (0.3664, 0.3736),
    }
    found = {
        size: prefix.unlimited(asked) if size is None else prefix.replay(asked, "lru", size)
        for size in expected
    }
    shares = {k: (round(r.block_share, 4), round(r.token_share, 4)) for k, r in found.items()}
    assert shares == expected


# ------------------------------------------------------------------ the two simulators


@pytest.fixture(scope="module")
def zipf() -> np.ndarray:
    keys = workload.zipf(30_000, 3_000, 7, 0.8)
    return np.unique(keys, return_inverse=True)[1]


@pytest.mark.parametrize("policy", simulators._NATIVE)
@pytest.mark.parametrize("size", [100, 1000])
def test_libcachesim_and_ours_agree(policy, size, zipf):
    pytest.importorskip("libcachesim")
    assert simulators.native(policy, size)
    with simulators.Stream(zipf) as stream:
        theirs, ours = stream.hits(policy, size), stream.hits(policy, size, own=True)
    if policy == "s3_fifo":
        assert theirs == pytest.approx(ours, abs=0.005 * len(zipf))
    else:
        assert theirs == ours


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_libcachesim_and_ours_agree_request_by_request(policy, zipf):
    pytest.importorskip("libcachesim")
    asked = blocks([part.tolist() for part in np.array_split(zipf, 3000)])
    theirs = prefix.replay(asked, policy, 200)
    ours = prefix.replay(asked, policy, 200, own=True)
    assert theirs.tokens.tolist() == ours.tokens.tolist()
    assert theirs.block_share == ours.block_share


def test_a_tiny_cache_is_played_by_ours():
    # libCacheSim ends the process where a queue would have no length.
    assert not simulators.native("s3_fifo", 3)
    with simulators.Stream(np.arange(20) % 5) as stream:
        assert stream.hits("s3_fifo", 3) == stream.hits("s3_fifo", 3, own=True)


@given(some.lists(some.integers(0, 9), min_size=1, max_size=60))
def test_neighbouring_uses_are_found(keys):
    found = np.array(keys)
    before, after = simulators.previous_uses(found), simulators.next_uses(found)
    ours = [-1 if math.isinf(one) else int(one) for one in policies.next_uses(keys)]
    assert after.tolist() == ours
    for place, earlier in enumerate(before.tolist()):
        assert earlier == max((n for n in range(place) if keys[n] == keys[place]), default=-1)


# ------------------------------------------------------------------ exact cache


def test_no_policy_beats_the_limit_and_room_for_all_gives_all_repeats(zipf):
    rows = exact.by_capacity(zipf[:5000], points=4)
    distinct = len(np.unique(zipf[:5000]))
    rows = {(row["policy"], row["capacity"]): row["hit_ratio"] for row in rows}
    for (policy, size), ratio in rows.items():
        assert ratio <= rows["opt", size] + 1e-12, (policy, size)
    assert rows["lru", max(size for _, size in rows)] == pytest.approx(1 - distinct / 5000)


def test_a_fixed_lifetime_follows_the_renewal_formula():
    # One key, Poisson requests at rate l, life T: hit ratio lT / (1 + lT).
    times = np.cumsum(np.random.default_rng(1).exponential(1.0, 40_000))
    keys = np.zeros(len(times), dtype=int)
    for ttl, ratio in zip((1.0, 6.0), exact.by_ttl(keys, times, (1.0, 6.0)), strict=True):
        assert ratio == pytest.approx(ttl / (1 + ttl), abs=0.01)


def test_zipfs_exponent_is_found_within_its_interval():
    keys = workload.zipf(200_000, 200, 3, 0.9)
    fitted = exact.popularity(np.bincount(keys))
    assert fitted.low < 0.9 < fitted.high
    assert fitted.high - fitted.low < 0.02


def test_equal_popularity_has_exponent_zero():
    fitted = exact.popularity(np.full(50, 1000))
    assert fitted.exponent == pytest.approx(0, abs=1e-4) and fitted.low == 0


def test_what_nobody_repeats_has_no_popularity():
    assert exact.popularity(np.ones(100, dtype=int)) is None


# ------------------------------------------------------------------ semantic cache


class Letters:
    """An encoder for tests: counts of letters; reads texts of up to 60 characters."""

    def encode(self, texts):
        found = np.array([[t.lower().count(chr(97 + n)) for n in range(26)] for t in texts], float)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def fits(self, text):
        return len(text) <= 60


def asked_log(folder: Path, questions: list[str], system: str = "") -> logs.Log:
    path = folder / "asked.jsonl"
    rows = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        if system:
            messages.insert(0, {"role": "system", "content": f"{system}{len(rows)}"})
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return logs.read([path])


def swept(log: logs.Log, threshold: float) -> semantic.Swept:
    return semantic.sweep(log, semantic.similarities(log, Letters()), threshold)


def test_a_question_that_is_close_enough_is_a_candidate(tmp_path):
    log = asked_log(
        tmp_path, ["Start a claim", "start a claim!", "Close the window", "Start a claim"]
    )
    found = swept(log, 0.95)
    assert (found.exact, found.candidates) == (1, 1)
    assert found.served.tolist() == [False, True, False, False]


def test_guards_refuse_what_differs_in_a_number(tmp_path):
    found = swept(asked_log(tmp_path, ["Pay 10 euros now", "Pay 20 euros now"]), 0.95)
    assert found.candidates == 0 and found.candidates_unguarded == 1
    assert found.refused["numbers"] == 1


def test_questions_of_different_contexts_never_meet(tmp_path):
    found = swept(asked_log(tmp_path, ["Same words", "Same words"], system="Context "), 0.5)
    assert (found.exact, found.candidates) == (0, 0)


def test_a_question_that_the_encoder_would_cut_off_is_like_no_other(tmp_path):
    long = "words and words " * 5
    assert swept(asked_log(tmp_path, [long + "a", long + "b"]), 0.9).candidates == 0


def test_fewer_candidates_at_a_higher_threshold(tmp_path):
    log = asked_log(tmp_path, ["stone", "stones", "notes", "onset", "tone", "alpha", "omega"])
    counts = [swept(log, threshold).candidates_unguarded for threshold in (0.7, 0.9, 1.0)]
    assert counts == sorted(counts, reverse=True)


def test_the_sheet_shows_texts_only_where_they_may_be_kept(tmp_path):
    log = asked_log(tmp_path, ["Start a claim", "start a claim!"])
    pairs = semantic.riskiest(log, swept(log, 0.9))
    hidden, shown = (semantic.sheet(log, pairs, keep) for keep in (False, True))
    assert "claim" not in json.dumps(hidden) and shown[0]["asked"] == "start a claim!"
    assert hidden[0]["asked_at"] == "asked.jsonl:2" and hidden[0]["stored_at"] == "asked.jsonl:1"


def test_digests_of_one_text_differ_between_logs(tmp_path):
    first = asked_log(tmp_path, ["a b", "c d"])
    second = asked_log(tmp_path, ["a b", "c e"])
    assert semantic.hashed("a b", first) != semantic.hashed("a b", second)


def marked(folder: Path, marks: list[str]) -> Path:
    path = folder / "sheet.csv"
    rows = [f"one,{n},{m}\n" for n, m in enumerate(marks)]
    path.write_text("log,pair,false_hit\n" + "".join(rows))
    return path


def test_marks_give_the_share_of_false_hits_with_its_interval(tmp_path):
    found = semantic.judged(marked(tmp_path, ["yes", "no", "", "No", "não"]), "one")
    assert (found.marked, found.false, found.share) == (4, 1, 0.25)
    # Clopper and Pearson for 1 of 4.
    assert (found.low, found.high) == (
        pytest.approx(0.0063, abs=1e-4),
        pytest.approx(0.8059, abs=1e-4),
    )


def test_only_the_marks_of_the_log_count_and_each_pair_once(tmp_path):
    path = tmp_path / "sheet.csv"
    path.write_text("log,pair,false_hit\none,1,yes\none,1,yes\ntwo,1,no\none,2,no\n")
    assert semantic.judged(path, "one").marked == 2
    with pytest.raises(InputError, match="no pair of the log 'three'"):
        semantic.judged(path, "three")


def test_an_untouched_sheet_says_nothing(tmp_path):
    assert semantic.judged(marked(tmp_path, ["", ""]), "one") is None


def test_a_mark_that_is_neither_yes_nor_no_is_refused(tmp_path):
    with pytest.raises(InputError, match="line 2: false_hit is 'perhaps'"):
        semantic.judged(marked(tmp_path, ["perhaps"]), "one")


# ------------------------------------------------------------------ together, fleet, worth


def test_stages_take_what_the_ones_before_leave():
    log = logs.Log(("x",), "test", 4, keys=np.array([0, 1, 0, 2]))
    log.input_tokens = np.full(4, 20)
    asked = blocks([[0, 1], [0, 2], [0, 1], [0, 3]])
    rows = together.replay(log, 10, asked, 100, np.array([False, False, False, True]))
    by = {row["stage"]: row for row in rows}
    assert by["exact"]["requests_answered"] == 1
    assert by["semantic"] | {} == by["semantic"] and by["semantic"]["requests_answered"] == 1
    assert by["prefix"]["requests_seen"] == 2 and by["prefix"]["tokens_saved"] == 10
    assert sum(row["token_share"] for row in rows) == pytest.approx(1)
    assert by["model"]["requests_answered"] == 2


def test_one_replica_is_the_same_under_every_routing():
    asked = blocks([[0, 1], [0, 2], [0, 1], [3]])
    one = {fleet.route(asked, 1, 3, routing)["token_share"] for routing in fleet.ROUTINGS}
    assert one == {prefix.replay(asked, "lru", 3).token_share}


def test_one_replica_saves_what_one_cache_saves_in_the_tokens_of_the_log():
    asked = blocks([[0, 1], [0, 1], [0, 2]])
    stated = prefix.Blocks(
        asked.ids, asked.offsets, 3 * asked.input_tokens + 1, asked.tokens, asked.cut_tokens
    )
    one = fleet.route(stated, 1, 1000, "cache_aware")
    assert one["token_share"] == prefix.replay(stated, "lru", 1000).token_share


def test_routing_to_the_cache_finds_more_than_chance():
    rng = np.random.default_rng(5)
    asked = blocks([[int(c) * 10 + n for n in range(3)] for c in rng.integers(0, 20, 400)])
    aware, chance = (fleet.route(asked, 8, 12, r) for r in ("cache_aware", "random"))
    assert aware["token_share"] > chance["token_share"] + 0.2
    assert aware["imbalance"] < 2


def test_one_prefix_for_all_does_not_pile_up_on_one_replica():
    asked = blocks([[0, 100 + n] for n in range(400)])
    assert fleet.route(asked, 4, 1000, "cache_aware")["imbalance"] < 1.5


def test_saved_work_is_the_whole_less_what_is_left():
    lengths, reused = np.array([100, 50]), np.array([60, 0])
    whole = sum(
        physics.forward_flops(LLAMA_1B, n) - physics.masked_flops(LLAMA_1B, n) for n in (100, 50)
    )
    left = physics.forward_flops(LLAMA_1B, 40, 60) - physics.masked_flops(LLAMA_1B, 40)
    left += physics.forward_flops(LLAMA_1B, 50) - physics.masked_flops(LLAMA_1B, 50)
    rates = Ceilings(prefill_flops_per_s=1e12)
    found = worth.saved(LLAMA_1B, lengths, reused, rates, worth.price("2/8"))
    assert found["flops_saved"] == pytest.approx(whole - left)
    assert found["prefill_s_saved"] == pytest.approx((whole - left) / 1e12)
    assert found["usd_saved"] == pytest.approx(60 * 2 / 1e6)


#: Ten lines: A six times, B twice, C and D once; A, B and C begin with the same 512 tokens.
TEN = {
    "A": {"input_length": 1024, "output_length": 100, "hash_ids": [0, 1]},
    "B": {"input_length": 1024, "output_length": 50, "hash_ids": [0, 2]},
    "C": {"input_length": 600, "output_length": 10, "hash_ids": [0, 3]},
    "D": {"input_length": 512, "output_length": 20, "hash_ids": [9]},
}


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """The summary of ten lines at 1 TFLOP/s, 1 TB/s, 2 and 8 USD a million tokens."""
    path = tmp_path_factory.mktemp("ten") / "ten.jsonl"
    lines = [{"timestamp": 1000 * n, **TEN[name]} for n, name in enumerate("ABABACADAA")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    setting = replay.Setting(
        name="ten",
        model="llama-3.2-1b",
        architecture=LLAMA_1B,
        memory_bytes=24 * 2**30,
        ceilings=worth.ceilings("1TFLOP/s,1TB/s"),
        price=worth.price("2/8"),
    )
    return replay.run(logs.read([path]), setting, None)["summary"]


def test_shares_of_ten_lines_are_those_counted_by_hand(ten):
    assert ten["input_tokens"] == 6 * 1024 + 2 * 1024 + 600 + 512 == 9304
    # Two entries answer the last five A and the second B; C and D push out what nobody asks again.
    assert ten["repeat_share"] == ten["exact_hit_ratio"] == 0.6
    assert ten["exact_capacity"] == 2
    # The first B and C find 512 tokens, the six repeats all of theirs.
    assert ten["prefix_tokens_saved"] == 512 + 512 + 6 * 1024 == 7168
    assert ten["prefix_token_share"] == 7168 / 9304
    # Behind the exact cache only the first B and C find anything.
    assert ten["left_share"] == (9304 - 6 * 1024 - 2 * 512) / 9304


def test_money_of_ten_lines_is_that_reckoned_by_hand(ten):
    assert ten["exact_tokens_saved"] == 6144 and ten["exact_output_tokens_saved"] == 550
    assert ten["exact_usd_saved"] == pytest.approx(6144 * 2e-6 + 550 * 8e-6)
    assert ten["prefix_usd_saved"] == pytest.approx(7168 * 2e-6)


def test_seconds_of_ten_lines_are_those_reckoned_by_hand(ten):
    # Sixteen layers, each 2 x 2048 x 2048 and 2 x 2048 x 512 for attention, 3 x 2048 x 8192 beside.
    layers = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)
    head = 2048 * 128256

    def prefill(first: int, last: int) -> float:
        pairs = (last * (last + 1) - first * (first + 1)) / 2
        return 2 * ((last - first) * layers + head + 16 * 32 * (64 + 64) * pairs)

    assert ten["exact_prefill_s_saved"] == pytest.approx(6 * prefill(0, 1024) / 1e12, rel=1e-6)
    # What is found needs no work but the last row of logits.
    saved = 6 * (prefill(0, 1024) - 2 * head) + 2 * (prefill(0, 512) - 2 * head)
    assert ten["prefix_prefill_s_saved"] == pytest.approx(saved / 1e12, rel=1e-6)
    # Two bytes a number; keys and values are 16 x 2 x 512 numbers a token; half an answer is held.
    weights, token = 2 * (layers + head), 2 * 16 * 2 * 512
    moved = 500 * (weights + (1024 + 50) * token) + 50 * (weights + (1024 + 25) * token)
    # The vectors of the norms, a ten-thousandth of the weights, are left out here.
    assert ten["exact_decode_s_saved"] == pytest.approx(moved / 1e12, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "flops", "read"),
    [("300TFLOP/s", 3e14, None), ("1.5 PFLOP/s,2TB/s", 1.5e15, 2e12), ("50GB/s", None, 5e10)],
)
def test_ceilings_may_be_numbers(text, flops, read):
    found = worth.ceilings(text)
    assert (found.prefill_flops_per_s, found.read_bytes_per_s) == (flops, read)


def test_ceilings_of_a_recorded_machine_are_found_by_its_name():
    machine = sorted((ROOT / "results" / "recorded").iterdir())[0].name
    assert worth.ceilings(machine, ROOT).machine.startswith(machine)


@pytest.mark.parametrize("text", ["fast", "0TFLOP/s", "3", "../x"])
def test_ceilings_that_are_nothing_of_the_kind_are_refused(text):
    with pytest.raises(InputError, match="ceilings"):
        worth.ceilings(text)


@pytest.mark.parametrize("text", ["", "a", "-1", "1/2/3", "nan"])
def test_a_price_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="price"):
        worth.price(text)


# ------------------------------------------------------------------ the fleet's plan


def plan(**change):
    options = {
        "reused_share": 0.5,
        "held_share": lambda count: 0.5,
        "prefill_flops": 2e12,
        "prefill_flops_reusing": 1e12,
        "most_concurrent": 10_000,
        "conversations": 1000,
        "ceilings": Ceilings(prefill_flops_per_s=1e15),
    }
    return capacity.fleet(LLAMA_1B, 24 * 2**30, 8000.0, 200.0, **options | change)


def test_a_fleet_without_prefix_caching_holds_every_prompt_whole():
    without, _ = plan()
    free = 24 * 2**30 - physics.weight_bytes(LLAMA_1B, 2)
    # One of the sixteen layers is there twice while a token is decoded.
    each = 8200 * physics.kv_bytes(LLAMA_1B, 1, 2) * (1 + 1 / 16)
    assert without["concurrent"] == int(free / each)
    assert without["machines"] == math.ceil(1000 / without["concurrent"])
    assert without["prefill_tokens"] == 8_000_000
    assert without["prefill_machine_hours"] == pytest.approx(1000 * 2e12 / 1e15 / 3600)


def test_sharing_prefixes_fits_more_and_computes_less():
    without, caching = plan()
    assert caching["concurrent"] > without["concurrent"]
    assert caching["prefill_tokens"] == 4_000_000
    assert caching["prefill_machine_hours"] == pytest.approx(without["prefill_machine_hours"] / 2)


def test_sharing_is_never_assumed_beyond_what_the_log_showed():
    # A log of one request shows no two that share.
    _, caching = plan(most_concurrent=1, held_share=lambda count: 1 / count)
    assert caching["concurrent"] == plan()[0]["concurrent"]
    assert caching["held_share"] == 1


def test_more_conversations_than_a_log_has_share_in_groups_of_its_size():
    without, caching = plan(most_concurrent=2, held_share=lambda count: 1 / count)
    # Of every two prompts one is held; the answers and the working copy are each one's own.
    whole, prompt, layer = (
        tokens * physics.kv_bytes(LLAMA_1B, 1, 2) for tokens in (8200, 8000, 8200 / 16)
    )
    free = 24 * 2**30 - physics.weight_bytes(LLAMA_1B, 2)
    assert caching["held_share"] == 0.5
    assert caching["concurrent"] == int(free / (whole - prompt / 2 + layer))
    assert caching["concurrent"] > without["concurrent"]


def test_a_log_that_does_not_tell_has_a_row_with_a_reason():
    _, caching = plan(reused_share=None, held_share=None)
    assert caching["machines"] is None and "does not show" in caching["reason"]


def test_weights_that_do_not_fit_are_said():
    rows = capacity.fleet(
        LLAMA_1B, 2**30, 10.0, 1.0, reused_share=0.1, held_share=lambda n: 1.0,
        prefill_flops=1.0, prefill_flops_reusing=1.0, most_concurrent=5,
    )  # fmt: skip
    assert {row["reason"] for row in rows} == {"the weights do not fit"}


def test_distinct_blocks_of_requests_in_a_row():
    asked = blocks([[0, 1], [0, 2], [0, 3]])
    assert prefix.distinct_share(asked, 1) == 1
    assert prefix.distinct_share(asked, 3) == pytest.approx(4 / 6)
