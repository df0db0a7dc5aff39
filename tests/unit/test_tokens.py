"""Chat templates and tokenizers as they are: roles, dates, thoughts, endings, and none at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from kvbench.errors import InputError
from kvbench.inputs import tokens
from kvbench.inputs.scenarios import Scenario, Turn
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EMBEDDED = Path(__file__).resolve().parents[2] / "resources" / "embedded-llama"
TALK = Scenario(
    id="talk",
    title="Talk",
    kind="conversation",
    language="en",
    system="You are brief.",
    turns=(
        Turn(user="My car was hit.", reference="I am sorry."),
        Turn(user="What now?", reference="Call us."),
        Turn(user="When?", reference="Today."),
    ),
)
_MESSAGES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


def templated(tokenizer, template: str):
    """The embedded tokenizer with another chat template."""
    tokenizer.chat_template = template
    return tokenizer


def whole(tokenizer, document) -> str:
    """The text of the third prompt, with the reference replies as history."""
    ids = [*document["first"]]
    for reply, between in zip(document["references"], document["next"], strict=False):
        ids += [*reply, *between]
    return tokenizer.decode(ids)


# System messages ------------------------------------------------------------------------------


def test_a_system_text_that_the_template_refuses_goes_before_the_first_question(tokenizer):
    refusing = (
        "{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + _MESSAGES
    )
    document = tokens.conversation_prompts(templated(tokenizer, refusing), TALK)
    assert document["layout"]["system"] == "before the first question"
    expected = "<|user|>You are brief.\n\nMy car was hit.<|end|><|assistant|>"
    assert tokenizer.decode(document["first"]) == expected


def test_a_system_text_that_the_template_leaves_out_goes_there_too(tokenizer):
    silent = _MESSAGES.replace("messages %}", "messages if m.role != 'system' %}", 1)
    document = tokens.conversation_prompts(templated(tokenizer, silent), TALK)
    assert document["layout"]["system"] == "before the first question"
    assert "You are brief." in tokenizer.decode(document["first"])


def test_a_template_with_a_system_role_gets_its_own_message(tokenizer):
    document = tokens.conversation_prompts(tokenizer, TALK)
    assert document["layout"]["system"] == "own message"


def test_a_template_that_cannot_be_used_is_one_line(tokenizer):
    never = "{{ raise_exception('Only tools\nhere') }}"
    with pytest.raises(InputError, match=r"^chat_template: Only tools here$"):
        tokens.conversation_prompts(templated(tokenizer, never), TALK)


@pytest.mark.parametrize(
    "reading",
    [
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
        "{{ m.content[0]['text'] }}",
        "{{ (m.content | map(attribute='text') | list)[0].strip() }}",
    ],
)
@pytest.mark.parametrize("turns", [1, 3])
def test_a_template_that_reads_contents_in_parts_gets_parts(tokenizer, reading, turns):
    """A plain text has no parts: its question would be lost without an error."""
    scenario = replace(TALK, turns=TALK.turns[:turns])
    plain = tokens.conversation_prompts(templated(tokenizer, _MESSAGES), scenario)
    parts = _MESSAGES.replace("{{ m.content | trim }}", reading)
    assert tokens.conversation_prompts(templated(tokenizer, parts), scenario) == plain


def test_a_template_that_never_says_the_question_is_refused(tokenizer):
    deaf = "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}<|assistant|>"
    with pytest.raises(InputError, match="any question would get the same prompt"):
        tokens.conversation_prompts(templated(tokenizer, deaf), replace(TALK, turns=TALK.turns[:1]))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"rag": _MESSAGES, "tool_use": _MESSAGES}, "multiple chat templates with no default"),
        ("{{ 'a' + 1 }}" + _MESSAGES, "TypeError: can only concatenate str"),
        (
            "{% if messages | length > 3 %}{{ raise_exception('one turn only') }}{% endif %}"
            + _MESSAGES,
            "one turn only",
        ),
    ],
)
def test_whatever_a_template_raises_is_one_line(tokenizer, template, words):
    with pytest.raises(InputError, match=f"^chat_template: .*{words}") as caught:
        tokens.conversation_prompts(templated(tokenizer, template), TALK)
    assert "\n" not in str(caught.value)


# Dates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", ["strftime_now('%d %b %Y')", 'strftime_now("%d %b %Y")'])
def test_a_template_that_prints_the_date_gives_the_same_ids_on_any_day(tokenizer, spelled):
    dated = "Today is {{ " + spelled + " }}. " + _MESSAGES
    document = tokens.conversation_prompts(templated(tokenizer, dated), TALK)
    assert tokenizer.decode(document["first"]).startswith("Today is 01 Jan 2025.")
    assert document["layout"]["today"] == "2025-01-01"


def test_a_template_without_a_date_has_none(tokenizer):
    assert tokens.conversation_prompts(tokenizer, TALK)["layout"]["today"] is None


# Templates that change what was said ----------------------------------------------------------


@pytest.mark.parametrize("thinks", ["<think></think>", "<think>\n\n</think>\n\n"])
def test_thoughts_in_the_generation_prompt_only_are_kept_by_ids_and_lost_by_rendering(
    tokenizer, thinks
):
    thinking = _MESSAGES.replace("<|assistant|>{% endif", f"<|assistant|>{thinks}{{% endif")
    document = tokens.conversation_prompts(templated(tokenizer, thinking), TALK)
    held, shared = document["layout"]["held_tokens"], document["layout"]["rerendered_tokens"]
    assert held[0] == len(document["first"]) + len(document["references"][0])
    # A new rendering has no thought after the first question: all before it is shared.
    thought = len(tokenizer(thinks, add_special_tokens=False)["input_ids"])
    assert shared == [len(document["first"]) - thought] * 2
    assert whole(tokenizer, document).count(thinks) == 3


def test_a_template_that_repeats_itself_loses_nothing(tokenizer):
    layout = tokens.conversation_prompts(tokenizer, TALK)["layout"]
    assert layout["rerendered_tokens"] == layout["held_tokens"]


def test_a_template_that_hides_earlier_replies_is_refused(tokenizer):
    hiding = _MESSAGES.replace("{{ m.content | trim }}", "{{ m.content if m.role == 'user' }}")
    with pytest.raises(InputError, match="an earlier reply does not stand in it once"):
        tokens.conversation_prompts(templated(tokenizer, hiding), TALK)


# Tokenizers -----------------------------------------------------------------------------------


def test_a_base_model_gets_plain_lines_and_the_document_says_so(tokenizer):
    document = tokens.conversation_prompts(templated(tokenizer, None), TALK)
    assert document["layout"]["template"] == "plain lines"
    expected = "system: You are brief.\nuser: My car was hit.\nassistant:"
    assert tokenizer.decode(document["first"]).endswith(expected)


def test_what_a_tokenizer_appends_does_not_end_the_prompt():
    inner = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 1), ("<|end|>", 2)]
    )
    ending = PreTrainedTokenizerFast(tokenizer_object=inner)
    document = tokens.conversation_prompts(ending, TALK)
    assert document["first"][0] == 1
    assert all(2 not in ids for ids in (document["first"], *document["next"]))


def test_a_tokenizer_without_a_fast_version_decodes_and_finds_its_end(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    slow = tokens.backend(tokens.load_tokenizer(tmp_path))
    assert isinstance(slow, tokens.SlowTokenizer)
    assert slow.token_to_id("</s>") == 1 and slow.token_to_id("<|end|>") is None
    assert slow.decode([75, 76, 1]) == "HI"
    assert slow.id_to_token(10**6) is None


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="no tokenizer can be loaded") as caught:
        tokens.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


# Texts are data -------------------------------------------------------------------------------


def changed(**fields) -> Scenario:
    """The talk with another second question."""
    first, _, last = TALK.turns
    return Scenario(**{**vars(TALK), "turns": (first, Turn(**fields), last)})


def test_a_text_may_hold_any_word_that_this_library_uses(tokenizer):
    asked = "Say REPLY-STANDS-HERE and assistant: please."
    document = tokens.conversation_prompts(tokenizer, changed(user=asked, reference="No."))
    assert asked in whole(tokenizer, document)
    assert len(document["next"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [("half \ud83d a face", "half a character (U+D83D)"), ("<|end|> me", "'<|end|>', a special")],
)
def test_what_a_tokenizer_would_misread_is_refused_with_its_place(tokenizer, text, words):
    with pytest.raises(InputError) as caught:
        tokens.conversation_prompts(tokenizer, changed(user=text, reference="No."))
    assert "config/scenarios/talk.yaml: turns[1].user" in str(caught.value) and words in str(
        caught.value
    )


# Lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 77}, 77),
        ({"text_config": {"max_position_embeddings": 5}}, 5),
        ({"model_type": "bloom"}, None),
    ],
)
def test_the_longest_context_is_found_under_the_name_a_family_gives_it(tmp_path, config, limit):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tokens.context_limit(tmp_path) == limit


def test_only_the_steps_that_are_measured_need_room():
    steps = [{"prompt": [1] * 8, "new_tokens": 4}, {"prompt": [1] * 2000, "new_tokens": 4}]
    document = {"kind": "fixed", "steps": steps}
    assert tokens.longest_context(document, None, 99, 100) == 12
    assert tokens.longest_context(document, None, 99, 0) == 2004
