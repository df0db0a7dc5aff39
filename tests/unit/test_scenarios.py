"""The shipped scenarios, and what is said about wrong ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from kvbench.errors import InputError
from kvbench.inputs import scenarios

FOLDER = Path(__file__).resolve().parents[2] / "config" / "scenarios"
CONVERSATIONS = {
    "insurance_claim_auto": "SecuraVida Insurance",
    "insurance_policy_update": "SecuraVida Insurance",
    "insurance_life_beneficiary": "SecuraVida Insurance",
    "banking_open_account": "Banco Digital Plus",
    "banking_loan_application": "Banco Digital Plus",
    "ecommerce_support": "MegaStore Online",
}
GOOD = {
    "id": "talk",
    "kind": "conversation",
    "title": "Talk",
    "domain": "test",
    "company": "Acme",
    "language": "en",
    "system": "You are Acme's assistant.",
    "turns": [
        {"user": "Hello?", "reference": "Good morning."},
        {"user": "Thanks.", "reference": "You are welcome."},
    ],
}
FIXED = {
    "id": "talk",
    "kind": "fixed",
    "title": "Fixed",
    "seed": 1,
    "steps": [{"prompt_tokens": 8, "new_tokens": 4}],
}


@pytest.fixture(scope="module")
def shipped():
    return scenarios.load_all(FOLDER)


@pytest.fixture
def write(tmp_path):
    def write(document: object, name: str = "talk.yaml") -> Path:
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
        return path

    return write


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        scenarios.load(path)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text


# What ships -----------------------------------------------------------------------------------


def test_the_six_conversations_ship_with_their_companies(shipped):
    found = {s.id: s.company for s in shipped.values() if s.kind == "conversation"}
    assert {name: found[name] for name in CONVERSATIONS} == CONVERSATIONS


@pytest.mark.parametrize("name", sorted(CONVERSATIONS))
def test_a_conversation_has_fifteen_different_questions(shipped, name):
    questions = [turn.user for turn in shipped[name].turns]
    assert len(questions) == len(set(questions)) == 15


@pytest.mark.parametrize("name", sorted(CONVERSATIONS))
def test_reference_replies_have_forty_to_ninety_words(shipped, name):
    lengths = [len(turn.reference.split()) for turn in shipped[name].turns]
    assert min(lengths) >= 40
    assert max(lengths) <= 90


@pytest.mark.parametrize("name", sorted(CONVERSATIONS))
def test_a_system_prompt_names_the_company_and_gives_five_rules(shipped, name):
    scenario = shipped[name]
    rules = re.findall(r"^\s*(?:\d+[.)]|[-*])\s+\S", scenario.system, re.MULTILINE)
    assert len(rules) == 5
    assert scenario.company in scenario.system


def test_no_reply_is_used_twice(shipped):
    ours = [turn.reference for name in CONVERSATIONS for turn in shipped[name].turns]
    replies = [turn.reference for scenario in shipped.values() for turn in scenario.turns]
    assert len(ours) == 90
    assert len(set(replies)) == len(replies)


def test_the_symposium_turn_has_the_published_lengths(shipped):
    (step,) = shipped["symposium_turn"].steps
    assert (step.prompt_tokens, step.new_tokens) == (152, 150)


def test_the_context_doubles_from_256_to_8192_tokens(shipped):
    steps = shipped["context_growth"].steps
    assert [step.prompt_tokens for step in steps] == [256, 512, 1024, 2048, 4096, 8192]
    assert {step.new_tokens for step in steps} == {16}


# What is refused ------------------------------------------------------------------------------


def test_a_good_scenario_is_read_with_its_length(write):
    scenario = scenarios.load(write(GOOD))
    assert scenario.length == 2
    assert scenario.turns[1].user == "Thanks."


@pytest.mark.parametrize("user", ["", "   \n", None])
def test_an_empty_turn_is_named_by_its_number(write, user):
    turns = [GOOD["turns"][0], {"user": user, "reference": "Yes."}]
    text = refused(write(GOOD | {"turns": turns}))
    assert "turns[1].user is empty; every turn needs a question" in text


def test_an_id_unlike_the_files_name_is_refused(write):
    text = refused(write(GOOD, "chat.yaml"))
    assert "'talk'" in text
    assert "chat.yaml" in text


def test_a_file_that_the_rules_would_not_find_is_refused(write, tmp_path):
    write(GOOD, "talk.yml")
    with pytest.raises(InputError, match=r"talk\.yml: ends in \.yml; rename it to talk\.yaml"):
        scenarios.load_all(tmp_path)


def test_malformed_yaml_is_one_line(write):
    assert "not valid YAML at line" in refused(write("id: talk\nkind: [fixed\ntitle: x\n"))


def test_an_empty_file_is_one_line(write):
    assert "mapping" in refused(write(""))


def test_a_misspelt_key_is_named(write):
    document = {key: value for key, value in GOOD.items() if key != "system"}
    assert "sytem" in refused(write(document | {"sytem": "You are Acme's assistant."}))


def test_a_misspelt_key_of_a_turn_is_named(write):
    turns = [{"user": "Hello?", "referense": "Good morning."}]
    assert "turns[0]" in refused(write(GOOD | {"turns": turns}))


@pytest.mark.parametrize("turns", [5, "Hello?", [5], {}])
def test_turns_of_a_wrong_type_are_named(write, turns):
    assert "turns" in refused(write(GOOD | {"turns": turns}))


@pytest.mark.parametrize("key", ["prompt_tokens", "new_tokens"])
@pytest.mark.parametrize("count", [0, -3, "8", 1.5])
def test_a_count_that_is_no_positive_number_is_named(write, key, count):
    steps = [FIXED["steps"][0] | {key: count}]
    text = refused(write(FIXED | {"steps": steps}))
    assert f"steps[0].{key}" in text


def test_a_single_new_token_is_refused_since_tpot_needs_a_gap(write):
    steps = [{"prompt_tokens": 8, "new_tokens": 1}]
    assert "at least 2" in refused(write(FIXED | {"steps": steps}))


def test_an_unknown_kind_is_refused_with_the_known_ones(write):
    text = refused(write(GOOD | {"kind": "chat"}))
    assert "conversation" in text
    assert "fixed" in text


def test_a_folder_without_scenarios_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no scenario"):
        scenarios.load_all(tmp_path)


# Texts are data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\ud800", "holds half a surrogate pair (U+D800)"),
        ("Hello\x07", "holds the control character U+0007"),
        ("\u200b\u200d \ufeff", "shows no character"),
    ],
)
def test_a_text_that_no_model_can_read_names_its_key(tmp_path, text, told):
    path = tmp_path / "talk.yaml"
    turns = [GOOD["turns"][0], {"user": text, "reference": "Good."}]
    path.write_text(json.dumps(GOOD | {"turns": turns}))
    assert f"{path}: turns[1].user {told}" in refused(path)


@pytest.mark.parametrize("text", ["REPLY-STANDS-HERE", "{{ 7 * 7 }} {% raw %}", "Olá\nçé 🙂"])
def test_a_text_is_kept_as_it_was_typed(write, text):
    turns = [{"user": text, "reference": "Good."}]
    assert scenarios.load(write(GOOD | {"turns": turns})).turns[0].user == text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2**200}, "seed is"),
        ({"steps": [{"prompt_tokens": 152.0, "new_tokens": 4}]}, "steps[0].prompt_tokens is 152.0"),
        ({"steps": FIXED["steps"] * 2}, "steps"),
    ],
)
def test_fixed_lengths_that_cannot_be_meant_are_refused(write, change, told):
    assert told in refused(write(FIXED | change))


def test_a_key_that_stands_twice_is_refused(write):
    assert "the key 'title' stands twice" in refused(write(yaml.safe_dump(GOOD) + "title: Again\n"))
