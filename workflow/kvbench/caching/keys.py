"""One key per request: a digest of everything that can change the answer, and of nothing else.

Decisions
---------
* The key is the SHA-256 digest of canonical JSON: keys sorted, no spaces, UTF-8. Fields are parts
  of one JSON object, so ("ab", "c") and ("a", "bc") can never meet, as they do when strings are
  concatenated. SHA-256 because tenants may be hostile; ``hash()`` is salted per process.
* ``1``, ``1.0``, ``True`` and ``"1"`` are four different values. Two spellings of one request
  cost a repeated generation; two requests under one key cost a wrong answer.
* Text is compared by code point, because the tokenizer reads code points. Where people ask rather
  than programs, ``normalise`` makes one text of the two spellings that Unicode has for "é" (NFC):
  nobody means one of them.
* A list and a tuple are the same JSON array. A missing field and an empty one differ from any
  other value, and every field is always part of the key.
* What JSON cannot say without loss is refused: NaN and infinities, keys that are not text (JSON
  would merge ``1`` and ``"1"``), bytes, sets, lone surrogates.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

#: Part of every key: raise it when the meaning of a field changes, and old entries expire unread.
KEY_VERSION = "kvbench/key/1"

#: Most combining marks in a row of a text: the limit of the Stream-Safe Text Format (UAX #15).
_MOST_MARKS = 30
_PIECE = 16 * 2**10

#: Temperature of an API that is not told one (OpenAI's chat completions default to 1).
DEFAULT_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Request:
    """A request to a language model, with every field that can change its answer.

    Attributes
    ----------
    model, revision:
        Which weights answer, and which commit or release of them.
    prompt:
        The user's last message.
    system:
        The system prompt.
    history:
        Earlier messages, oldest first, such as ``{"role": "user", "content": "..."}``.
    tools:
        Tool definitions offered to the model.
    parameters:
        Sampling and length parameters: ``temperature``, ``top_p``, ``max_tokens``, ``stop``,
        ``seed`` and so on.
    versions:
        Versions of whatever else shapes the answer: prompt template, retrieval index, data.
    namespace:
        Tenant. Different tenants never share an entry, even for equal requests.
    """

    model: str
    prompt: str
    revision: str = ""
    system: str = ""
    history: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    namespace: str = ""

    @property
    def sampled(self) -> bool:
        """Whether the answer is one draw out of many: the temperature is not zero."""
        temperature = self.parameters.get("temperature")
        return (DEFAULT_TEMPERATURE if temperature is None else temperature) != 0


#: Every field of a request, in the order of the class. All of them belong to a safe key.
FIELDS: tuple[str, ...] = tuple(Request.__dataclass_fields__)


def canonical_json(value: Any, *, normalise: bool = False) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, no ambiguity.

    With ``normalise`` all text is brought into Unicode's normal form C first.

    Raises
    ------
    TypeError
        For anything but None, bool, int, float, str, lists, tuples and mappings with text keys.
    ValueError
        For NaN, infinities, circular values and text that is not valid Unicode, and for keys that
        only differ in their normal form.
    """
    try:
        text = json.dumps(
            _plain(value, normalise),
            sort_keys=True,
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
            check_circular=False,
        )
    except RecursionError as error:
        raise ValueError("circular or too deeply nested value") from error
    text.encode("utf-8")  # raises UnicodeEncodeError, a ValueError, on lone surrogates
    return text


def digest(value: Any) -> str:
    """Return the SHA-256 digest, in hexadecimal, of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()


def request_key(request: Request, fields: Collection[str] = FIELDS) -> str:
    """Return the cache key of ``request``: 64 hexadecimal digits.

    Parameters
    ----------
    request:
        The request.
    fields:
        Which fields count. Fewer than all of them makes an unsafe key, which is what the study of
        omitted fields measures; leave it alone elsewhere.

    Raises
    ------
    TypeError, ValueError
        If a field holds what JSON cannot say (see :func:`canonical_json`), or is unknown.
    """
    unknown = set(fields) - set(FIELDS)
    if unknown:
        raise ValueError(f"unknown key fields {sorted(unknown)}; known fields: {', '.join(FIELDS)}")
    return digest([KEY_VERSION, {name: getattr(request, name) for name in fields}])


def _composed(text: str) -> str:
    """Return a text in Unicode's normal form C; refuse marks that are heaped up without end.

    To put the marks of one letter in order takes the square of their number: a few megabytes of
    them would take hours, with every other thread held up.
    """
    if text.isascii():
        return text
    heaped = _heaped_marks()
    # In pieces, between which other threads have their turn.
    for start in range(0, len(text), _PIECE):
        if heaped.search(text, start, start + _PIECE + _MOST_MARKS):
            raise ValueError(f"more than {_MOST_MARKS} combining marks in a row")
    return unicodedata.normalize("NFC", text)


@lru_cache(maxsize=1)
def _heaped_marks() -> re.Pattern[str]:
    """Return a pattern of more marks than a letter has; all of Unicode's are in its first two planes."""
    marks = [
        sign
        for sign in map(chr, range(0x80, 0x20000))
        if unicodedata.combining(unicodedata.normalize("NFD", sign)[0])
    ]
    return re.compile(f"[{''.join(marks)}]{{{_MOST_MARKS + 1}}}")


def _plain(value: Any, normalise: bool) -> Any:
    """Return ``value`` built of dicts and lists only; refuse what JSON would blur."""
    if isinstance(value, str):
        return _composed(value) if normalise else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"key {name!r} is {type(name).__name__}, not text")
        plain = {_plain(name, normalise): _plain(item, normalise) for name, item in value.items()}
        if len(plain) != len(value):
            raise ValueError("two keys are one and the same in normal form")
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain(item, normalise) for item in value]
    raise TypeError(f"{type(value).__name__} has no canonical JSON form")
