"""Why a lookup missed: which one part of the request would have had to be as it was before."""

from __future__ import annotations

from collections import OrderedDict

from kvbench.caching.proxy.questions import ASKED, Question, label, without

#: What is remembered of each request: one short digest for each of its parts, and one of it all.
_MOST = 65_536


class Reasons:
    """Remembers digests of recent requests, bounded, tenants apart."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._rests: OrderedDict[bytes, None] = OrderedDict()
        self._outcomes: OrderedDict[str, str] = OrderedDict()

    def explain(self, question: Question, tenant: bytes) -> tuple[str, list[str]]:
        """Return why nothing is stored for a question, and the parts that alone are new.

        The reason is what became of the same request before, or ``<part> changed`` if an earlier
        request differed in that part only (the question itself before others, because that is
        what traffic is made of), or ``new``.
        """
        if question.exact in self._outcomes:
            return self._outcomes[question.exact], []
        rests = {part: without(question.parts, part, tenant) for part in question.parts}
        changed = [part for part, rest in rests.items() if rest in self._rests]
        for rest in rests.values():
            self._rests[rest] = None
            self._rests.move_to_end(rest)
        while len(self._rests) > self._most:
            self._rests.popitem(last=False)
        if not changed:
            return "new", []
        first = ASKED if ASKED in changed else changed[0]
        return f"{label(first)} changed", [label(part) for part in changed if part != ASKED]

    def note(self, question: Question, outcome: str) -> None:
        """Remember what became of a request's answer: ``expired`` later, or why it was not kept."""
        self._outcomes[question.exact] = outcome
        self._outcomes.move_to_end(question.exact)
        while len(self._outcomes) > self._most // 8:
            self._outcomes.popitem(last=False)
