"""Guards of a semantic cache: may the answer of one question serve another that reads like it?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|\d+(?:[.,]\d+)*")
_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")


def _words(text: str) -> list[str]:
    return text.split()


_UNITS = {
    word: value
    for value, word in enumerate(
        _words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
            " fifteen sixteen seventeen eighteen nineteen"
        )
    )
}
_TENS = {
    word: 10 * value
    for value, word in enumerate(
        _words("twenty thirty forty fifty sixty seventy eighty ninety"), start=2
    )
}
_NEGATORS = frozenset(
    _words(
        "no not never none nothing nobody neither nor without cannot avoid except unless exclude"
        " excluded excluding lack"
    )
)
#: Words that turn a question round, two by two.
_OPPOSITES = _words(
    "safe unsafe ascending descending start stop begin end open close enable disable add remove"
    " install uninstall lock unlock block unblock raise lower increase decrease up down more less"
    " over under above below larger smaller bigger smaller big small before after first last"
    " early late buy sell win lose won lost include exclude allow forbid accept reject am pm"
    " noon midnight winter summer east west north south push pull upload download import export"
    " encrypt decrypt create delete arrive leave borrow lend minimum maximum cheaper dearer"
    " with without valid invalid legal illegal"
)
_SKIP = frozenset(_words("a an the my your our his her its their this that"))


def numbers_agree(asked: str, stored: str) -> bool:
    """Whether both questions name the same numbers, in digits or in English words."""
    return numbers(asked) == numbers(stored)


def numbers(text: str) -> list[float]:
    """Return the numbers of a text, sorted: ``1,000``, ``2.5``, ``100MB``, ``five hundred``.

    ``one`` alone is left out, because it is a pronoun more often than a number.
    """
    found: list[float] = []
    for digits in _DIGITS.findall(text):
        plain = re.sub(r",(?=\d{3}\b)", "", digits).replace(",", ".")
        found.append(float(plain) if plain.count(".") < 2 else float(plain.replace(".", "")))
    value, size = 0, 0
    for word in [*re.findall(r"[a-z]+", text.lower()), ""]:
        if word in _UNITS or word in _TENS:
            value += _UNITS.get(word, _TENS.get(word, 0))
            size += 1
        elif word == "hundred":
            value, size = max(value, 1) * 100, size + 2
        elif word == "thousand":
            value, size = max(value, 1) * 1000, size + 2
        elif size and word == "and":
            continue
        elif size:
            if size > 1 or value != 1:
                found.append(float(value))
            value, size = 0, 0
    return sorted(found)


def names_agree(asked: str, stored: str) -> bool:
    """Whether every name of one question occurs in the other, and no two change their roles.

    Names are words with a capital inside a sentence. Roles are given by prepositions: "from A to
    B" and "from B to A" contain the same names.
    """
    words = [set(map(str.lower, _WORD.findall(text))) for text in (asked, stored)]
    for text, others in ((asked, words[1]), (stored, words[0])):
        stems = {word[:5] for word in others}
        if any(name.lower()[:5] not in stems for name in _names(text)):
            return False
    ends = [_targets(text) for text in (asked, stored)]
    taken = ends[0] & (words[1] - ends[1])
    given = ends[1] & (words[0] - ends[0])
    return not (taken and given)


def polarity_agrees(asked: str, stored: str) -> bool:
    """Whether both questions are negated or neither, and no word meets its opposite."""
    words = [set(map(str.lower, _WORD.findall(text.replace("’", "'")))) for text in (asked, stored)]
    negated = [bool(w & _NEGATORS) or any(x.endswith("n't") for x in w) for w in words]
    if negated[0] != negated[1]:
        return False
    for pair in zip(_OPPOSITES[::2], _OPPOSITES[1::2], strict=True):
        here, there = words[0].intersection(pair), words[1].intersection(pair)
        if here and there and not here & there:
            return False
    return True


def _names(text: str) -> list[str]:
    names = []
    for sentence in re.split(r"(?<=[.!?:])\s+", text):
        words = [word for word in _WORD.findall(sentence) if not word[0].isdigit()]
        names += [
            word
            for place, word in enumerate(words)
            if word not in ("I", "I'm", "I've", "I'd", "I'll")
            and ((len(word) > 1 and word.isupper()) or (place > 0 and word[0].isupper()))
        ]
    return names


def _targets(text: str) -> set[str]:
    """Return the words that follow "to", "into" or "in", articles skipped, in lower case."""
    words = [word.lower() for word in _WORD.findall(text)]
    targets = set()
    for place, word in enumerate(words):
        if word in ("to", "into", "in"):
            following = (w for w in words[place + 1 : place + 4] if w not in _SKIP)
            targets.add(next(following, ""))
    return targets - {""}


#: The guards by name, in the order in which they are cheapest to refuse.
GUARDS: Mapping[str, Callable[[str, str], bool]] = {
    "numbers": numbers_agree,
    "names": names_agree,
    "polarity": polarity_agrees,
}
