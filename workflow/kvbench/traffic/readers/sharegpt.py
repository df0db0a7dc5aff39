"""ShareGPT JSON: conversations without times; every question becomes a request with its history."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from kvbench.traffic.readers.base import LONGEST_LINE, Format, Malformed, Request, document

_ASKING = {"human", "user"}
_ANSWERING = {"gpt", "assistant", "chatgpt", "model", "bing", "bard"}
_SYSTEM = {"system"}
_CHUNK = 2**20


class ShareGPT(Format):
    """A list of objects with ``conversations: [{from, value}]``; the file's order is the order."""

    name = "sharegpt"
    title = "ShareGPT JSON (conversations: [{from, value}])"
    rank = 3
    record = "conversation"

    @classmethod
    def matches(cls, lines: Sequence[str]) -> bool:
        """Whether a list of objects begins, in one of the two usual spellings."""
        head = " ".join(lines)
        if head.lstrip().startswith("["):
            return '"conversations"' in head
        return head.lstrip().startswith("{") and '"conversations"' in lines[0]

    def records(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Objects of a list one by one, without reading the list whole; or one object a line."""
        for number, text in enumerate(_objects(stream), start=1):
            yield number, text.encode("utf-8", "surrogatepass")

    def parse(self, text: str) -> Iterable[Request]:
        """One request per question of a conversation."""
        found = document(text)
        turns = found.get("conversations")
        if not isinstance(turns, list):
            raise Malformed("conversations is missing; it must be a list of {from, value}")
        name = str(found.get("id", ""))
        return list(self._requests(turns, name))

    def _requests(self, turns: list[Any], name: str) -> Iterator[Request]:
        history: list[tuple[str, str]] = []
        for place, turn in enumerate(turns):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise Malformed(f"conversations[{place}] is no {{from, value}} with a text")
            role, text = _role(turn), turn["value"]
            if role in _ASKING:
                following = turns[place + 1] if place + 1 < len(turns) else None
                answer = None
                if isinstance(following, dict) and _role(following) in _ANSWERING:
                    answer = following.get("value")
                asked = [*history, ("user", text)]
                yield Request(
                    identity=asked,
                    client=name or None,
                    prompt="".join(f"{who}\n{said}\n" for who, said in asked),
                    question=text,
                    context=list(history),
                    answer_bytes=_size(answer) if isinstance(answer, str) else None,
                )
            elif role not in _ANSWERING | _SYSTEM:
                raise Malformed(f"conversations[{place}].from is {role[:20]!r}; use human or gpt")
            known = "user" if role in _ASKING else "system" if role in _SYSTEM else "assistant"
            history.append((known, text))


def _role(turn: dict[str, Any]) -> str:
    return str(turn.get("from", "")).lower()


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _objects(stream: BinaryIO) -> Iterator[str]:
    """Texts of the objects at the top of a JSON list, or of several objects one after the other."""
    decoder, scan = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    pending, ended = "", False
    while not ended or pending.strip(" \t\r\n,[]"):
        trimmed = pending.lstrip(" \t\r\n,[]")
        try:
            if not trimmed:
                raise ValueError("nothing yet")
            _found, end = scan.raw_decode(trimmed)
            yield trimmed[:end]
            pending = trimmed[end:]
            continue
        except ValueError:
            if ended or len(trimmed) > LONGEST_LINE:
                # What is left is no JSON: the caller's parser says so, with its number.
                yield trimmed
                return
            pending = trimmed
        # Doubling keeps the number of attempts at a long object small.
        chunk = stream.read(max(_CHUNK, len(pending)))
        ended = not chunk
        pending += decoder.decode(chunk, final=ended)
