"""What of a request decides about its answer: its keys, its parts, and the form it asks for."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvbench.caching.keys import DEFAULT_TEMPERATURE, canonical_json
from kvbench.caching.proxy.settings import Settings

#: Part of every key: raise it when the meaning of a part changes, and old entries expire unread.
_VERSION = b"kvbench/proxy/2"

#: ``whole`` is one JSON object; the others are server-sent events, the last with token counts.
Form = Literal["whole", "stream", "counted"]

#: Fields of a body under their own names in reasons and metrics; others are ``other``, because
#: a client may invent as many as it likes.
_NAMED = frozenset(
    """
    audio dimensions encoding_format frequency_penalty function_call functions input
    length_penalty logit_bias logprobs max_completion_tokens max_tokens metadata min_p
    modalities model n parallel_tool_calls prediction presence_penalty prompt_cache_key
    prompt_cache_retention reasoning_effort repetition_penalty response_format
    safety_identifier seed service_tier stop store stream_options temperature tool_choice tools
    top_k top_logprobs top_p user verbosity web_search_options
    """.split()  # noqa: SIM905
)


#: Most lists and objects of a body that is read.
_MOST_HOLDERS = 100_000

#: The parts of ``messages``. A slash keeps them apart from the fields of any API.
SYSTEM, HISTORY, ASKED = "messages/system", "messages/history", "messages/question"


class NotCacheable(Exception):
    """The request passes through; the text is the reason, a word or two."""


@dataclass(frozen=True)
class Question:
    """What of a request decides about its answer.

    Attributes
    ----------
    kind:
        ``chat`` or ``embeddings``.
    exact:
        Keyed digest, in hexadecimal, of tenant, path and the whole body but the form.
    context:
        The same without the text of the last user message.
    text:
        That text, or None where it is not plain text of one user message at the end.
    form:
        Form of the answer that is asked for.
    sampled:
        Whether the answer is one draw of many.
    parts:
        Digest of each part of the request by name: the fields of the body, and for ``messages``
        :data:`SYSTEM`, :data:`HISTORY` and :data:`ASKED`.
    """

    kind: Literal["chat", "embeddings"]
    exact: str
    context: str
    text: str | None
    form: Form
    sampled: bool
    parts: Mapping[str, bytes]


def question_of(
    body: Mapping[str, Any],
    settings: Settings,
    tenant: bytes = b"",
    path: str = "/chat/completions",
    secret: bytes = b"",
) -> Question:
    """Return the keys of a request to a cached path.

    Raises
    ------
    NotCacheable
        If there is no key, because the body holds what JSON cannot say without loss or a field
        has a type that the API does not know.
    """
    chat = not path.split("?")[0].rstrip("/").endswith("/embeddings")
    fields: dict[str, Any] = {
        name: value for name, value in body.items() if name not in settings.ignored_fields
    }
    form: Form = "whole"
    text = None
    if chat:
        form = _form(fields)
        messages = fields.pop("messages", None)
        if not isinstance(messages, list) or not messages:
            raise NotCacheable("no messages")
        text = _take_apart(messages, fields)
    try:
        parts = {
            name: _digest(canonical_json(value, normalise=True).encode(), secret)
            for name, value in fields.items()
        }
    except (TypeError, ValueError) as error:
        raise NotCacheable("not plain JSON") from error
    head = [_VERSION, tenant, path.encode()]
    rest = [item for name in sorted(parts) for item in (name.encode(), parts[name])]
    other = [
        item for name in sorted(parts) if name != ASKED for item in (name.encode(), parts[name])
    ]
    return Question(
        kind="chat" if chat else "embeddings",
        exact=_combined([*head, *rest], secret).hex(),
        context=_combined([*head, b"context", *other], secret).hex(),
        text=text,
        form=form,
        sampled=chat and _sampled(body, settings),
        parts=parts,
    )


def parsed(body: bytes, encoding: str, settings: Settings) -> dict[str, Any]:
    """Return the JSON object of a body.

    Parameters
    ----------
    body:
        As it was received.
    encoding:
        Its ``Content-Encoding``, or "".

    Raises
    ------
    NotCacheable
        If it is no JSON object, repeats a name, is nested deeper than the settings allow, holds
        very many lists and objects (each takes a hundred times its bytes), or is compressed in a
        way that is not read here or to more than a request may hold.
    """
    if encoding not in ("", "identity"):
        body = _inflated(body, encoding, settings.max_request_bytes)
    if body.count(b"[") + body.count(b"{") > _MOST_HOLDERS:
        raise NotCacheable("nesting")
    try:
        fields = json.loads(body, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise NotCacheable("not JSON") from error
    if not isinstance(fields, dict):
        raise NotCacheable("not a JSON object")
    if _depth_exceeds(fields, settings.max_nesting):
        raise NotCacheable("nesting")
    return fields


def without(parts: Mapping[str, bytes], name: str | None) -> bytes:
    """Return a digest of all parts but one (or of all): equal for requests that share the rest."""
    items = [item for key in sorted(parts) if key != name for item in (key.encode(), parts[key])]
    return _combined(items, b"")[:12]


def label(part: str) -> str:
    """Return the name of a part as it may stand in reasons and metrics."""
    if part in (SYSTEM, HISTORY, ASKED):
        return part.removeprefix("messages/")
    return part if part in _NAMED else "other"


def _take_apart(messages: list[Any], fields: dict[str, Any]) -> str | None:
    """Replace ``messages`` by its parts in ``fields``; return the text of the question.

    The parts keep their places in the list, so that together they say what the list said.
    """
    if not fields.keys().isdisjoint((SYSTEM, HISTORY, ASKED)):
        raise NotCacheable("unknown field")
    text = None
    places = list(enumerate(messages))
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") == "user":
        if isinstance(last.get("content"), str):
            text = last["content"]
        places[-1] = (places[-1][0], {**last, "content": None})
        fields[ASKED] = last.get("content")
    instructing = ("system", "developer")
    fields[SYSTEM] = [
        [place, message]
        for place, message in places
        if isinstance(message, dict) and message.get("role") in instructing
    ]
    fields[HISTORY] = [
        [place, message]
        for place, message in places
        if not (isinstance(message, dict) and message.get("role") in instructing)
    ]
    return text


def _form(fields: dict[str, Any]) -> Form:
    """Take the form of the answer out of the fields of the key."""
    stream = fields.pop("stream", None)
    if stream is not None and not isinstance(stream, bool):
        raise NotCacheable("stream is no boolean")
    options = fields.pop("stream_options", None)
    counted = False
    if options is not None:
        if not isinstance(options, dict):
            raise NotCacheable("stream_options is no object")
        counted = options.get("include_usage") is True
        rest = {name: value for name, value in options.items() if name != "include_usage"}
        if rest:
            fields["stream_options"] = rest
    if not stream:
        return "whole"
    return "counted" if counted else "stream"


def _sampled(body: Mapping[str, Any], settings: Settings) -> bool:
    """Whether the answer is one draw of many, by the rule of the model.

    A temperature that is no number is refused: what a server makes of it is anyone's guess.
    """
    temperature = body.get("temperature")
    if temperature is None:
        temperature = DEFAULT_TEMPERATURE
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, (int, float))
        or not abs(temperature) < math.inf
    ):
        raise NotCacheable("temperature is no number")
    rule = settings.rule(body.get("model"))
    if rule in ("always", "never"):
        return rule == "never"
    seed = body.get("seed")
    seeded = rule == "seed" and isinstance(seed, int) and not isinstance(seed, bool)
    return temperature != 0 and not seeded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise NotCacheable("duplicate name")
    return fields


def _depth_exceeds(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper than ``most``."""
    level = [value]
    for _ in range(most + 1):
        level = [
            item
            for holder in level
            if isinstance(holder, (dict, list))
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _inflated(body: bytes, encoding: str, most: int) -> bytes:
    """Return a body without its compression, bounded: a few bytes may stand for gigabytes."""
    windows = {"gzip": 31, "x-gzip": 31, "deflate": 15}
    if encoding not in windows:
        raise NotCacheable("content encoding")
    machine = zlib.decompressobj(windows[encoding])
    try:
        plain = machine.decompress(body, most + 1)
    except zlib.error as error:
        raise NotCacheable("content encoding") from error
    if len(plain) > most or not machine.eof or machine.unused_data:
        raise NotCacheable("content encoding")
    return plain


def _digest(data: bytes, secret: bytes) -> bytes:
    return hashlib.blake2b(data, key=secret, digest_size=32).digest()


def _combined(items: Iterable[bytes], secret: bytes) -> bytes:
    digest = hashlib.blake2b(key=secret, digest_size=32)
    for item in items:
        digest.update(b"%d:" % len(item))
        digest.update(item)
    return digest.digest()
