"""The study of shared prefixes: same tokens, the savings and bytes that the lengths predict."""

from __future__ import annotations

import jsonschema
import pandas as pd
import pytest
import study_runs
from kvbench import studies
from kvbench.errors import InputError, Unsupported
from kvbench.figures import app_prefix
from kvbench.studies import control_of
from kvbench.studies.prefix import WAYS

#: The ways of the library; those of vLLM are tested where its engine is.
LIBRARY = [way for way in WAYS if not way.startswith("vllm")]
SERVING = {
    "ways": LIBRARY,
    "system_tokens": 40,
    "question_tokens": 9,
    "new_tokens": 6,
    "requests": 2,
    "together": 3,
    "block_size": 16,
    "vllm_block_size": 32,
}
TEXT = {
    "scenario": "banking_loan_application",
    "turns": 3,
    "reply_tokens": 16,
    "temperatures": [0, 1.5],
}


@pytest.fixture(scope="module")
def study():
    return studies.get("prefix")


@pytest.fixture(scope="module")
def run(study, tiny_folder, tmp_path_factory):
    """Measure a cell on the tiny model."""

    def run(factors, model_dir=tiny_folder):
        scratch = tmp_path_factory.mktemp("cell")
        return study.measure(factors, studies.Context(scratch, 3, model_dir=model_dir))

    return run


@pytest.fixture(scope="module")
def table(run):
    found = [study_runs.record(run(factors)) for factors in (SERVING, TEXT)]
    rows = pd.DataFrame([row for one in found for row in studies.get("prefix").aggregate(one)])
    rows.insert(0, "machine", "here")
    return rows


@pytest.fixture(scope="module")
def served(table):
    return table[table["part"] == "serving"].set_index("way")


def test_every_way_gives_the_tokens_of_recomputation(served):
    assert served["tokens_equal"].to_dict() == dict.fromkeys(served.index, 1.0)
    assert list(served.index) == ["recompute", "copied", "shared", "paged", "paged_shared"]


def test_the_prompt_tokens_saved_are_those_the_lengths_predict(served):
    assert served["prefill_saved"].tolist() == served["prefill_saved_predicted"].tolist()
    assert served.loc["shared", "reused_tokens"] == 40
    # Whole blocks of 16 only.
    assert served.loc["paged_shared", "reused_tokens"] == 32
    assert served.loc[["recompute", "paged"], "reused_tokens"].tolist() == [0, 0]


def test_the_bytes_of_requests_held_together_are_those_of_the_physics_module(served):
    contiguous = served.loc[["recompute", "copied", "shared"]]
    assert contiguous["held_mib"].tolist() == contiguous["held_mib_predicted"].tolist()


def test_shared_blocks_take_less_memory_and_lent_tensors_do_not(served):
    assert served.loc["paged_shared", "held_mib"] < served.loc["paged", "held_mib"]
    assert served.loc["shared", "held_mib"] > served.loc["recompute", "held_mib"]


def test_without_a_system_prompt_nothing_is_saved(run):
    rows = run(SERVING | {"system_tokens": 0}).rows
    assert {row["way"]: row["prefill_saved"] for row in rows} == dict.fromkeys(
        ("recompute", "copied", "shared", "paged", "paged_shared"), 0
    )
    assert {row["tokens_equal"] for row in rows} == {1.0}


def test_a_prompt_longer_than_the_models_context_is_unsupported(run):
    with pytest.raises(Unsupported, match="context 4096"):
        run(SERVING | {"system_tokens": 5000})


def test_a_model_is_needed(run):
    with pytest.raises(Unsupported, match="no local model"):
        run(SERVING, model_dir=None)


def test_replies_of_random_weights_do_not_survive_being_text(table):
    text = table[table["part"] == "retokenise"]
    assert set(text["temperature"]) == {0, 1.5}
    assert set(text["turn"]) == {2, 3}
    assert (text["surviving_tokens"] <= text["held_tokens"]).all()
    # Random tokens are hardly ever how the tokenizer would write their own text.
    assert text["reply_survives"].mean() < 0.9
    assert (text["surviving"] > 0.3).all()


@pytest.mark.parametrize(
    ("scenario", "why"), [("absent", "no scenario"), ("symposium_turn", "no dialogue")]
)
def test_a_wrong_scenario_is_the_users_error(run, scenario, why):
    with pytest.raises(InputError, match=why):
        run(TEXT | {"scenario": scenario})


def test_the_plan_times_what_is_a_time(study):
    options = {name: entry["default"] for name, entry in study.options["properties"].items()}
    jsonschema.validate(options, study.options)
    cells = study.plan(options)
    assert {name for name, cell in cells.items() if cell.timed} == {
        "system0",
        "system64",
        "system256",
        "system1024",
    }
    assert set(cells) - {"system0", "system64", "system256", "system1024"} == {
        "retokenise-banking_loan_application"
    }


def test_the_table_has_exactly_the_described_columns(study, table):
    # Three questions, of which two count, are too few for an interval.
    ends = {f"ttft_speedup_{name}" for name in ("ci_low", "ci_high", "smallest_difference")}
    ends |= {f"ttft_speedup_control_{name}" for name in ("ci_low", "ci_high")}
    vllm = {"engine_start_s", "engine_compile_s"}
    assert set(table.columns) - {"machine"} == set(study.columns) - ends - vllm


def test_values_describe_the_longest_system_prompt(study, table):
    longer = table[table["part"] == "serving"].assign(system_tokens=80, ttft_p50_s=9.0)
    found = study.values(pd.concat([table, longer]))
    assert found["prefix_system_tokens"].value == 80
    assert found["prefix_shared_ttft_ms"].value == 9000
    assert found["prefix_sampled_temperature"].value == 1.5
    assert all(name.startswith("prefix_") for name in found)


def test_values_of_an_empty_table_are_there_and_empty(study, table):
    found = study.values(pd.DataFrame(columns=["machine", "cell", "status", "reason"]))
    assert set(found) == set(study.values(table))
    assert {value.value for value in found.values()} == {None}


def test_the_figure_draws_all_parts_one_part_and_none(table):
    assert len(app_prefix.draw(table).axes) == 3
    assert len(app_prefix.draw(table[table["part"] == "serving"]).axes) == 3
    empty = app_prefix.draw(table.iloc[:0])
    assert "not been measured" in " ".join(text.get_text() for text in empty.texts)


def test_ways_of_a_kind_answer_a_question_before_the_next_one_comes(run):
    arms = run(SERVING).samples["arms"]
    for ways in (
        ("recompute", "copied", "shared", control_of("recompute")),
        ("paged", "paged_shared", control_of("paged")),
    ):
        slots = [slot for way in ways for slot in arms[way]["slot"]]
        for number in range(3):
            of_round = [arms[way]["slot"][number] for way in ways]
            assert max(of_round) - min(of_round) == len(ways) - 1
        assert len(set(slots)) == 3 * len(ways)


def test_gains_are_paired_by_question_without_the_first(study):
    arms = {
        "recompute": {"round": list(range(12)), "ttft_s": [9.0] + [2.0] * 11},
        "copied": {"round": list(range(12)), "ttft_s": [0.1] + [1.0] * 11},
    }
    rows = [{"part": "serving", "way": way, "system_tokens": 8} for way in arms]
    _, row = study.aggregate({"rows": rows, "samples": {"arms": arms}})
    assert row["ttft_speedup"] == pytest.approx(2) and row["ttft_speedup_rounds"] == 11
    assert row["ttft_speedup_ci_low"] == pytest.approx(2)
