"""Why a lookup missed: which one part of the request would have had to be as it was before."""

from __future__ import annotations

from collections import OrderedDict

from kvbench.caching.proxy.questions import ASKED, Question, label, without

#: Most digests that are remembered: two for each part of a request, and one of it all.
_MOST = 50_000
#: Most parts of a request that are compared: the work is the square of it, and no API has as many.
_MOST_PARTS = 100


class Reasons:
    """Remembers digests of recent requests, bounded, tenants apart."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        #: Digest of a request without one part, by that part; and the part, by the digest alone.
        self._rests: OrderedDict[tuple[bytes, bytes, str | None], str | None] = OrderedDict()
        self._outcomes: OrderedDict[str, str] = OrderedDict()

    def explain(self, question: Question, tenant: bytes) -> tuple[str, list[str]]:
        """Return why nothing is stored for a question, and the parts that alone are new.

        The reason is what became of the same request before, or ``<part> changed`` if an earlier
        request differed in that part only (the question itself before others, because that is
        what traffic is made of), or ``new``. A part that came or went has changed, too.
        """
        if question.exact in self._outcomes:
            return self._outcomes[question.exact], []
        if len(question.parts) > _MOST_PARTS:
            return "new", []
        rests = {part: without(question.parts, part) for part in question.parts}
        whole = without(question.parts, None)
        changed = [
            part
            for part, rest in rests.items()
            if (tenant, rest, part) in self._rests or (tenant, rest, "") in self._rests
        ]
        gone = self._rests.get((tenant, whole, None))
        changed += [gone] if gone else []
        for part, rest in rests.items():
            self._rests[tenant, rest, part] = None
            self._rests[tenant, rest, None] = part
        self._rests[tenant, whole, ""] = None
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
