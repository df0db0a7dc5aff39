"""The paraphrase set: what is in it, and what the loader refuses."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from kvbench.caching import paraphrases
from kvbench.errors import InputError

CANONICAL = {
    "id": "a/canonical",
    "intent": "a",
    "domain": "shop",
    "half": "tune",
    "label": "canonical",
    "text": "How long is the warranty?",
}
PARAPHRASE = CANONICAL | {
    "id": "a/short",
    "label": "paraphrase",
    "form": "short",
    "text": "warranty length",
}
FOLLOW_UP = CANONICAL | {
    "id": "f/a",
    "intent": "f",
    "label": "follow_up",
    "context": "The user asked about a lamp.",
    "text": "And in red?",
}


def written(tmp_path, *records):
    path = tmp_path / "intents.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def refusal(tmp_path, *records):
    with pytest.raises(InputError) as error:
        paraphrases.load(written(tmp_path, *records))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def shipped():
    return paraphrases.load()


def test_the_shipped_set_has_the_sizes_its_readme_states(shipped):
    counts = Counter(text.label for text in shipped.texts)
    assert counts == {
        "canonical": 120,
        "paraphrase": 480,
        "near_miss": 360,
        "never_cached": 150,
        "follow_up": 60,
        "long": 20,
    }


def test_every_shipped_intent_has_four_forms_and_three_near_misses(shipped):
    forms, kinds = Counter(), Counter()
    for text in shipped.texts:
        forms[text.intent, text.form] += text.label == "paraphrase"
        kinds[text.intent] += text.label == "near_miss"
    for text in shipped.select("canonical"):
        assert [forms[text.intent, form] for form in paraphrases.FORMS] == [1, 1, 1, 1]
        assert kinds[text.intent] == 3


def test_no_shipped_question_is_written_twice(shipped):
    texts = Counter(text.text for text in shipped.texts if text.label != "follow_up")
    assert [text for text, count in texts.items() if count > 1] == []


def test_both_halves_have_every_domain_and_every_kind(shipped):
    for half in paraphrases.HALVES:
        assert len({text.domain for text in shipped.select("canonical", half)}) == 8
        assert {text.kind for text in shipped.select("near_miss", half)} == set(paraphrases.KINDS)


def test_the_portuguese_half_has_the_sizes_its_readme_states():
    portuguese = paraphrases.load(paraphrases.files()["pt"])
    assert {text.language for text in portuguese.texts} == {"pt"}
    assert Counter(text.label for text in portuguese.texts) == {
        "canonical": 40,
        "paraphrase": 160,
        "near_miss": 120,
        "never_cached": 30,
        "follow_up": 12,
        "long": 4,
    }
    for half in paraphrases.HALVES:
        assert len({text.domain for text in portuguese.select("canonical", half)}) == 8
        near = portuguese.select("near_miss", half)
        assert {text.kind for text in near} == set(paraphrases.KINDS)
    texts = Counter(text.text for text in portuguese.texts if text.label != "follow_up")
    assert [text for text, count in texts.items() if count > 1] == []


def test_a_file_is_in_one_known_language(tmp_path):
    assert "unknown language 'fr'" in refusal(tmp_path, CANONICAL | {"language": "fr"})
    message = refusal(tmp_path, CANONICAL, PARAPHRASE | {"language": "pt"})
    assert "texts in two languages" in message


def test_ambiguous_lines_are_left_out_unless_asked_for(shipped):
    assert len(shipped.select("near_miss")) < len(shipped.select("near_miss", ambiguous=True))
    assert not any(text.ambiguous for text in shipped.select("near_miss"))


def test_an_unknown_label_is_refused(tmp_path):
    message = refusal(tmp_path, CANONICAL | {"label": "synonym"})
    assert "intents.jsonl:1" in message
    assert "unknown label 'synonym'" in message


def test_a_duplicate_id_is_refused(tmp_path):
    message = refusal(tmp_path, CANONICAL, PARAPHRASE | {"id": "a/canonical"})
    assert "'a/canonical' occurs twice" in message


def test_an_intent_in_both_halves_is_refused(tmp_path):
    message = refusal(tmp_path, CANONICAL, PARAPHRASE | {"half": "report"})
    assert "'a' is in both halves" in message


def test_an_unknown_half_is_refused(tmp_path):
    assert "unknown half 'test'" in refusal(tmp_path, CANONICAL | {"half": "test"})


def test_an_unknown_kind_of_near_miss_is_refused(tmp_path):
    near = CANONICAL | {"id": "a/x", "label": "near_miss", "kind": "colour"}
    assert "unknown kind 'colour'" in refusal(tmp_path, CANONICAL, near)


def test_a_paraphrase_without_form_is_refused(tmp_path):
    bare = {name: value for name, value in PARAPHRASE.items() if name != "form"}
    assert "form is missing" in refusal(tmp_path, CANONICAL, bare)


def test_a_kind_on_a_canonical_text_is_refused(tmp_path):
    assert "kind is unexpected" in refusal(tmp_path, CANONICAL | {"kind": "number"})


def test_a_paraphrase_without_canonical_text_is_refused(tmp_path):
    assert "has 0 canonical texts" in refusal(tmp_path, PARAPHRASE)


def test_a_follow_up_without_its_pair_is_refused(tmp_path):
    assert "'f' is no pair" in refusal(tmp_path, CANONICAL, FOLLOW_UP)


def test_an_empty_text_is_refused(tmp_path):
    assert "text is missing or empty" in refusal(tmp_path, CANONICAL | {"text": "  "})


def test_an_unknown_field_is_refused(tmp_path):
    assert "unknown field 'labels'" in refusal(tmp_path, CANONICAL | {"labels": 1})


def test_a_line_that_is_no_json_is_refused_with_its_number(tmp_path):
    path = tmp_path / "intents.jsonl"
    path.write_text(json.dumps(CANONICAL) + "\n{oops\n")
    with pytest.raises(InputError, match=r"intents.jsonl:2: not JSON"):
        paraphrases.load(path)


def test_an_empty_file_is_refused(tmp_path):
    assert "empty" in refusal(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        paraphrases.load(tmp_path / "none.jsonl")
