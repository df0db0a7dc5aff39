"""Whether an answer is whole, what it cost, and how it reads in the other form.

A chat answer comes as one JSON object or as a stream of events. The bytes that a server sent are
served again as they are to whoever asks for the same form; the other form is made from them, and
only where nothing is lost: an answer with fields that are not known here is not translated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kvbench.caching.proxy.questions import Form

#: Content type of a stream.
EVENTS = "text/event-stream"

#: Fields of a message (or delta) that both forms have; empty ones may be left out of either.
_TEXTS = ("content", "reasoning_content", "reasoning")
_EMPTY = ("refusal", "tool_calls", "function_call", "audio", "annotations")
_HEAD = ("id", "created", "model", "system_fingerprint", "service_tier")


def is_stream(content_type: str) -> bool:
    """Whether a content type names server-sent events."""
    return content_type.split(";")[0].strip().lower() == EVENTS


def finish_reason(body: bytes, content_type: str) -> str | None:
    """Return why a complete chat answer ended, or None if it is not one that says something.

    ``stop`` and ``length`` as the server says; None for rubbish, errors, several choices, empty
    text, tool calls, and for a stream without a ``finish_reason`` or with an error in it.
    """
    try:
        if is_stream(content_type):
            return _stream_finish(body)
        answer = json.loads(body)
        (choice,) = answer["choices"]
        message = choice["message"]
        if answer.get("error") or message.get("tool_calls") or message.get("refusal"):
            return None
        content, reason = message.get("content"), choice.get("finish_reason")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(content, str) or not content:
        return None
    return reason if isinstance(reason, str) else None


def has_embeddings(body: bytes) -> bool:
    """Whether a body is a complete answer of the embeddings API."""
    try:
        answer = json.loads(body)
        data = answer["data"]
        return bool(data) and not answer.get("error") and all(item["embedding"] for item in data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def usage(body: bytes, content_type: str) -> tuple[int, int] | None:
    """Return prompt and completion tokens as the server counted them; None if it did not."""
    try:
        if is_stream(content_type):
            counted = [chunk["usage"] for chunk in _chunks(body) if chunk.get("usage")]
            found = counted[-1] if counted else None
        else:
            found = json.loads(body).get("usage")
        if found is None:
            return None
        tokens = int(found.get("prompt_tokens") or 0), int(found.get("completion_tokens") or 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return tokens if min(tokens) >= 0 else None


def form_of(content_type: str, asked: Form) -> Form:
    """Return the form in which an answer came to somebody who asked for ``asked``."""
    if not is_stream(content_type):
        return "whole"
    return "stream" if asked == "whole" else asked


def translated(body: bytes, came: Form, wanted: Form) -> bytes | None:
    """Return a complete answer in another form; None if that form cannot be had without loss."""
    if came == wanted:
        return body
    try:
        if came == "whole":
            return _as_stream(json.loads(body), counted=wanted == "counted")
        if wanted == "whole":
            return _as_whole(list(_chunks(body)))
        if wanted == "stream":
            return _uncounted(body)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    # Counts that the server did not send are not made up.
    return None


def content_type_of(form: Form) -> str:
    """Return the content type of an answer that was made here."""
    return "application/json" if form == "whole" else f"{EVENTS}; charset=utf-8"


def _stream_finish(body: bytes) -> str | None:
    """Like :func:`finish_reason` for server-sent events; the last event must be whole."""
    if not body.decode("utf-8").replace("\r\n", "\n").endswith("\n\n"):
        return None
    said, reason = False, None
    for chunk in _chunks(body):
        if "error" in chunk:
            return None
        for choice in chunk.get("choices", []):
            delta = choice.get("delta") or {}
            if choice.get("index", 0) != 0 or delta.get("tool_calls") or delta.get("refusal"):
                return None
            said = said or bool(delta.get("content"))
            reason = choice.get("finish_reason") or reason
    return reason if said else None


def _chunks(body: bytes) -> Iterator[Any]:
    """Yield what the events of a stream carry, the closing ``[DONE]`` left out."""
    for line in body.decode("utf-8").replace("\r\n", "\n").split("\n"):
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data != "[DONE]":
                yield json.loads(data)


def _event(chunk: Mapping[str, Any]) -> bytes:
    return (
        b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


def _check_known(fields: Mapping[str, Any], known: tuple[str, ...], empty: tuple[str, ...]) -> None:
    """Raise ValueError for a field that the other form would lose."""
    for name, value in fields.items():
        if name not in known and not (name in empty and not value):
            raise ValueError(f"unknown field {name}")


def _as_stream(answer: Mapping[str, Any], counted: bool) -> bytes | None:
    """Return one JSON answer as events: role, text, end, and the counts if they are wanted."""
    (choice,) = answer["choices"]
    message = choice["message"]
    if counted and not answer.get("usage"):
        return None
    _check_known(answer, (*_HEAD, "object", "choices", "usage"), ())
    _check_known(choice, ("index", "message", "finish_reason", "logprobs"), ("stop_reason",))
    _check_known(message, ("role", *_TEXTS), _EMPTY)
    head = {name: answer[name] for name in _HEAD if name in answer}
    head = {"object": "chat.completion.chunk", **head}
    texts = {name: message[name] for name in _TEXTS if message.get(name)}
    last = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    said: dict[str, Any] = {"index": 0, "delta": texts, "finish_reason": None}
    if choice.get("logprobs") is not None:
        said["logprobs"] = choice["logprobs"]
    first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    open_count = {"usage": None} if counted else {}
    events = [_event({**head, "choices": [one], **open_count}) for one in (first, said, last)]
    if counted:
        events.append(_event({**head, "choices": [], "usage": answer["usage"]}))
    return b"".join(events) + b"data: [DONE]\n\n"


def _as_whole(chunks: list[Mapping[str, Any]]) -> bytes:
    """Return the events of a stream as one JSON answer."""
    head = {name: chunks[0][name] for name in _HEAD if name in chunks[0]}
    texts = dict.fromkeys(_TEXTS, "")
    logprobs: dict[str, list[Any]] = {}
    reason, counts = None, None
    for chunk in chunks:
        _check_known(chunk, (*_HEAD, "object", "choices", "usage"), ("obfuscation",))
        counts = chunk.get("usage") or counts
        for choice in chunk["choices"]:
            _check_known(choice, ("index", "delta", "finish_reason", "logprobs"), ("stop_reason",))
            delta = choice.get("delta") or {}
            _check_known(delta, ("role", *_TEXTS), _EMPTY)
            for name in _TEXTS:
                texts[name] += delta.get(name) or ""
            for name, values in (choice.get("logprobs") or {}).items():
                logprobs.setdefault(name, []).extend(values or [])
            reason = choice.get("finish_reason") or reason
    message = {"role": "assistant", "content": texts.pop("content")}
    message |= {name: text for name, text in texts.items() if text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    if logprobs:
        choice["logprobs"] = logprobs
    answer = {"object": "chat.completion", **head, "choices": [choice]}
    if counts:
        answer["usage"] = counts
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def _uncounted(body: bytes) -> bytes:
    """Return a stream without the token counts that were asked for with it."""
    events = []
    for event in body.decode("utf-8").replace("\r\n", "\n").split("\n\n"):
        if event.startswith("data:") and event.removeprefix("data:").strip() != "[DONE]":
            chunk = json.loads(event.removeprefix("data:"))
            if "usage" in chunk:
                del chunk["usage"]
                if not chunk["choices"]:
                    continue
                events.append(_event(chunk))
                continue
        if event:
            events.append(event.encode() + b"\n\n")
    return b"".join(events)
