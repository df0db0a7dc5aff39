"""Scenarios: the conversations and the fixed lengths that are measured, read from YAML."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.errors import InputError


@dataclass(frozen=True)
class Turn:
    """One exchange: what the customer asks, and a good reply to it, empty where none is given."""

    user: str
    reference: str = ""


@dataclass(frozen=True)
class Step:
    """One independent request of exact lengths, in tokens."""

    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Scenario:
    """What is measured: either ``turns`` of a conversation or ``steps`` of fixed lengths."""

    id: str
    kind: str
    title: str
    system: str = ""
    domain: str = ""
    company: str = ""
    language: str = "en"
    turns: tuple[Turn, ...] = ()
    steps: tuple[Step, ...] = ()
    seed: int = 0

    @property
    def length(self) -> int:
        """Number of turns or steps."""
        return len(self.turns) or len(self.steps)


def load(path: Path) -> Scenario:
    """Read and check one scenario file.

    Raises
    ------
    InputError
        The file is missing, malformed, against the schema, or named unlike its ``id``.
    """
    document = documents.read_yaml(path)
    if isinstance(document, dict):
        turns = document.get("turns")
        for number, turn in enumerate(turns if isinstance(turns, list) else []):
            if isinstance(turn, dict) and not str(turn.get("user") or "").strip():
                raise InputError(
                    f"{path}: turns[{number}].user is empty; every turn needs a question"
                )
    documents.check(document, "scenario", str(path))
    for key, text in _texts(document):
        if problem := _unreadable(text):
            raise InputError(f"{path}: {key} {problem}; write plain text")
    if document["id"] != path.stem:
        raise InputError(
            f"{path}: id is {document['id']!r} but the file is called {path.name}; make them equal"
        )
    fields = {key: value for key, value in document.items() if key not in {"description"}}
    fields["turns"] = tuple(
        Turn(turn["user"].strip(), turn.get("reference", "").strip())
        for turn in document.get("turns", [])
    )
    fields["steps"] = tuple(Step(**step) for step in document.get("steps", []))
    return Scenario(**fields)


def _texts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and text of everything that a model will read."""
    yield "system", document.get("system", "x")
    for number, turn in enumerate(document.get("turns", [])):
        yield f"turns[{number}].user", turn["user"]
        if "reference" in turn:
            yield f"turns[{number}].reference", turn["reference"]


def _unreadable(text: str) -> str | None:
    """Why a text cannot be given to a model, or None."""
    kinds = {character: unicodedata.category(character) for character in set(text)}
    for character, kind in kinds.items():
        if kind == "Cs":
            return f"holds half a surrogate pair (U+{ord(character):04X})"
        if kind == "Cc" and character not in "\n\t\r":
            return f"holds the control character U+{ord(character):04X}"
    # Separators and format characters, such as a zero-width space, show nothing.
    if all(kind[0] in "CZ" for kind in kinds.values()):
        return "shows no character"
    return None


def load_all(folder: Path) -> dict[str, Scenario]:
    """Read every ``*.yaml`` file of a folder.

    Raises
    ------
    InputError
        Any file is wrong or has another suffix, or the folder holds none.
    """
    found: dict[str, Scenario] = {}
    for path in documents.yaml_files(folder):
        found[path.stem] = load(path)
    if not found:
        raise InputError(f"{folder}: holds no scenario; add a file such as banking.yaml")
    return found
