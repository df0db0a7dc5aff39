"""ShareGPT JSON: conversations without times; every question becomes a request with its history."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvbench.traffic.readers.base import Malformed, Objects, Request, document

_ASKING = {"human", "user"}
_ANSWERING = {"gpt", "assistant", "chatgpt", "model", "bing", "bard"}
_SYSTEM = {"system"}


class ShareGPT(Objects):
    """Objects with ``conversations: [{from, value}]``; the file's order is the order."""

    name = "sharegpt"
    title = "ShareGPT JSON (conversations: [{from, value}])"
    rank = 3
    item = "conversation"

    @classmethod
    def matches(cls, lines: Sequence[str]) -> bool:
        """Whether a list of objects begins, in one of the two usual spellings."""
        head = " ".join(lines)
        if head.lstrip().startswith("["):
            return '"conversations"' in head
        return head.lstrip().startswith("{") and '"conversations"' in lines[0]

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
