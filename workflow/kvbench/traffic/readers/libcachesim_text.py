"""libCacheSim text: one key a line, in the order of the requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvbench.traffic.readers.base import Format, Malformed, Request


class LibCacheSimText(Format):
    """A key is whatever stands on the line: no blanks, commas or brackets within it."""

    name = "libcachesim-text"
    title = "libCacheSim text (one key a line)"
    rank = 0

    @classmethod
    def matches(cls, lines: Sequence[str]) -> bool:
        """Whether the first line is a single word."""
        return _is_key(lines[0])

    def parse(self, text: str) -> Iterable[Request]:
        """The request of one line."""
        if not _is_key(text):
            raise Malformed("more than one word on the line; a key is one word")
        return [Request(identity=text.strip())]


def _is_key(line: str) -> bool:
    word = line.strip()
    return bool(word) and word.isprintable() and not any(c in word for c in " \t,;{}[]\"'")
