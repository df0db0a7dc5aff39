"""The paraphrase set: texts with intents, labels and halves, validated as they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.errors import InputError, one_of
from kvbench.layout import shipped

#: The sets that come with the repository; their README says how the labels were given.
FOLDER = shipped("resources") / "paraphrases"
#: The one in English.
DEFAULT = FOLDER / "intents.jsonl"

LABELS = ("canonical", "paraphrase", "near_miss", "never_cached", "follow_up", "long")
FORMS = ("lexical", "syntactic", "short", "long")
KINDS = ("negation", "number", "direction", "entity", "temporal", "action")
HALVES = ("tune", "report")
#: Languages that a set may be in; a line without one is English.
LANGUAGES = ("en", "pt")

_REQUIRED = ("id", "intent", "domain", "half", "label", "text")
_OPTIONAL = ("form", "kind", "context", "ambiguous", "language")


@dataclass(frozen=True)
class Text:
    """One line of the set.

    Attributes
    ----------
    id, intent, domain, half, label, text:
        As in the file; all present.
    form, kind, context:
        Form of a paraphrase, kind of a near miss, conversation before a follow-up; else empty.
    ambiguous:
        Whether the label depends on the application. Such lines are left out of rates.
    language:
        ``en`` or ``pt``; all lines of a file have the same.
    """

    id: str
    intent: str
    domain: str
    half: str
    label: str
    text: str
    form: str = ""
    kind: str = ""
    context: str = ""
    ambiguous: bool = False
    language: str = "en"


@dataclass(frozen=True)
class Paraphrases:
    """All texts of a file, and the SHA-256 digest of the file."""

    texts: tuple[Text, ...]
    sha256: str

    def select(self, label: str, half: str | None = None, ambiguous: bool = False) -> list[Text]:
        """Return the texts of a label (and half), in file order; ambiguous ones only if asked."""
        return [
            text
            for text in self.texts
            if text.label == label
            and (half is None or text.half == half)
            and (ambiguous or not text.ambiguous)
        ]


def files() -> dict[str, Path]:
    """Return the files of the repository by language; the one without a language is English.

    Another language stands between name and suffix: ``intents.pt.jsonl``.
    """
    found = sorted(FOLDER.glob("intents*.jsonl"))
    return {path.name.split(".")[1] if path.name.count(".") > 1 else "en": path for path in found}


def load(path: Path = DEFAULT) -> Paraphrases:
    """Read and validate a paraphrase file.

    Raises
    ------
    InputError
        If the file cannot be read, or a line is not an object with the fields of the README; an
        id occurs twice; an intent is in both halves, has no canonical text or two of them; or a
        follow-up or long intent is not a pair. The message names file and line or intent.
    """
    lines = documents.read_text(path).splitlines()
    texts = [_text(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]
    if not texts:
        raise InputError(f"{path}: empty; it needs one JSON object a line")
    _check_ids(texts, path)
    _check_intents(texts, path)
    if len({text.language for text in texts}) > 1:
        raise InputError(f"{path}: texts in two languages; a rate over two is a rate of none")
    return Paraphrases(tuple(texts), documents.sha256_of_file(path))


def _text(line: str, place: str) -> Text:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error.msg}); one object a line") from error
    except RecursionError:
        raise InputError(f"{place}: nested too deeply; one flat object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{place}: not a JSON object; one object a line")
    for name in _REQUIRED:
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise InputError(f"{place}: {name} is missing or empty; every line needs it")
    for name in record:
        one_of("field", name, _REQUIRED + _OPTIONAL, place)
    if not isinstance(record.get("ambiguous", False), bool):
        raise InputError(f"{place}: ambiguous is {record['ambiguous']!r}; true or false")
    one_of("label", record["label"], LABELS, place)
    one_of("half", record["half"], HALVES, place)
    one_of("language", record.get("language", "en"), LANGUAGES, place)
    needed = {
        "paraphrase": ("form", FORMS),
        "near_miss": ("kind", KINDS),
        "follow_up": ("context", None),
    }.get(record["label"])
    for name in ("form", "kind", "context"):
        if (name in record) != (needed is not None and needed[0] == name):
            verb = "unexpected" if name in record else "missing"
            raise InputError(f"{place}: {name} is {verb} with label {record['label']!r}")
    if needed is not None and needed[1] is not None:
        one_of(needed[0], record[needed[0]], needed[1], place)
    return Text(**record)


def _check_ids(texts: Iterable[Text], path: Path) -> None:
    seen: set[str] = set()
    for text in texts:
        if text.id in seen:
            raise InputError(f"{path}: id {text.id!r} occurs twice; ids are unique")
        seen.add(text.id)


def _check_intents(texts: Iterable[Text], path: Path) -> None:
    intents: dict[str, list[Text]] = {}
    for text in texts:
        intents.setdefault(text.intent, []).append(text)
    for intent, members in intents.items():
        if len({text.half for text in members}) > 1:
            raise InputError(
                f"{path}: intent {intent!r} is in both halves; tune and report share no intent"
            )
        labels = [text.label for text in members]
        if {"paraphrase", "near_miss", "canonical"} & set(labels):
            if labels.count("canonical") != 1:
                raise InputError(
                    f"{path}: intent {intent!r} has {labels.count('canonical')} canonical texts;"
                    " it needs one"
                )
        elif labels[0] in ("follow_up", "long") and labels != [labels[0]] * 2:
            raise InputError(f"{path}: intent {intent!r} is no pair of {labels[0]} texts")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
