"""Conversations out of a notebook that holds them as Python data, into scenario files of their own.

For whoever has the symposium's notebook: its sentences are not ours to ship. Read are ``.ipynb``, the
script export (``.py``) and a plain text export. Nothing of the notebook is executed: literals only.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvbench import documents
from kvbench.errors import InputError

#: Keys, compared in lower case, under which a notebook may keep a system prompt and the turns.
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "prompt_sistema", "sistema", "context")
TURN_KEYS = (
    "turns",
    "user_turns",
    "user_inputs",
    "user_messages",
    "messages",
    "conversation",
    "conversations",
    "questions",
    "prompts",
    "turnos",
    "perguntas",
)
_USER_KEYS = ("user", "content", "question", "text", "pergunta", "usuario")
_REPLY_KEYS = ("reference", "assistant", "reply", "answer", "resposta")


@dataclass(frozen=True)
class Found:
    """One conversation of a notebook: its name there, its system prompt, and its turns."""

    name: str
    system: str
    turns: tuple[Mapping[str, str], ...]


def read(path: Path) -> list[Found]:
    """Find the conversations of a notebook.

    A conversation is a mapping with a text under one of :data:`SYSTEM_KEYS` and a list under one of
    :data:`TURN_KEYS`: of texts, of mappings, or of messages with roles. One without turns, as the
    source has too, is left out.

    Raises
    ------
    InputError
        The file is missing, is no notebook, or holds no conversation.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give a notebook or its text export")
    found: dict[str, Found] = {}
    for literal in _literals(path):
        for name, system, turns in _conversations(literal, path.stem):
            # A conversation is met again as part of what holds it, without its name.
            if not any((one.system, one.turns) == (system, turns) for one in found.values()):
                found.setdefault(name, Found(name, system, turns))
    if not found:
        raise InputError(
            f"{path}: no conversation found; expected a mapping with a system prompt "
            f"({', '.join(SYSTEM_KEYS[:3])} ...) and turns ({', '.join(TURN_KEYS[:3])} ...)"
        )
    return list(found.values())


def _literals(path: Path) -> Iterator[Any]:
    """Every literal mapping or list that stands in the code of a notebook, the outer ones first."""
    for source in _sources(path):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            yield from _literals_of_text(source)
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict | ast.List):
                try:
                    yield ast.literal_eval(node)
                except (ValueError, TypeError, SyntaxError, RecursionError):
                    continue


def _sources(path: Path) -> list[str]:
    """The code cells of a notebook, without lines that are commands of the notebook; else the text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; export the notebook as .ipynb or .txt") from None
    if path.suffix != ".ipynb":
        return [text]
    try:
        cells = json.loads(text)["cells"]
        codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a notebook (no list of cells); save it as .ipynb") from None
    return ["\n".join(line for line in code.split("\n") if line[:1] not in "%!") for code in codes]


def _literals_of_text(text: str) -> Iterator[Any]:
    """Literals between balanced braces of a text that is not Python as a whole."""
    position = 0
    while (start := text.find("{", position)) >= 0:
        position = start + 1
        for end in _closing(text, start):
            try:
                yield ast.literal_eval(text[start:end])
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            position = end
            break


def _closing(text: str, start: int) -> Iterator[int]:
    """Where the brace at ``start`` may close; braces inside of texts can mislead, so first only."""
    depth = 0
    for sign in re.finditer(r"[{}]", text[start:]):
        depth += 1 if sign.group() == "{" else -1
        if depth == 0:
            yield start + sign.end()
            return


def _conversations(
    literal: Any, name: str
) -> Iterator[tuple[str, str, tuple[Mapping[str, str], ...]]]:
    if isinstance(literal, Mapping):
        system = _text(literal, SYSTEM_KEYS)
        turns = _turns(_entry(literal, TURN_KEYS))
        if turns and system:
            yield name, system, turns
            return
        for key, inner in literal.items():
            if isinstance(inner, Mapping | list):
                yield from _conversations(inner, str(key))


def _entry(mapping: Mapping[Any, Any], keys: Sequence[str]) -> Any:
    lowered = {str(key).lower(): value for key, value in mapping.items()}
    return next((lowered[key] for key in keys if key in lowered), None)


def _text(mapping: Mapping[Any, Any], keys: Sequence[str]) -> str:
    value = _entry(mapping, keys)
    return value.strip() if isinstance(value, str) else ""


def _turns(entry: Any) -> tuple[Mapping[str, str], ...]:
    """Turns out of a list of texts, of mappings, or of messages with roles; others are passed over."""
    turns: list[dict[str, str]] = []
    for item in entry if isinstance(entry, list | tuple) else ():
        if isinstance(item, str) and item.strip():
            turns.append({"user": item.strip()})
        elif isinstance(item, Mapping):
            role = str(item.get("role", "")).lower()
            if role == "assistant":
                if turns and (reply := _text(item, ("content",))):
                    turns[-1]["reference"] = reply
            elif role in ("", "user") and (asked := _text(item, _USER_KEYS)):
                reply = "" if role else _text(item, _REPLY_KEYS)
                turns.append({"user": asked} | ({"reference": reply} if reply else {}))
    return tuple(turns)


def scenario_id(name: str, prefix: str) -> str:
    """An id for a conversation: the prefix, and its name in lower case with underscores."""
    return f"{prefix}_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}"


def write(found: Sequence[Found], folder: Path, prefix: str, language: str) -> list[Path]:
    """Write a scenario file for each conversation, and check it as any other scenario.

    Parameters
    ----------
    prefix:
        What the ids begin with, so that none hides one of ours.
    language:
        ISO 639-1 code of the conversations.

    Raises
    ------
    InputError
        A file of that name is there already, or a text is none that a model can be given.
    """
    from kvbench.inputs import scenarios

    written = []
    for one in found:
        path = folder / f"{scenario_id(one.name, prefix)}.yaml"
        if path.exists():
            raise InputError(f"{path}: is there already; remove it or choose another --prefix")
        document = {
            "id": path.stem,
            "kind": "conversation",
            "title": one.name.replace("_", " "),
            "domain": "imported",
            "company": "as in the notebook",
            "language": language,
            "system": one.system,
            "turns": [dict(turn) for turn in one.turns],
        }
        text = "# Imported from a notebook; the sentences are its authors'.\n"
        body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
        documents.write_text_atomic(path, text + body)
        try:
            scenarios.load(path)
        except InputError:
            path.unlink()
            raise
        written.append(path)
    return written
