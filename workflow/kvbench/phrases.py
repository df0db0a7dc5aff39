"""A phrase book: texts that the program composes in English, said in another language.

A book maps each phrase to its translation; ``{}`` stands for anything, ``{n}`` for a number. What is no
phrase is parted at line breaks, dots, colons, commas and brackets, and names of models, machines and
scenarios stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Where a text that is no phrase is parted, the widest first.
_JOINTS = ("\n", " · ", "; ", ": ", ", ", " / ", " | ")
#: Outside of brackets.
_OUTSIDE = r"(?![^()]*\))"
#: A number that stands by itself or before a unit: not part of a name such as ``llama-3.2-1b``.
_NUMBER = re.compile(r"(?<![\w.,-])[-−]?\d[\d,]*(?:\.\d+)?(?![\w.-]*[A-Za-z_]{3})(?![\d.])")
#: A text without any word: numbers, signs and the units that all languages share.
_WORDLESS = re.compile(
    r"[^A-Za-z]*(?:(?:[eE]|x|[kKMG]i?B|ms|s|µs|us|k|M|n|p\d+|MiB|GiB)?[^A-Za-z]*)*"
)


#: What stands for a part in a phrase: anything, or a number.
_PLACE = re.compile(r"\{n?\}")


def _pattern(phrase: str) -> str:
    pieces, last = [], 0
    for place in _PLACE.finditer(phrase):
        pieces.append(re.escape(phrase[last : place.start()]))
        pieces.append(r"([\d.,]+)" if place.group() == "{n}" else "(.+?)")
        last = place.end()
    return "".join([*pieces, re.escape(phrase[last:])])


class Phrases:
    """The phrase book of one language.

    Parameters
    ----------
    words:
        Phrase to translation. In both ``{}`` and ``{n}`` stand for parts, themselves looked up, which
        keep their order.
    decimal:
        The decimal sign.
    """

    def __init__(self, words: Mapping[str, str], decimal: str = ",") -> None:
        self.words = words
        self.decimal = decimal
        self.patterns = [
            (re.compile(_pattern(phrase), re.S), said)
            for phrase, said in words.items()
            if _PLACE.search(phrase)
        ]
        #: Parts with letters that no phrase covers; names are among them.
        self.unknown: set[str] = set()

    def say(self, text: str) -> str:
        """A text in the language."""
        if not text.strip():
            return text
        if text in self.words:
            return self.words[text]
        if text.endswith(" *"):
            return f"{self.say(text[:-2])} *"
        if found := re.fullmatch(r"([^()]+?)( ?)\(([^()]+)\)", text):
            before, blank, inside = found.groups()
            return f"{self.say(before)}{blank}({self.say(inside)})"
        for pattern, said in self.patterns:
            if found := pattern.fullmatch(text):
                parts = tuple(map(self.say, found.groups()))
                return _PLACE.sub("%s", said.replace("%", "%%")) % parts
        for joint in _JOINTS:
            parted = re.split(re.escape(joint) + _OUTSIDE, text)
            if len(parted) > 1:
                return joint.join(map(self.say, parted))
        if not _WORDLESS.fullmatch(text):
            self.unknown.add(text)
        return self.numbers(text)

    def numbers(self, text: str) -> str:
        """Decimal points and thousands' commas as the language writes them."""
        if self.decimal == ".":
            return text
        swap = {",": ".", ".": ","}
        return _NUMBER.sub(lambda found: "".join(swap.get(c, c) for c in found[0]), text)
