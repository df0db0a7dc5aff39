"""The words of a figure in another language: what its module writes in English, replaced before saving.

Modules write English. ``words.<language>.yaml`` maps each phrase to its translation, as
:class:`kvbench.phrases.Phrases` reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import Formatter

from kvbench import documents
from kvbench.phrases import Phrases
from kvbench.strategies import looks

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent


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


#: Attribute of a figure that brings words of its own, which no phrase book can know.
_OWN = "words_by_language"


def bring(figure: Figure, words: Mapping[str, Mapping[str, str]]) -> None:
    """Give a figure words that come from its data: language to phrase to translation."""
    setattr(figure, _OWN, words)


@contextmanager
def spoken(figure: Figure, language: str) -> Iterator[None]:
    """Put a figure into a language for as long as the block lasts; behind it it is English again."""
    texts = {text: text.get_text() for text in figure.findobj(Text)}
    formatters = [(axis, which, _formatter(axis, which)) for axis, which in _scales(figure)]
    localise(figure, language)
    yield
    for axis, which, formatter in formatters:
        if _formatter(axis, which) is not formatter:
            getattr(axis, f"set_{which}_formatter")(formatter)
    for text, english in texts.items():
        text.set_text(english)


def _scales(figure: Figure) -> Iterator[tuple[Axis, str]]:
    """Each axis of a figure with its major and with its minor ticks."""
    for ax in dict.fromkeys(_all_axes(figure)):
        for axis in (ax.xaxis, ax.yaxis):
            yield from ((axis, which) for which in ("major", "minor"))


def _formatter(axis: Axis, which: str) -> Formatter:
    return getattr(axis, f"get_{which}_formatter")()


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
    if own := getattr(figure, _OWN, None):
        book = Phrases(book.words | own[language], book.decimal)
    book.unknown.clear()
    ticks = set()
    for axis, which in _scales(figure):
        formatter = _formatter(axis, which)
        if not isinstance(formatter, _Said):
            getattr(axis, f"set_{which}_formatter")(_Said(formatter, book))
        ticks |= {
            id(label)
            for tick in getattr(axis, f"get_{which}_ticks")()
            for label in (tick.label1, tick.label2)
        }
    for text in figure.findobj(Text):
        if id(text) not in ticks:
            text.set_text(book.say(text.get_text()))
    return sorted(book.unknown)
