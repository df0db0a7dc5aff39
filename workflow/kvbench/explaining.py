"""What is wrong with a document that a schema refuses, in one line with the key and a remedy."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jsonschema

from kvbench.errors import did_you_mean

#: Characters of a value in a message.
_LONGEST_VALUE = 60
#: JSON Schema's words for what YAML users call otherwise.
_TYPES = {"array": "list", "object": "mapping", "string": "text", "null": "null"}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def location(parts: Iterable[str | int]) -> str:
    """Spell a JSON path the way a reader of the YAML would: ``turns[3].user``."""
    spelled = ""
    for part in parts:
        spelled += f"[{part}]" if isinstance(part, int) else f".{part}" if spelled else str(part)
    return spelled


def shown(value: object) -> str:
    """A value as a reader of the YAML knows it, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "empty (null)"
    text = value.isoformat() if isinstance(value, datetime.date) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def explain(
    error: jsonschema.ValidationError,
    rules: Mapping[str, Any],
    at: tuple[str | int, ...] = (),
    by_hand: bool = True,
) -> str:
    """Turn a schema violation into ``key: what is wrong; what would be right``.

    Parameters
    ----------
    error:
        The violation.
    rules:
        The whole schema, in which a key that stands in the wrong place is looked up.
    at:
        The place of the document in the file, if it is a part of it.
    by_hand:
        Whether a person wrote it, who can write it otherwise.
    """
    deepest = jsonschema.exceptions.best_match([error])
    where = location([*at, *deepest.absolute_path]) or "top level"
    kind, expected, value = deepest.validator, deepest.validator_value, deepest.instance
    own = deepest.schema if isinstance(deepest.schema, Mapping) else {}
    told = own.get("description", "").rstrip(".")
    hint = f" ({told})" if told else ""
    if kind == "additionalProperties":
        return f"{where}: {_unknown_keys(value, own.get('properties', {}), rules, at)}"
    if kind == "required":
        missing = [key for key in expected if key not in value]
        return f"{where}: missing key {', '.join(map(repr, missing))}"
    if kind == "enum":
        return f"{where} is {shown(value)}; {_one_of_words(value, expected)}{hint}"
    if kind == "type":
        wanted = [expected] if isinstance(expected, str) else expected
        words = " or ".join(_TYPES.get(name, name) for name in wanted)
        otherwise = _other_type(value, own) if by_hand and where != "top level" else ""
        return f"{where} is {shown(value)}; it must be of type {words}{otherwise}{hint}"
    if kind in _BOUNDS:
        return f"{where} is {shown(value)}; it must be {_BOUNDS[kind]} {expected}{hint}"
    if kind == "minItems":
        return f"{where} is an empty list; name at least {expected}{hint}"
    if kind == "uniqueItems":
        twice = next(one for number, one in enumerate(value) if one in value[:number])
        return f"{where} holds {shown(twice)} twice; keep one of them"
    if kind == "maxLength":
        return f"{where} has {len(value)} characters; write at most {expected}{hint}"
    if kind == "pattern":
        # An address may hold a password.
        named = "" if "://" in str(value) else f" is {shown(value)}; it"
        right = f"; write {own['$comment']}" if "$comment" in own else ""
        return f"{where}{named} does not look right{right}{hint or f' (pattern {expected})'}"
    return f"{where}: {deepest.message}{hint}"


def _unknown_keys(
    value: Mapping[Any, Any],
    known: Mapping[str, Any],
    rules: Mapping[str, Any],
    at: tuple[str | int, ...],
) -> str:
    """Which keys are unknown, what each could mean, and which keys there are."""
    found = []
    for key in sorted((key for key in value if key not in known), key=str):
        hint = did_you_mean(key, known)
        if not isinstance(key, str):
            hint = "; put it in quotes to have it read as text"
        elif key.partition(":")[0] in known:
            hint = f" (put a blank after the colon: '{key.replace(':', ': ', 1)}')"
        elif not hint and (homes := list(dict.fromkeys(_homes(rules, key, at)))):
            hint = f" (it is a key of {' and of '.join(homes)})"
        found.append(f"{shown(key)}{hint}")
    return f"unknown key {', '.join(found)}; known keys: {', '.join(sorted(known))}"


def _homes(rules: Mapping[str, Any], key: str, at: tuple[str | int, ...]) -> Iterator[str]:
    """Places of a schema that have a key."""
    if key in rules.get("properties", {}):
        yield location(at) or "the top level"
    for name, part in rules.get("properties", {}).items():
        yield from _homes(part, key, (*at, name))
    if isinstance(rules.get("items"), Mapping):
        *start, last = at or ("",)
        yield from _homes(rules["items"], key, (*start, f"{last}[]"))


def _one_of_words(value: object, expected: Iterable[object]) -> str:
    """The words there are, the nearest, and what YAML made of a word without quotes."""
    # A switch is listed in every spelling that the command line may hand on.
    names = list(
        dict.fromkeys(str(one).lower() if str(one) in _SWITCH else str(one) for one in expected)
    )
    quotes = ""
    if isinstance(value, bool) and not {"true", "false"} & set(names):
        quotes = "; YAML reads yes, no, on and off as true and false: put such a word in quotes"
    return f"use one of {', '.join(names)}{did_you_mean(value, names)}{quotes}"


_SWITCH = {"True", "False", "true", "false"}


def _other_type(value: object, rules: Mapping[str, Any]) -> str:
    """How the same thing is written in the type that is wanted, if that can be told."""
    wanted = rules["type"]
    wanted = {wanted} if isinstance(wanted, str) else set(wanted)
    if value is None:
        return "; fill it in, or take the key out"
    numbers = wanted & {"integer", "number"}
    if numbers and isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return _as_number(value, wanted)
    if "array" in wanted and isinstance(value, str | int | float) and not isinstance(value, bool):
        return f": write [{value if len(str(value)) <= _LONGEST_VALUE else '...'}]"
    if "boolean" in wanted and isinstance(value, str | int):
        return ": write true or false, without quotes"
    if numbers and isinstance(value, str):
        return _as_number(value, wanted)
    if "integer" in wanted and isinstance(value, float) and value.is_integer():
        return f": write {int(value)}"
    if "string" in wanted and isinstance(value, bool | int | float | datetime.date):
        return ": put it in quotes"
    return ""


def _as_number(text: str, wanted: set[str]) -> str:
    """How YAML wants the number that a text spells."""
    plain = text.strip().replace(",", ".", 1)
    if plain.endswith("%") and _NUMBER.fullmatch(plain[:-1]) and "number" in wanted:
        return f": write it as a share, {float(plain[:-1]) / 100:g}"
    if not _NUMBER.fullmatch(plain):
        return ": write a number without a unit" if plain[:1].isdigit() else ""
    number = float(plain)
    if "integer" in wanted and "number" not in wanted:
        return f": write {int(number)}, without quotes" if number.is_integer() else ""
    return f": write {number!r}, without quotes"
