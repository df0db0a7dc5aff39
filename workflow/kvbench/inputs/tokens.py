"""Token ids of a scenario for one model: the chat template as it is, or a plain layout without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvbench import documents
from kvbench.errors import InputError
from kvbench.inputs.scenarios import Scenario
from kvbench.measurement import startup
from kvbench.physics import text_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The day that templates print which ask for today's: token ids must not depend on the clock.
TODAY = datetime(2025, 1, 1)
#: Where the system text goes.
OWN_MESSAGE, BEFORE_QUESTION, NO_SYSTEM = "own message", "before the first question", "none"
#: Marks the place of a reply when the chat template is split around it.
MARK = "REPLY-STANDS-HERE"
#: Text that the tokens between two replies are taken after, so that nothing counts as a beginning.
_ANCHOR = "."

Messages = Sequence[Mapping[str, str]]


# ---------------------------------------------------------------------------- tokenizers


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a prepared model, fast or not.

    Raises
    ------
    InputError
        The folder has none.
    """
    startup.skip_unused_imports()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        words = " ".join(str(error).split())[:160]
        raise InputError(
            f"{folder}: no tokenizer can be loaded ({words}); put its files beside config.json, or take "
            "scenarios of fixed lengths"
        ) from None


class SlowTokenizer:
    """What the measuring path needs of a tokenizer that has no fast version."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.get_vocab()
        self._names = {number: token for token, number in self._ids.items()}

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None."""
        return self._ids.get(token)

    def id_to_token(self, number: int) -> str | None:
        """The token of an id, or None where the vocabulary is padded."""
        return self._names.get(number)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)


def backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The fast tokenizer inside, or one that answers the same questions."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return SlowTokenizer(tokenizer) if fast is None else fast


# ---------------------------------------------------------------------------- templates


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """Text of a conversation up to where the assistant speaks next.

    Without a chat template (base models) every message is a line ``role: content``, and ``assistant:``
    stands at the end. A template that reads contents as lists of parts, as those of models with pictures
    do, is given such lists.

    Raises
    ------
    InputError
        The template cannot be rendered with these messages, or says the same whatever is asked last.
    """
    if tokenizer.chat_template is None:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return "".join(lines) + "assistant:"
    refusals = []
    for content in (str, _in_parts):
        try:
            text = _applied(tokenizer, messages, content)
            if messages[-1]["content"].strip() in text:
                return text
            # Some templates rewrite what they are given; one that does not even read it is of no use.
            other = [*messages[:-1], {**messages[-1], "content": MARK}]
            if _applied(tokenizer, other, content) != text:
                return text
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    raise InputError(
        "chat_template: the last message does not stand in it, so that any question would get the same "
        "prompt"
    )


def _in_parts(content: str) -> list[dict[str, str]]:
    """A message's content as the library's models with pictures take it."""
    return [{"type": "text", "text": content}]


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, content: Callable[[str], Any]
) -> str:
    """Text of the chat template, with each message's content in the form that ``content`` gives it."""
    from jinja2 import TemplateError

    given = [{**message, "content": content(message["content"])} for message in messages]
    try:
        with _stopped_clock():
            return tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # A template is a program of somebody else's: it may raise anything, on purpose or not.
        words = " ".join(str(error).split())[:200]
        kind = "" if isinstance(error, (TemplateError, ValueError)) else f"{type(error).__name__}: "
        raise InputError(f"chat_template: {kind}{words}") from None


@contextmanager
def _stopped_clock() -> Iterator[None]:
    """Have the library's templates print :data:`TODAY`, whatever day it is.

    Their ``strftime_now`` asks the clock of the module it stands in. A function of ours under that name
    would do up to transformers 5.18; later versions hand templates plain data only.
    """
    from transformers.utils import chat_template_utils as library

    clock = library.datetime
    library.datetime = SimpleNamespace(now=lambda: TODAY)
    try:
        yield
    finally:
        library.datetime = clock


def opening(
    tokenizer: PreTrainedTokenizerBase, system: str, question: str
) -> tuple[list[dict[str, str]], str]:
    """The first messages of a conversation, and where the system text went.

    A template that refuses a system message, or leaves it out, gets the text before the first question.

    Raises
    ------
    InputError
        The template can be rendered neither way.
    """
    asked = {"role": "user", "content": question}
    if not system.strip():
        return [asked], NO_SYSTEM
    apart = [{"role": "system", "content": system}, asked]
    if tokenizer.chat_template is None:
        return apart, OWN_MESSAGE
    try:
        if system.strip() in render(tokenizer, apart):
            return apart, OWN_MESSAGE
    except InputError:
        # The template says that it has no such role.
        pass
    joined = [{"role": "user", "content": f"{system.strip()}\n\n{question}"}]
    render(tokenizer, joined)
    return joined, BEFORE_QUESTION


def _between(tokenizer: PreTrainedTokenizerBase, first: Messages, question: str) -> str:
    """What the template puts between a reply and the next one, the question included."""
    mark = MARK
    texts = [message["content"] for message in first] + [question]
    while any(mark in text for text in texts):
        mark += "-"
    marked = [
        *first,
        {"role": "assistant", "content": mark},
        {"role": "user", "content": question},
    ]
    before, found, after = render(tokenizer, marked).rpartition(mark)
    if not found or question.strip() not in after or mark in before:
        raise InputError(
            "chat_template: an earlier reply does not stand in it once, as it was given; such a "
            "template cannot continue a conversation"
        )
    return after


# ---------------------------------------------------------------------------- token ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _beginning(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a plain text with what the tokenizer puts before it, and without what it appends."""
    bare = _ids(tokenizer, text)
    whole = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[: start + len(bare)]
    return bare


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that something comes before: no space is put in front of its first word."""
    before = _ids(tokenizer, _ANCHOR)
    joined = _ids(tokenizer, _ANCHOR + text)
    if joined[: len(before)] == before:
        return joined[len(before) :]
    return _ids(tokenizer, text)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a conversation rendered as a whole."""
    text = render(tokenizer, messages)
    if tokenizer.chat_template is None:
        return _beginning(tokenizer, text)
    return _ids(tokenizer, text)


def conversation_prompts(tokenizer: PreTrainedTokenizerBase, scenario: Scenario) -> dict[str, Any]:
    """Token ids of a conversation, so that history is never tokenised a second time.

    What stands between two replies is found by rendering the chat template around a marked reply
    and keeping what follows the mark.

    Returns
    -------
    dict
        ``first``, ``next``, ``references`` and ``vocab_size`` as :func:`prompts` says, and ``layout``:
        ``template`` (``chat template`` or ``plain lines``), ``system`` (where the system text stands),
        ``today`` (the day the template prints, or None), and for every later turn, with the reference
        replies as history, ``held_tokens`` (of the prompt and the reply before) and ``rerendered_tokens``
        (how many of them a client shares that renders the template again instead of keeping ids).

    Raises
    ------
    InputError
        A text that is no text, or holds a special token of this model; a template that cannot be used.
    """
    _check_texts(tokenizer, scenario)
    first, place = opening(tokenizer, scenario.system, scenario.turns[0].user)
    following = [
        _continuation(tokenizer, _between(tokenizer, first, turn.user))
        for turn in scenario.turns[1:]
    ]
    references = [_ids(tokenizer, turn.reference) for turn in scenario.turns]
    begun = prompt_ids(tokenizer, first)
    held, shared = _agreement(tokenizer, scenario, first, begun, following, references)
    if not all(references):
        # Quality is scored on reference replies: on all turns or on none.
        references = []
    dated = tokenizer.chat_template is not None and "strftime_now" in str(tokenizer.chat_template)
    return {
        "first": begun,
        "next": following,
        "references": references,
        "vocab_size": len(tokenizer),
        "layout": {
            "template": "plain lines" if tokenizer.chat_template is None else "chat template",
            "system": place,
            "today": TODAY.date().isoformat() if dated else None,
            "held_tokens": held,
            "rerendered_tokens": shared,
        },
    }


def _agreement(
    tokenizer: PreTrainedTokenizerBase,
    scenario: Scenario,
    first: Messages,
    begun: list[int],
    following: Sequence[list[int]],
    references: Sequence[list[int]],
) -> tuple[list[int], list[int]]:
    """Per later turn: tokens held from before, and how many of them a new rendering begins with."""
    from kvbench.strategies.base import common_prefix

    messages, history = list(first), list(begun)
    held, shared = [], []
    for number, turn in enumerate(scenario.turns[1:]):
        messages += [
            {"role": "assistant", "content": scenario.turns[number].reference},
            {"role": "user", "content": turn.user},
        ]
        history += references[number]
        held.append(len(history))
        shared.append(common_prefix(history, prompt_ids(tokenizer, messages)))
        history += following[number]
    return held, shared


def _check_texts(tokenizer: PreTrainedTokenizerBase, scenario: Scenario) -> None:
    """Refuse what is data to the author and means something else to the tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = sorted({token.content for token in added.values() if token.special})
    for where, text in _texts(scenario):
        spot = f"config/scenarios/{scenario.id}.yaml: {where}"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{spot} holds half a character (U+{ord(text[error.start]):04X}); write it whole"
            ) from None
        for token in special:
            if token in text:
                raise InputError(
                    f"{spot} holds {token!r}, a special token of this model's tokenizer; it would not be "
                    "read as text: write it otherwise"
                )


def _texts(scenario: Scenario) -> Iterator[tuple[str, str]]:
    yield "system", scenario.system
    for number, turn in enumerate(scenario.turns):
        yield f"turns[{number}].user", turn.user
        yield f"turns[{number}].reference", turn.reference


@startup.collector_paused()
def prompts(folder: Path, scenario: Scenario) -> dict[str, Any]:
    """Turn a scenario into token ids for one model.

    Returns
    -------
    dict
        For a conversation: ``first`` (ids of the system prompt and the first question), ``next``
        (for every later turn the ids between a reply and the next one), ``references`` (ids of
        the reference replies) and ``layout`` (see :func:`conversation_prompts`). For fixed lengths:
        ``steps`` with ``prompt`` (ids) and ``new_tokens``. Both have ``kind`` and ``vocab_size``.
    """
    if scenario.kind == "fixed":
        return _fixed_prompts(folder, scenario)
    return {"kind": "conversation", **conversation_prompts(load_tokenizer(folder), scenario)}


def _fixed_prompts(folder: Path, scenario: Scenario) -> dict[str, Any]:
    import numpy as np

    vocab_size = text_part(documents.read_json(folder / "config.json"))["vocab_size"]
    generator = np.random.default_rng(scenario.seed)
    # The first ids of most vocabularies are special tokens; leave a tenth of it out.
    lowest = min(vocab_size - 1, max(16, vocab_size // 10))
    steps = [
        {
            "prompt": generator.integers(lowest, vocab_size, step.prompt_tokens).tolist(),
            "new_tokens": step.new_tokens,
        }
        for step in scenario.steps
    ]
    return {"kind": "fixed", "steps": steps, "vocab_size": vocab_size}


def longest_context(
    document: Mapping[str, Any],
    turns: int | None,
    max_new_tokens: int,
    max_prompt_tokens: int | None = None,
) -> int:
    """Tokens of context that a tokenised scenario needs.

    Parameters
    ----------
    turns, max_new_tokens:
        What is asked of a conversation.
    max_prompt_tokens:
        Longest step of fixed lengths that is measured; None or 0 for all.
    """
    if document["kind"] == "fixed":
        limit = max_prompt_tokens or None
        lengths = [
            len(step["prompt"]) + step["new_tokens"]
            for step in document["steps"]
            if limit is None or len(step["prompt"]) <= limit
        ]
        return max(lengths, default=0)
    between = document["next"][: (turns or len(document["next"]) + 1) - 1]
    return len(document["first"]) + sum(map(len, between)) + (len(between) + 1) * max_new_tokens


def context_limit(folder: Path) -> int | None:
    """Tokens that a prepared model can read at most, by any of the names that families give it."""
    config = text_part(documents.read_json(folder / "config.json"))
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    found: Callable[[str], Any] = config.get
    return next((found(name) for name in names if isinstance(found(name), int)), None)
