"""The semantic cache, its guards and bound, and the study that measures them."""

from __future__ import annotations

import random
import re
import threading
import zlib
from pathlib import Path

import jsonschema
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import study_runs
from hypothesis import given
from hypothesis import strategies as st
from kvbench.caching import guards, paraphrases, similarity
from kvbench.caching import semantic_cache as sc
from kvbench.caching.response_cache import MISS
from kvbench.figures import _language, app_semantic_index
from kvbench.paper import sections
from kvbench.studies import semantic
from kvbench.studies.measuring import _decisions

PAPER = Path(__file__).parents[2] / "paper" / "studies"


def towards(angle):
    """Unit vector in the plane; cosines of two are the cosines of their difference."""
    return np.array([np.cos(angle), np.sin(angle)], dtype=np.float32)


def by_angle(text):
    return towards(float(text))


def cache(**options):
    return sc.SemanticCache(by_angle, 2, **{"threshold": 0.9, **options})


# --- lookups --------------------------------------------------------------------------------------


def test_an_empty_cache_misses():
    found = cache().get("0")
    assert found.value is MISS
    assert found.entry is None


def test_a_close_question_hits_and_a_far_one_does_not():
    store = cache()
    store.put("0", "answer")
    assert store.get("0.1").value == "answer"
    assert store.get("0.1").similarity == pytest.approx(np.cos(0.1), abs=1e-6)
    assert not store.get("1").hit


def test_the_nearest_entry_wins():
    store = cache()
    store.put("0", "left")
    store.put("0.3", "right")
    assert store.get("0.2").value == "right"


def test_a_miss_names_the_nearest_entry():
    store = cache(threshold=0.99)
    number = store.put("0", "answer")
    found = store.get("0.5")
    assert (found.hit, found.entry, found.text) == (False, number, "0")


def test_an_exact_repeat_needs_no_vector():
    asked = []

    def encode(text):
        asked.append(text)
        return by_angle(text)

    store = sc.SemanticCache(encode, 2, threshold=0.9)
    store.put("0", "answer")
    asked.clear()
    assert store.get("0").kind == "exact"
    assert asked == []


def test_exact_first_answers_an_exact_repeat_at_any_threshold():
    store = cache(threshold=1.0)
    store.put("0.7", "answer")
    assert store.get("0.7").value == "answer"


@pytest.mark.parametrize("value", [None, "", 0, False])
def test_empty_values_are_hits(value):
    store = cache()
    store.put("0", value)
    assert store.get("0").hit
    assert store.get("0.01").hit
    assert store.get("0.01").value is value


def test_namespaces_never_see_each_other():
    store = cache()
    store.put("0", "theirs", namespace="a")
    assert not store.get("0", namespace="b").hit
    assert not store.get("0.01").hit


def test_storing_again_replaces_the_answer():
    store = cache()
    store.put("0", "old")
    store.put("0", "new")
    assert len(store) == 1
    assert store.get("0.01").value == "new"


def test_ttl_applies_to_the_vector_too():
    now = [0.0]
    store = cache(ttl_s=10, clock=lambda: now[0])
    store.put("0", "answer")
    now[0] = 9.9
    assert store.get("0.01").hit
    now[0] = 10.0
    assert not store.get("0.01").hit
    assert not store.get("0").hit
    assert store.stats.expired == 1


def test_an_expired_entry_gives_way_to_the_next_nearest():
    now = [0.0]
    store = cache(clock=lambda: now[0])
    store.put("0", "short", ttl_s=1)
    store.put("0.2", "long")
    now[0] = 2.0
    assert store.get("0.05").value == "long"


def test_a_cache_is_bounded_in_bytes_of_texts_and_vectors():
    store = cache(max_bytes=400)
    for number in range(100):
        store.put(str(number / 100), "answer", namespace=str(number % 3))
        assert store.footprint()[1] <= 400
    assert len(store) > 10


def test_a_refused_candidate_is_named():
    store = cache(guards={"never": lambda *_: False})
    store.put("0", "answer")
    assert store.get("0.1").refused == "never"
    assert store.get("1").refused == ""


def test_the_least_recently_used_entry_is_evicted():
    store = cache(capacity=2)
    store.put("0", "a")
    store.put("1", "b")
    store.get("0")
    store.put("2", "c")
    assert store.get("0.01").value == "a"
    assert not store.get("1.01").hit
    assert store.get("2.01").value == "c"


def test_an_evicted_entry_never_answers_with_the_last_one():
    store = cache(capacity=1)
    store.put("0", "a")
    store.put("2", "b")
    assert not store.get("0.01").hit


def test_invalidation_and_clearing_forget_the_vector():
    store = cache()
    store.put("0", "a")
    store.put("1", "b", namespace="n")
    assert store.invalidate("0")
    assert not store.invalidate("0")
    store.clear("n")
    assert not store.get("0.01").hit
    assert not store.get("1.01", namespace="n").hit
    assert store.footprint() == (0, 0)


def test_texts_that_the_encoder_cuts_off_are_matched_exactly_only():
    store = cache(fits=lambda text: text != "0.0001")
    store.put("0", "a")
    assert not store.get("0.0001").hit
    store.put("0.0001", "b")
    assert store.get("0.0001").value == "b"
    assert store.get("0.00011").value == "a"


@pytest.mark.parametrize(
    "options", [{"threshold": 1.01}, {"threshold": -0.1}, {"margin": 2}, {"capacity": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        cache(**options)


def test_an_encoder_without_direction_is_refused():
    store = sc.SemanticCache(lambda _text: np.zeros(2), 2, threshold=0.5)
    with pytest.raises(ValueError, match="no direction"):
        store.put("x", "y")


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "invalidate", "get"]), st.integers(0, 60)), max_size=250
    )
)
def test_many_changes_agree_with_a_naive_cache(steps):
    store = cache(threshold=0.5, capacity=1000)
    naive = {}
    for number, (step, place) in enumerate(steps):
        text = str(place / 20)
        if step == "put":
            store.put(text, number)
            naive[text] = number
        elif step == "invalidate":
            assert store.invalidate(text) == (text in naive)
            naive.pop(text, None)
        else:
            asked = str(place / 20 + 0.004)
            close = [(float(by_angle(asked) @ by_angle(text)), text) for text in naive]
            found = store.get(asked)
            if not close or max(close)[0] < 0.5:
                assert not found.hit
            else:
                assert found.value == naive[max(close)[1]]
    assert len(store) == len(naive)


def test_threads_may_share_a_cache():
    store = cache(threshold=0.999, capacity=50)
    failures = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(200):
                text = f"{rng.random() * 3:.3f}"
                found = store.get(text)
                if found.hit and abs(float(found.text) - float(text)) > 0.05:
                    failures.append((text, found))
                store.put(text, text)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(store) == 50


# --- guards ---------------------------------------------------------------------------------------


def test_a_guard_steps_over_the_nearest_entry():
    store = cache(guards={"not zero": lambda _asked, stored: stored != "0"})
    store.put("0", "a")
    store.put("0.2", "b")
    assert store.get("0.01").value == "b"
    assert store.stats.refused == {"not zero": 1}


def test_the_margin_refuses_two_answers_that_are_equally_near():
    store = cache(margin=0.01)
    store.put("0", "a")
    store.put("0.2", "b")
    assert not store.get("0.1").hit
    assert store.get("0.02").value == "a"


def test_the_margin_does_not_mind_two_entries_with_one_answer():
    store = cache(margin=0.01)
    store.put("0", "a")
    store.put("0.2", "a")
    assert store.get("0.1").value == "a"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("raise it from 300 to 1,000 euros", [300, 1000]),
        ("version 3.12 of 2 packages", [2, 3.12]),
        ("files over 100MB", [100]),
        ("five hundred euros and two cards", [2, 500]),
        ("one hundred and fifty", [150]),
        ("twenty five", [25]),
        ("which one is it", []),
    ],
)
def test_numbers_are_read_in_digits_and_words(text, numbers):
    assert guards.numbers(text) == numbers


@pytest.mark.parametrize(
    ("guard", "asked", "stored", "same"),
    [
        ("numbers", "How much is 10 dollars?", "How much is 100 dollars?", False),
        ("numbers", "what do ten dollars buy", "What do 10 dollars buy?", True),
        ("names", "Do I need a visa for Japan?", "Do I need a visa for Canada?", False),
        ("names", "visa japan needed", "Do I need a visa for Japan?", True),
        ("names", "A train from Porto to Faro?", "A train from Faro to Porto?", False),
        ("names", "To Porto from Faro by train?", "A train from Faro to Porto?", True),
        ("polarity", "Is it not safe?", "Is it safe?", False),
        ("polarity", "Is it unsafe?", "Is it safe?", False),
        ("polarity", "Why doesn't it start?", "Why does it start?", False),
        ("polarity", "Sort in descending order", "Sort in ascending order", False),
        ("polarity", "How do I begin a claim?", "How do I start a claim?", True),
    ],
)
def test_guards_tell_near_misses_from_paraphrases(guard, asked, stored, same):
    assert guards.GUARDS[guard](asked, stored) is same
    assert guards.GUARDS[guard](stored, asked) is same


# --- the learned bound ----------------------------------------------------------------------------


def test_the_error_limit_is_clopper_and_pearsons():
    assert sc.error_limit(0, 10, 0.05) == pytest.approx(1 - 0.05**0.1, abs=1e-12)
    assert sc.error_limit(0, 0, 0.05) == 1
    assert sc.error_limit(3, 3, 0.05) == 1


def test_an_entry_that_is_never_wrong_becomes_trusted():
    bound = sc.ErrorBound(0.05)
    assert bound.trust(7, 0.9) < 0.05
    for _ in range(200):
        bound.observe(7, 0.9, True)
    assert bound.trust(7, 0.9) == 1
    assert bound.trust(7, 0.6) < 0.06


def test_a_forgotten_entry_is_trusted_no_more():
    bound = sc.ErrorBound(0.05)
    for _ in range(200):
        bound.observe(7, 0.9, True)
    bound.forget(7)
    assert bound.trust(7, 0.9) < 0.05


@pytest.mark.parametrize("delta", [0.01, 0.05])
@pytest.mark.parametrize("wrong", [0.0, 0.02, 0.3, 1.0])
def test_errors_per_request_stay_below_delta(delta, wrong):
    rng = random.Random(3)
    bound = sc.ErrorBound(delta, seed=4)
    requests, errors = 6000, 0
    for _ in range(requests):
        correct = rng.random() >= wrong
        if bound.admits(1, 0.85):
            errors += not correct
        else:
            bound.observe(1, 0.85, correct)
    spread = 3 * (delta * (1 - delta) / requests) ** 0.5
    assert errors / requests <= delta + spread


def test_only_generated_answers_teach():
    bound = sc.ErrorBound(0.5, seed=0)
    store = cache(threshold=0.5, bound=bound)
    number = store.put("0", "a")
    served = sc.Lookup("a", "semantic", 0.9, number, "0")
    store.learn(served, False)
    assert bound.trust(number, 0.9) == pytest.approx(0.45)
    store.learn(sc.Lookup(similarity=0.9, entry=number, text="0"), True)
    assert bound.trust(number, 0.9) > 0.45


@pytest.mark.parametrize("delta", [0, 1, -1])
def test_an_impossible_delta_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        sc.ErrorBound(delta)


# --- score scales ---------------------------------------------------------------------------------


@given(st.floats(-1, 1), st.floats(0, 1), st.sampled_from(list(similarity.HITS)))
def test_every_rule_is_a_cosine_threshold_in_disguise(cosine, threshold, rule):
    asked = similarity.cosine_asked(rule, threshold)
    if abs(cosine - asked) > 1e-9:
        hit = similarity.HITS[rule](similarity.squared_l2(cosine), threshold)
        assert bool(hit) is (cosine > asked)


@pytest.mark.parametrize(
    ("rule", "cosine"), [("cosine", 0.8), ("l2_snippet", 0.9), ("gptcache", 0.6)]
)
def test_a_threshold_of_80_means_three_cosines(rule, cosine):
    assert similarity.cosine_asked(rule, 0.8) == pytest.approx(cosine)


def test_faiss_returns_squared_distances():
    import faiss

    index = faiss.IndexFlatL2(2)
    index.add(towards(0)[None, :])
    distance = index.search(towards(0.5)[None, :], 1)[0][0, 0]
    assert similarity.cosine_of_squared_l2(distance) == pytest.approx(np.cos(0.5), abs=1e-6)


@pytest.mark.parametrize("threshold", [-0.01, 1.01])
def test_a_threshold_outside_zero_to_one_is_refused(threshold):
    with pytest.raises(ValueError, match="within"):
        similarity.cosine_asked("cosine", threshold)


# --- statistics -----------------------------------------------------------------------------------


def test_auc_of_separated_equal_and_swapped_scores():
    assert _decisions.auc([0.9, 0.8], [0.1, 0.2]) == 1
    assert _decisions.auc([0.5], [0.5]) == 0.5
    assert _decisions.auc([0.1, 0.6], [0.5]) == 0.5


def test_the_auc_interval_agrees_with_the_plain_auc():
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(1, 1, 80), rng.normal(0, 1, 60)
    groups = np.arange(80) // 4, np.arange(60) // 3
    middle, low, high = _decisions.auc_interval(positive, groups[0], negative, groups[1], 500, 1)
    assert middle == pytest.approx(_decisions.auc(positive, negative))
    assert low < middle < high


def test_rates_of_a_small_example():
    # 10 questions, 4 hits of which 3 are right, 6 that a perfect cache answers.
    rates = _decisions.rates(np.array([10, 4, 3, 6]))
    assert rates["precision"] == 0.75
    assert rates["recall"] == 0.5
    assert rates["false_hit_rate"] == 0.1
    assert rates["f05"] == pytest.approx(1.25 * 0.75 * 0.5 / (0.25 * 0.75 + 0.5))


def test_equal_f05_takes_the_strictest_threshold():
    assert _decisions.best_threshold(np.array([0.5, 0.6, 0.7]), np.array([0.2, 0.9, 0.9])) == 0.7


def test_precision_at_a_prevalence_of_near_misses():
    assert _decisions.precision_at(0.0, (0.8, 0.0), 1.0) == 1
    assert _decisions.precision_at(1.0, (0.8, 0.0), 1.0) == 0
    assert _decisions.precision_at(0.2, (0.5, 0.0), 0.5) == pytest.approx(0.8)


# --- the study ------------------------------------------------------------------------------------


class WordEncoder:
    """Stands for the sentence encoder: a bag of hashed words, cut off after 256."""

    source, dimension, max_tokens = "words", 64, 256

    def __init__(self, *_arguments):
        pass

    def encode(self, texts, normalise=True, side_by_side=False):
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower())[:200]:
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalise else vectors

    def __call__(self, text):
        return self.encode([text])[0]

    def fits(self, text):
        return len(re.findall(r"\w+", text)) <= 200


def defaults():
    return {name: p["default"] for name, p in semantic.STUDY.options["properties"].items()}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbench.caching.encoder.SentenceEncoder", WordEncoder)
        found = study_runs.records(
            "semantic",
            tmp_path_factory.mktemp("semantic"),
            seed=1,
            languages=["en"],
            bootstrap=100,
            stream_requests=600,
            index_entries=[400],
        )
    return pd.DataFrame([row for one in found.values() for row in semantic.aggregate(one)])


@pytest.fixture(scope="module")
def index_record(tmp_path_factory):
    return study_runs.records(
        "semantic",
        tmp_path_factory.mktemp("index"),
        only=lambda name, _: name == "index-400",
        index_entries=[400],
    )["index-400"]


def test_the_guides_pair_is_judged_by_the_guides_rule(table):
    row = table[table["part"] == "guide"].iloc[0]
    assert row["threshold"] == 0.9 and row["cosine_asked"] == pytest.approx(0.95)
    assert row["squared_distance"] == pytest.approx(2 * (1 - row["cosine"]))
    # "What is AI?" and "Can you explain AI?" share one word of six.
    assert row["hits"] == 0
    values = semantic.STUDY.values(table)
    assert values["semantic_guide_pair_hit"].value == 0
    assert values["semantic_at_90_l2_snippet_cosine"].value == pytest.approx(0.95)


def test_every_language_with_a_file_has_a_cell_and_values_of_its_own(tmp_path, monkeypatch):
    portuguese = tmp_path / "intents.pt.jsonl"
    portuguese.write_bytes(paraphrases.DEFAULT.read_bytes())
    monkeypatch.setattr(paraphrases, "files", lambda: {"en": paraphrases.DEFAULT, "pt": portuguese})
    cells = semantic.STUDY.plan(study_runs.options("semantic", index_entries=[400]))
    assert set(cells) == {"decisions", "decisions-pt", "index-400"}
    assert cells["decisions-pt"].factors["language"] == "pt"
    assert Path(cells["decisions-pt"].factors["paraphrases"]).name == portuguese.name


def test_a_language_without_a_file_has_no_cell(monkeypatch):
    monkeypatch.setattr(paraphrases, "files", lambda: {"en": paraphrases.DEFAULT})
    assert "decisions-pt" not in semantic.STUDY.plan(study_runs.options("semantic"))


def test_values_keep_languages_apart(table):
    other = table.assign(language="pt")
    other.loc[other["part"] == "policy", "recall"] = 0.125
    values = semantic.STUDY.values(pd.concat([table, other]))
    assert values["semantic_pt_static_recall"].value == 12.5
    assert (
        values["semantic_static_recall"] == semantic.STUDY.values(table)["semantic_static_recall"]
    )
    assert semantic.STUDY.values(table)["semantic_pt_static_recall"].value is None


def test_rows_of_a_record_without_a_language_are_english():
    assert semantic.aggregate({"rows": [{"part": "auc"}]}) == [{"part": "auc", "language": "en"}]


def sweep(table, **wanted):
    rows = table[(table["part"] == "threshold") & (table["half"] == "report")]
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows.sort_values("threshold")


def test_every_column_of_the_rows_is_described(table):
    assert set(table.columns) <= set(semantic.STUDY.columns)


def test_hits_never_grow_with_the_threshold(table):
    for score in ("cosine", "l2_snippet", "gptcache", "l2_unnormalised"):
        hits = sweep(table, score=score, query_class="all")["hits"].to_numpy()
        assert len(hits) == 50
        assert (np.diff(hits) <= 0).all()


def test_hits_on_what_was_never_cached_are_all_false(table):
    for name in ("never_cached", "near_miss", "follow_up", "long"):
        assert (sweep(table, score="cosine", query_class=name)["correct_hits"] == 0).all()


def test_exact_repeats_hit_at_every_threshold(table):
    rows = sweep(table, score="cosine", query_class="exact")
    assert (rows["recall"] == 1).all()


def test_the_l2_curve_is_the_cosine_curve_after_the_map(table):
    cosine = sweep(table, score="cosine", query_class="all").set_index("threshold")["hits"]
    snippet = sweep(table, score="l2_snippet", query_class="all").set_index("threshold")["hits"]
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        # The one rule is strict and the other is not; no cosine of this set lies on the edge
        # by more than rounding.
        assert snippet[threshold] == cosine[round(1 - (1 - threshold) / 2, 2)]


def test_context_takes_away_the_false_hits_of_follow_ups_and_long_texts(table):
    policies = table[table["part"] == "policy"].set_index(["policy", "query_class"])
    for name in ("follow_up", "long"):
        assert policies.loc[("static", name), "hit_ratio"] == 1
        assert policies.loc[("context", name), "hit_ratio"] == 0


def test_thresholds_are_tuned_on_one_half_and_reported_on_the_other(table):
    policies = table[table["part"] == "policy"]
    assert set(policies["half"]) == {"report"}
    for threshold in policies["threshold"]:
        assert 0.5 <= threshold <= 0.99


def test_learned_thresholds_keep_their_bound(table):
    learned = table[(table["part"] == "stream") & table["delta"].notna()]
    assert len(learned) == 4
    assert (learned["false_hit_rate_ci_low"] <= learned["delta"]).all()


def test_break_even_is_lookup_over_service_time(table):
    lookup = table[table["step"] == "lookup"]["p50_s"].iloc[0]
    rows = table[table["part"] == "break_even"]
    assert (rows["break_even_hit_ratio"] * rows["service_s"]).to_numpy() == pytest.approx(lookup)


def test_every_index_is_asked_the_same_vectors_in_rounds(index_record):
    arms = index_record["samples"]["arms"]
    turns = {name: len(arm["round"]) for name, arm in arms.items()}
    assert turns == dict.fromkeys([*semantic.INDEXES, "control-flat"], 40)
    assert sorted(slot for arm in arms.values() for slot in arm["slot"]) == list(range(160))
    # What flat finds in a round is what the others are measured by.
    row = next(row for row in index_record["rows"] if row["index"] == "sq8")
    same = np.equal(arms["sq8"]["found"], arms["flat"]["found"]).mean()
    assert row["recall_at_1"] == same


def test_a_search_is_compared_with_that_of_flat_within_rounds(index_record):
    # The machine is slowed down threefold between the first round and the last.
    weather = np.linspace(1, 3, 40)
    arms = index_record["samples"]["arms"]
    paces = {"flat": 1.0, "control-flat": 1.0, "hnsw": 0.5, "sq8": 2.0}
    drifting = {
        name: arm
        | {"seconds": list(paces[name] * weather[arm["round"]]), "disturbed": [False] * 40}
        for name, arm in arms.items()
    }
    rows = semantic.aggregate(index_record | {"samples": {"arms": drifting}})
    ratios = {row["index"]: row.get("search_ratio") for row in rows}
    assert "search_ratio" not in rows[0]
    for name in ("hnsw", "sq8"):
        assert ratios[name] == pytest.approx(paces[name] / paces["flat"])
    assert rows[1]["search_ratio_rounds"] == 40
    assert rows[1]["search_ratio_control_ratio"] == pytest.approx(1)


@pytest.mark.parametrize(("ends", "said"), [((0.9, 1.1), True), ((0.5, 0.7), False)])
def test_the_figure_says_which_index_is_not_told_apart_from_flat(table, ends, said):
    rows = table.assign(machine="here", search_ratio_ci_low=np.nan, search_ratio_ci_high=np.nan)
    approximate = rows["index"].isin(["hnsw", "sq8"])
    for end, value in zip(("low", "high"), ends, strict=True):
        rows.loc[approximate, f"search_ratio_ci_{end}"] = value
    figure = app_semantic_index.draw(rows)
    assert set(_language.localise(figure, "pt")) <= {"HNSW"}
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert ("não se distingue do exato" in legend) is said
    plt.close(figure)


def test_an_index_of_a_record_without_rounds_has_no_ratio(index_record):
    old = index_record | {"samples": {name: [0.1] for name in semantic.INDEXES}}
    assert all("search_ratio" not in row for row in semantic.aggregate(old))


def test_the_flat_index_is_exact_and_pays_four_bytes_a_number(table):
    rows = table[table["part"] == "index"].set_index("index")
    assert rows.loc["flat", "recall_at_1"] == 1
    assert rows.loc["flat", "bytes_per_entry"] >= 4 * 384
    assert rows.loc["sq8", "bytes_per_entry"] < rows.loc["flat", "bytes_per_entry"] / 3


def test_intervals_contain_their_estimate(table):
    rows = sweep(table, score="cosine", query_class="all")
    for rate in ("recall", "false_hit_rate", "hit_ratio"):
        assert (rows[f"{rate}_ci_low"] <= rows[rate]).all()
        assert (rows[rate] <= rows[f"{rate}_ci_high"]).all()


def test_values_come_from_the_table(table):
    values = semantic.STUDY.values(table)
    row = table[
        (table["part"] == "policy")
        & (table["policy"] == "static")
        & (table["query_class"] == "all")
    ].iloc[0]
    assert values["semantic_static_precision"].value == pytest.approx(100 * row["precision"])
    assert values["semantic_at_80_l2_snippet_cosine"].value == pytest.approx(0.9)
    assert all(name.startswith("semantic_") for name in values)


def test_values_of_an_empty_table_are_missing_and_have_the_same_names(table):
    empty = semantic.STUDY.values(table.iloc[:0])
    assert set(empty) == set(semantic.STUDY.values(table))
    assert empty["semantic_static_precision"].value is None


@pytest.mark.parametrize(
    "change",
    [{"lowest_threshold": 1.2}, {"deltas": [1]}, {"index_entries": [0]}, {"unknown": 1}],
)
def test_options_outside_their_bounds_are_refused(change):
    jsonschema.validate(defaults(), semantic.STUDY.options)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(defaults() | change, semantic.STUDY.options)


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_paragraph_renders_with_and_without_numbers(table, language):
    for rows in (table, table.iloc[:0]):
        values = semantic.STUDY.values(rows)
        text = sections.study_tex("semantic", values, language, PAPER.parent)
        assert text.startswith("\\subsection{")
        assert "\\label{sec:semantic}" in text
        for shown in (
            text,
            sections.study_tex("semantic", values, language, PAPER.parent, "tables"),
        ):
            assert "Value(" not in shown
            assert shown.count("\\begin{") == shown.count("\\end{")
