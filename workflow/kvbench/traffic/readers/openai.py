"""OpenAI request bodies, one a line or in a list, with or without timestamp, response, usage, user."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvbench.traffic.readers.base import Malformed, Objects, Request, document, length, seconds

#: Fields that hold what is asked: of chat completions, of completions, of the Responses API.
_PROMPTS = ("messages", "prompt", "input")
#: Fields that engines write into the prompt before the first message, in this order.
_BEFORE = ("tools", "functions", "instructions", "system")
_TIMES = ("timestamp", "time", "ts", "created_at", "created")
#: Fields that say who asks, when, how the answer travels or what became of it; not what it is.
_NOT_IDENTITY = {
    *("user", "safety_identifier", "session_id", "conversation_id"),
    *("id", "request_id", "custom_id", "trace_id", "metadata"),
    *("stream", "stream_options", "store", "service_tier", "prompt_cache_key"),
    *("response", "usage", "status", "status_code", "latency", "latency_ms", "duration_ms"),
    *_TIMES,
}
#: How a line of a streamed response begins.
_EVENT = "data:"
#: Names of the two lengths in ``usage``: of chat completions, and of the Responses API.
_USAGE = {
    "input": ("prompt_tokens", "input_tokens"),
    "output": ("completion_tokens", "output_tokens"),
}


class OpenAI(Objects):
    """Bodies (``messages``, ``prompt`` or ``input``), or objects that hold one as ``body``.

    What engines write before the first message (tools, instructions) is part of the prompt. The
    wrapper of the batch API (``custom_id``, ``method``, ``url``, ``body``) and wrappers named
    ``request`` are taken alike. ``timestamp``, ``response``, ``usage`` and ``user`` may stand in
    the wrapper or in the body.
    """

    name = "openai"
    title = "OpenAI request bodies, JSONL or a JSON list (messages)"
    rank = 2

    @classmethod
    def matches(cls, lines: Sequence[str]) -> bool:
        """Whether one of the first lines, or of the first items of a list, has messages."""
        if lines[0].lstrip().startswith("["):
            return _in_list("\n".join(lines))
        for line in lines:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                if any(f'"{name}"' in line for name in _PROMPTS):
                    return line.lstrip().startswith("{")
                continue
            if isinstance(found, dict) and _asks(_body(found)):
                return True
        return False

    def parse(self, text: str) -> Iterable[Request]:
        """The request of one line."""
        outer = document(text)
        body = _body(outer)
        messages = _messages(body)
        response = outer.get("response", body.get("response"))
        usage = outer.get("usage") or body.get("usage") or _inside(response).get("usage") or {}
        if not isinstance(usage, Mapping):
            raise Malformed("usage must be an object")
        moment = next((box[k] for box in (outer, body) for k in _TIMES if k in box), None)
        client = outer.get("user", body.get("user"))
        asking = [place for place, message in enumerate(messages) if message[0] == "user"]
        last = asking[-1] if asking else len(messages) - 1
        rest = {key: value for key, value in body.items() if key not in _NOT_IDENTITY | {*_PROMPTS}}
        settings = json.dumps(rest, sort_keys=True)
        answer = _answer(response)
        tokens = {
            name: length(usage[key], f"usage.{key}")
            for name, keys in _USAGE.items()
            for key in keys
            if usage.get(key) is not None
        }
        return [
            Request(
                identity=(messages, settings),
                time_s=None if moment is None else seconds(moment),
                client=None if client is None else str(client),
                input_tokens=tokens.get("input"),
                output_tokens=tokens.get("output"),
                prompt="".join(f"{role}\n{said}\n" for role, said in _before(body) + messages),
                question=messages[last][1],
                context=(messages[:last], messages[last + 1 :], settings),
                answer_bytes=None if answer is None else len(answer.encode("utf-8", "replace")),
                # What is not said is 1, the API's own default.
                sampled=body.get("temperature", 1) not in (0, 0.0),
            )
        ]


def _in_list(head: str) -> bool:
    """Whether a JSON list that begins like this holds bodies."""
    scan, place = json.JSONDecoder(), head.index("[") + 1
    while place < len(head):
        if head[place] in " \t\r\n,":
            place += 1
            continue
        try:
            found, place = scan.raw_decode(head, place)
        except (ValueError, RecursionError):
            # The beginning of a log ends within an item; its names may stand there already.
            return any(f'"{name}"' in head[place:] for name in _PROMPTS)
        if isinstance(found, dict) and _asks(_body(found)):
            return True
    return False


def _body(outer: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("body", "request"):
        if isinstance(outer.get(key), Mapping):
            return outer[key]
    return outer


def _asks(body: Mapping[str, Any]) -> bool:
    """Whether an object is a body: ``input`` alone is a name that others use too."""
    return "messages" in body or "prompt" in body or {"input", "model"} <= set(body)


def _before(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What engines write before the first message, as if it were messages."""
    return [
        (name, text if isinstance(text, str) else json.dumps(text))
        for name in _BEFORE
        if (text := body.get(name))
    ]


def _messages(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    field = next((name for name in _PROMPTS if body.get(name) is not None), "messages")
    found = body.get(field)
    if field != "messages" and isinstance(found, str):
        return [("user", found)]
    if field == "prompt":
        raise Malformed("prompt must be a text; log each text of a list as a request of its own")
    if not isinstance(found, list) or not found:
        raise Malformed(f"{field} is missing or empty; it must be a list of {{role, content}}")
    messages = []
    for place, message in enumerate(found):
        if field == "input" and isinstance(message, Mapping) and "type" in message:
            # Calls of tools and their results have a type in place of a role.
            message = {"role": message["type"], **message}
        if not isinstance(message, Mapping) or "role" not in message:
            raise Malformed(f"{field}[{place}] has no role")
        content = message.get("content")
        if content is None or isinstance(content, list | Mapping):
            # Parts, images and tool calls: their JSON is what stands for them.
            content = _parts(content, message)
        elif not isinstance(content, str):
            raise Malformed(f"{field}[{place}].content must be a text or a list of parts")
        elif message.get("tool_calls"):
            content += json.dumps(message["tool_calls"], sort_keys=True)
        messages.append((str(message["role"]), content))
    return messages


def _parts(content: Any, message: Mapping[str, Any]) -> str:
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    rest = {key: value for key, value in message.items() if key != "role"}
    return json.dumps(rest, sort_keys=True)


def _inside(response: Any) -> Mapping[str, Any]:
    if isinstance(response, str) and response.startswith(_EVENT):
        # The last event tells the lengths, if it was asked to.
        return next((one for one in reversed(_events(response)) if one.get("usage")), {})
    if isinstance(response, Mapping):
        body = response.get("body")
        return body if isinstance(body, Mapping) else response
    return {}


def _events(stream: str) -> list[Mapping[str, Any]]:
    """The objects of a streamed response that was logged as it went over the wire."""
    found = []
    for line in stream.splitlines():
        try:
            event = json.loads(line.removeprefix(_EVENT)) if line.startswith(_EVENT) else None
        except (ValueError, RecursionError):
            continue  # The end ([DONE]), or an event that was cut short.
        if isinstance(event, Mapping):
            found.append(event)
    return found


def _piece(event: Mapping[str, Any]) -> str:
    """The text of the first choice that an event adds; of the Responses API, its delta."""
    choices = event.get("choices")
    if not isinstance(choices, list):
        delta = event.get("delta")
        return delta if isinstance(delta, str) else ""
    for choice in choices:
        if isinstance(choice, Mapping) and choice.get("index", 0) == 0:
            delta = choice.get("delta")
            text = delta.get("content") if isinstance(delta, Mapping) else choice.get("text")
            return text if isinstance(text, str) else ""
    return ""


def _answer(response: Any) -> str | None:
    """The text of an answer: plain, or within the first choice."""
    if isinstance(response, str):
        return (
            response if not response.startswith(_EVENT) else "".join(map(_piece, _events(response)))
        )
    choices = _inside(response).get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        message = choices[0].get("message")
        text = message.get("content") if isinstance(message, Mapping) else choices[0].get("text")
        return text if isinstance(text, str) else None
    return None
