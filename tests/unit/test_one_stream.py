"""The study of all caches on one stream: the stream itself, and what each strategy serves."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import study_runs
from kvbench.caching import paraphrases
from kvbench.errors import Unsupported
from kvbench.paper import sections
from kvbench.studies import Context, control_of, one_stream
from kvbench.studies.measuring import one_stream as measuring

PAPER = Path(__file__).parents[2] / "paper" / "studies"
MIX = {"repeats": 0.3, "paraphrases": 0.3, "near_misses": 0.1}


class Words:
    """Stands for the sentence encoder: a bag of hashed words."""

    dimension = 64

    def __init__(self, *_arguments):
        pass

    def __call__(self, text):
        vector = np.zeros(self.dimension, dtype=np.float32)
        for word in re.findall(r"\w+", text.lower()):
            vector[zlib.crc32(word.encode()) % self.dimension] += 1
        return vector

    def fits(self, _text):
        return True


class Echo:
    """Stands for the local model: says the question, and counts like a model."""

    def __init__(self, _folder, new_tokens):
        self.new_tokens, self.tokens = new_tokens, 0

    def generate(self, text):
        self.tokens += self.new_tokens
        return f"<{text}>"


def defaults():
    return {name: p["default"] for name, p in one_stream.STUDY.options["properties"].items()}


@pytest.fixture(scope="module")
def texts():
    return paraphrases.load()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("REDIS_URL", raising=False)
        patch.setattr(measuring, "LocalModel", Echo)
        patch.setattr("kvbench.caching.encoder.SentenceEncoder", Words)
        folder = tmp_path_factory.mktemp("stream")
        found = study_runs.records(
            "one_stream", folder, model_dir=folder, requests=250, threshold=0.6, memory_entries=5
        )["r30-p30-n10"]
    return pd.DataFrame(one_stream.aggregate(found)), found["samples"]["arms"]


@pytest.fixture(scope="module")
def strategies(outcome):
    table = outcome[0]
    rows = table[table["part"] == "strategy"].drop_duplicates("strategy")
    return rows.set_index("strategy")


# --- the stream -----------------------------------------------------------------------------------


def test_the_stream_depends_on_the_seed_only(texts):
    first = measuring.stream(texts, 100, MIX, seed=5)
    assert first == measuring.stream(texts, 100, MIX, seed=5)
    assert first != measuring.stream(texts, 100, MIX, seed=6)


def test_the_stream_keeps_the_shares_that_were_asked_for(texts):
    kinds = [asked.kind for asked in measuring.stream(texts, 250, MIX, seed=5)]
    for kind, share in (("repeat", 0.3), ("paraphrase", 0.3), ("near_miss", 0.1), ("new", 0.3)):
        # Three standard deviations; near misses and paraphrases need an intent asked before.
        assert kinds.count(kind) / 250 == pytest.approx(share, abs=0.09)


def test_a_repeat_repeats_and_everything_else_is_asked_for_the_first_time(texts):
    seen = {}
    for asked in measuring.stream(texts, 250, MIX, seed=5):
        assert (asked.text in seen) == (asked.kind == "repeat")
        assert seen.setdefault(asked.text, asked.answer) == asked.answer


def test_a_paraphrase_belongs_to_a_question_asked_before(texts):
    answers = set()
    for asked in measuring.stream(texts, 250, MIX, seed=5):
        assert (asked.answer in answers) == (asked.kind in ("paraphrase", "repeat"))
        answers.add(asked.answer)


def test_only_the_report_half_is_asked(texts):
    halves = {text.text: text.half for text in texts.texts}
    asked = measuring.stream(texts, 250, MIX, seed=5)
    assert {halves[request.text] for request in asked} == {"report"}


def test_a_stream_without_repetition_has_only_new_questions(texts):
    none = {"repeats": 0, "paraphrases": 0, "near_misses": 0}
    asked = measuring.stream(texts, 100, none, seed=5)
    assert {request.kind for request in asked} == {"new"}
    assert len({request.text for request in asked}) == 100


def test_a_stream_longer_than_the_set_goes_on_with_repeats(texts):
    none = {"repeats": 0, "paraphrases": 0, "near_misses": 0}
    asked = measuring.stream(texts, 300, none, seed=5)
    assert asked[-1].kind == "repeat"


# --- the strategies -------------------------------------------------------------------------------


def test_without_a_cache_the_model_answers_everything(strategies):
    assert strategies.loc["none", "model_answers"] == 250
    assert strategies.loc["none", "tokens_generated"] == 250 * 16


def test_exact_hits_are_the_repeats_and_never_wrong(strategies):
    for name in ("exact", "layered"):
        row = strategies.loc[name]
        assert row["model_answers"] == 250 - row["repeat_requests"]
        assert row["wrong_answers"] == 0


def test_both_levels_of_layered_answer(strategies):
    row = strategies.loc["layered"]
    assert row["memory_answers"] > 0
    assert row["server_answers"] > 0
    assert row["memory_answers"] + row["server_answers"] == row["repeat_requests"]


def test_exact_caches_hold_one_entry_per_different_question(strategies):
    for name in ("exact", "layered"):
        row = strategies.loc[name]
        assert row["cache_entries"] == 250 - row["repeat_requests"]
        assert row["cache_bytes"] > 64 * row["cache_entries"]


def test_semantic_hits_spare_tokens_and_their_errors_are_counted(strategies, outcome):
    row = strategies.loc["exact_semantic"]
    assert row["semantic_answers"] > 0
    assert row["tokens_generated"] < strategies.loc["exact", "tokens_generated"]
    found = outcome[1]["exact_semantic"]
    assert row["wrong_answers"] == found["right"].count(False)
    answers = zip(found["kind"], found["right"], strict=True)
    wrong_kinds = {kind for kind, right in answers if not right}
    assert wrong_kinds <= {"semantic"}


def test_every_answer_is_counted_once(strategies):
    total = sum(strategies[f"{kind}_answers"] for kind in one_stream.KINDS)
    assert (total == 250).all()
    generated = strategies["model_answers"] * 16
    assert (generated == strategies["tokens_generated"]).all()


def test_a_near_miss_that_is_served_the_question_it_resembles_is_wrong():
    class Alike:
        def get(self, _text):
            return one_stream_lookup

    one_stream_lookup = type("Found", (), {"hit": True, "value": ("text", "a")})()
    cache = measuring.ResponseCache(measuring.MemoryBackend(5))
    serve = measuring._exact_semantic(cache, Alike(), lambda _asked: pytest.fail("generated"))
    served = serve(measuring.Asked("near", "a/number", "near_miss"))
    assert (served.kind, served.answer) == ("semantic", "a")
    # A wrong semantic answer does not become an exact one.
    assert cache.stats.stored == 0


def test_without_a_model_the_cell_is_unsupported(tmp_path):
    cell = one_stream.STUDY.plan(defaults())["r30-p30-n10"]
    with pytest.raises(Unsupported, match="no local model"):
        one_stream.STUDY.measure(cell.factors, Context(tmp_path, 1))


def test_a_folder_without_a_model_is_unsupported(tmp_path):
    with pytest.raises(Unsupported, match="cannot be loaded"):
        measuring.LocalModel(tmp_path, 4)


# --- plan, columns, values ------------------------------------------------------------------------


def test_all_strategies_answer_in_one_cell_beside_the_model_alone():
    options = defaults() | {"strategies": ["layered", "exact"]}
    cells = one_stream.STUDY.plan(options)
    assert {name: cell.factors["strategies"] for name, cell in cells.items()} == {
        "r30-p30-n10": ["none", "layered", "exact"]
    }


def test_every_request_is_answered_by_all_before_the_next_one_comes(outcome):
    arms = dict(outcome[1])
    control = arms.pop(control_of("none"))
    assert set(arms) == set(one_stream.STRATEGIES)
    for arm in arms.values():
        assert arm["round"] == list(range(250))
    orders = {tuple(np.argsort([arm["slot"][n] for arm in arms.values()])) for n in range(250)}
    assert len(orders) == 24
    for number, slot in zip(control["round"], control["slot"], strict=True):
        of_round = [slot, *(arm["slot"][number] for arm in arms.values())]
        assert max(of_round) - min(of_round) == 4


def test_the_model_alone_answers_a_third_of_the_requests_a_second_time_evenly_spread(outcome):
    control = outcome[1][control_of("none")]
    assert len(control["round"]) == 250 // 3
    assert set(np.diff(control["round"])) <= {3, 4}
    assert set(control["kind"]) == {"model"}


def steady(hit_s, drift):
    """A record in which the machine's speed drifts and hits take ``hit_s``: 2 of 5 requests."""
    kinds = ["exact", "model", "model", "exact", "model"] * 10
    arms = {
        "none": {"round": range(50), "seconds": list(drift), "kind": ["model"] * 50},
        "exact": {
            "round": range(50),
            "seconds": [hit_s if k == "exact" else d for k, d in zip(kinds, drift, strict=True)],
            "kind": kinds,
        },
    }
    rows = [{"part": "strategy", "strategy": name, "mix": "m"} for name in arms]
    return {"rows": rows, "samples": {"arms": arms}}


def test_no_drift_makes_a_cache_look_faster_than_its_hits_allow():
    """A machine that speeds up twofold along the way: the model alone meets the same."""
    drift = np.linspace(0.12, 0.06, 50)
    _, row = one_stream.aggregate(steady(1e-5, drift))
    assert row["speedup"] == pytest.approx(1 / 0.6, rel=0.02)
    assert row["speedup_ci_low"] <= row["speedup_limit"] * (1 + 1e-6)


def test_a_record_of_strategies_one_after_the_other_tells_no_speedup():
    row = {"part": "strategy", "strategy": "exact", "mix": "m", "place": "local", "mean_s": 0.06}
    found = one_stream.aggregate({"rows": [row], "samples": {"exact": {}}})
    assert found == [{"part": "strategy", "strategy": "exact", "mix": "m", "mean_s": 0.06}]


def test_every_column_of_the_rows_is_described(outcome):
    assert set(outcome[0].columns) <= set(one_stream.STUDY.columns)


def test_values_come_from_the_table(outcome, strategies):
    values = one_stream.STUDY.values(outcome[0])
    row = strategies.loc["exact_semantic"]
    assert values["one_stream_exact_semantic_wrong_answers"].value == row["wrong_answers"]
    assert values["one_stream_exact_hit_ratio"].value == pytest.approx(
        100 * strategies.loc["exact", "hit_ratio"]
    )
    assert values["one_stream_layered_speedup"].value == pytest.approx(
        strategies.loc["layered", "speedup"]
    )


def test_values_of_an_empty_table_are_missing_and_have_the_same_names(outcome):
    empty = one_stream.STUDY.values(pd.DataFrame())
    assert set(empty) == set(one_stream.STUDY.values(outcome[0]))
    assert all(value.value is None for value in empty.values())


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": -0.1},
        {"strategies": ["prefix"]},
        {"mixes": [{"repeats": 0.3}]},
        {"memory_entries": 0},
    ],
)
def test_options_outside_their_bounds_are_refused(change):
    jsonschema.validate(defaults(), one_stream.STUDY.options)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(defaults() | change, one_stream.STUDY.options)


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_paragraph_renders_with_and_without_numbers(outcome, language):
    for rows in (outcome[0], outcome[0].iloc[:0]):
        values = one_stream.STUDY.values(rows)
        text = sections.study_tex("one_stream", values, language, PAPER.parent)
        assert text.startswith("\\subsection{")
        assert "\\label{sec:one_stream}" in text
        for shown in (
            text,
            sections.study_tex("one_stream", values, language, PAPER.parent, "tables"),
        ):
            assert "Value(" not in shown
            assert shown.count("\\begin{") == shown.count("\\end{")
