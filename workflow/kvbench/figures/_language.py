"""The words of a figure in another language: what its module writes in English, replaced before saving.

Modules write English. ``words.<language>.yaml`` maps each phrase to its translation; ``{}`` stands for
anything, ``{n}`` for a number. What is no phrase is parted at line breaks, dots, colons, commas and
brackets, and names of models, machines and scenarios stay as they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import Formatter

from kvbench import documents
from kvbench.strategies import looks

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
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


@cache
def phrases(language: str) -> Phrases:
    """The phrase book of a language other than English, with the labels of the strategies."""
    labels = looks.labels(looks.LOOKS, language)
    named = {look.label: labels[name] for name, look in looks.LOOKS.items()}
    named |= looks.words_of_options()
    return Phrases(named | documents.read_yaml(_FOLDER / f"words.{language}.yaml"))


class _Said(Formatter):
    """Tick labels of another formatter, in the language."""

    def __init__(self, inner: Formatter, book: Phrases) -> None:
        self.inner, self.book = inner, book

    def set_axis(self, axis) -> None:
        super().set_axis(axis)
        self.inner.set_axis(axis)

    def set_locs(self, locs) -> None:
        self.locs = locs
        self.inner.set_locs(locs)

    def __call__(self, x, pos=None) -> str:
        return self.book.say(self.inner(x, pos))

    def format_ticks(self, values) -> list[str]:
        return [self.book.say(text) for text in self.inner.format_ticks(values)]

    def get_offset(self) -> str:
        return self.book.say(self.inner.get_offset())


def _all_axes(figure: Figure) -> Iterator:
    yield from figure.axes
    for part in getattr(figure, "subfigs", ()):
        yield from _all_axes(part)


def localise(figure: Figure, language: str) -> Sequence[str]:
    """Put a figure into a language; English is what it was drawn in.

    Returns
    -------
    sequence of str
        Parts of its texts that the phrase book does not know: names, or phrases that it lacks.
    """
    if language == "en":
        return []
    book = phrases(language)
    book.unknown.clear()
    axes = list(dict.fromkeys(_all_axes(figure)))
    ticks = set()
    for ax in axes:
        for axis in (ax.xaxis, ax.yaxis):
            for which in ("major", "minor"):
                formatter = getattr(axis, f"get_{which}_formatter")()
                if not isinstance(formatter, _Said):
                    getattr(axis, f"set_{which}_formatter")(_Said(formatter, book))
            ticks |= {
                id(label)
                for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
                for label in (tick.label1, tick.label2)
            }
    for text in figure.findobj(Text):
        if id(text) not in ticks:
            text.set_text(book.say(text.get_text()))
    return sorted(book.unknown)
