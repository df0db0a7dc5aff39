"""Guards of a semantic cache: may the answer of one question serve another that reads like it?

Each guard compares two questions in one respect (:data:`GUARDS`) and errs towards a miss. What
negates, turns round or counts in a language stands in ``resources/guards/<language>.yaml``; the
language of a question is told by its frequent words, and where it cannot be told every language's
lists are used.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from kvbench.errors import InputError
from kvbench.layout import shipped

#: Where the word lists are.
FOLDER = shipped("resources") / "guards"

#: Letters of a word that have to be equal for two forms of it ("London", "London's").
_STEM = 5
#: The same for a word and the one that a prefix turns round ("ativo", "desativar").
_TURNED_STEM = 4
#: Letters from which a word is more often one of content than of grammar.
_CONTENT = 4

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+(?:[.,]\d+)*")
_NUMERAL = re.compile(r"\d+(?:[.,]\d+)*")
#: A sign of money ("R$", "A$", "€"), or three letters that may be the code of a currency.
_BEFORE = re.compile(r"(?<![^\W\d_])([^\W\d_]{0,3}[$€£¥]|[^\W\d_]{3})\s?$")
_SIGN = re.compile(r"(?<![^\W\d_])[^\W\d_]{0,3}[$€£¥]")
_AFTER = re.compile(r"\s?(%|°[cf]\b|[^\W\d_]{0,3}[$€£¥]|[^\W\d_]+)", re.IGNORECASE)
#: Thousands apart by a blank: by one that does not break anywhere, by any beside money or a unit.
_NO_BREAK = re.compile(r"(?<![\d.,])\d{1,3}(?:[\u00a0\u2009\u202f]\d{3})+(?!\d)")
_BLANKS = re.compile(r"(?<![\d.,])(?<!\d )\d{1,3}(?: \d{3})+(?! ?\d)")
_GROUPED = re.compile(r"\d{1,3}(?:([.,])\d{3})(?:\1\d{3})*")

_KEYS = frozenset(
    {
        "decimal",
        "exclusive",
        "joiners",
        "language",
        "markers",
        "money",
        "negating_endings",
        "negators",
        "numbers",
        "other_without_accent",
        "scales",
        "skipped",
        "towards",
        "turning_prefixes",
        "units",
    }
)


@dataclass(frozen=True)
class Language:
    """The word lists of one language; see ``resources/guards/README.md``.

    Words are folded (lower case, without accents), but for ``markers``.
    """

    name: str
    decimal: str
    markers: frozenset[str]
    negators: frozenset[str]
    negating_endings: tuple[str, ...]
    turning_prefixes: tuple[str, ...]
    exclusive: tuple[tuple[_Side, ...], ...]
    towards: frozenset[str]
    skipped: frozenset[str]
    joiners: frozenset[str]
    other_without_accent: frozenset[str]
    numbers: Mapping[str, int]
    scales: Mapping[str, int]
    units: Mapping[str, str]
    money: frozenset[str]


@dataclass(frozen=True)
class _Side:
    """Words on one side of a group: whole ones, and beginnings."""

    words: frozenset[str]
    stems: tuple[str, ...]

    def meets(self, words: Collection[str]) -> bool:
        if not self.words.isdisjoint(words):
            return True
        return bool(self.stems) and any(word.startswith(self.stems) for word in words)


@lru_cache(maxsize=1)
def languages() -> tuple[Language, ...]:
    """Return every language that has a file, in the order of their names.

    Raises
    ------
    InputError
        If a file is not what its README says.
    """
    return tuple(load(path) for path in sorted(FOLDER.glob("*.yaml")))


def load(path: Path) -> Language:
    """Read the word lists of one language.

    Raises
    ------
    InputError
        One line with file and key.
    """
    try:
        lists: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(lists, dict) or set(lists) != _KEYS:
        raise InputError(f"{path}: needs exactly the keys {', '.join(sorted(_KEYS))}")
    if lists["decimal"] not in (".", ","):
        raise InputError(f"{path}: decimal is {lists['decimal']!r}; '.' or ','")
    groups = []
    for number, group in enumerate(lists["exclusive"]):
        if not isinstance(group, list) or len(group) < 2:
            raise InputError(f"{path}: exclusive[{number}] has no two sides")
        if not all(isinstance(side, str) for side in group):
            raise InputError(f'{path}: exclusive[{number}]: put "on", "off" and the like in quotes')
        groups.append(tuple(map(_side, group)))
    try:
        return Language(
            name=lists["language"],
            decimal=lists["decimal"],
            markers=frozenset(lists["markers"].split()),
            negators=frozenset(map(fold, lists["negators"].split())),
            negating_endings=tuple(lists["negating_endings"]),
            turning_prefixes=tuple(map(fold, lists["turning_prefixes"])),
            exclusive=tuple(groups),
            towards=frozenset(map(fold, lists["towards"].split())),
            skipped=frozenset(map(fold, lists["skipped"].split())),
            joiners=frozenset(map(fold, lists["joiners"].split())),
            other_without_accent=frozenset(map(fold, lists["other_without_accent"].split())),
            numbers={fold(word): int(value) for word, value in lists["numbers"].items()},
            scales={fold(word): int(value) for word, value in lists["scales"].items()},
            units={
                fold(word): unit for unit, words in lists["units"].items() for word in words.split()
            },
            money=frozenset(lists["money"].split()),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: a list of words is no text ({error})") from error


def _side(text: str) -> _Side:
    words = [fold(word) for word in text.replace('"', "").split()]
    return _Side(
        frozenset(word for word in words if not word.endswith("*")),
        tuple(word.removesuffix("*") for word in words if word.endswith("*")),
    )


def fold(text: str) -> str:
    """Return a text in lower case and without accents."""
    if text.isascii():
        return text.lower()
    apart = unicodedata.normalize("NFD", text.lower())
    return "".join(sign for sign in apart if not unicodedata.combining(sign))


@lru_cache(maxsize=1024)
def languages_of(text: str) -> tuple[Language, ...]:
    """Return the language of a text, or all of them if its frequent words do not tell."""
    words = [word.lower() for word in _words(text)]
    counts = {
        language.name: sum(word in language.markers for word in words) for language in languages()
    }
    best = max(counts.values(), default=0)
    found = tuple(language for language in languages() if counts[language.name] == best)
    return found if len(found) == 1 else languages()


# --- numbers --------------------------------------------------------------------------------------


def numbers_agree(asked: str, stored: str) -> bool:
    """Whether both questions name the same amounts, versions and units.

    An amount of money or of a unit counts by its value, whatever its format (``R$ 1.000``,
    ``1,000 reais``). Any other decimal counts as it is written, because 3.1 and 3.10 are one
    number and two versions.
    """
    here, there = quantities(asked), quantities(stored)
    if Counter(amount for amount, _ in here) != Counter(amount for amount, _ in there):
        return False
    for amount in {amount for amount, _ in here}:
        units = [{unit for a, unit in side if a == amount and unit} for side in (here, there)]
        if all(units) and units[0] != units[1]:
            return False
    return True


def numbers(text: str) -> list[float]:
    """Return the values of the numbers of a text, sorted; versions with two dots have none.

    ``one`` alone is left out, because it is a pronoun or an article more often than a number.
    """
    values = []
    for amount, _ in quantities(text):
        try:
            values.append(float(amount))
        except ValueError:
            continue
    return sorted(values)


@lru_cache(maxsize=1024)
def quantities(text: str) -> tuple[tuple[str, str], ...]:
    """Return amount and unit ("" if it has none) of every number of a text."""
    known = languages_of(text)
    units = {word: unit for language in languages() for word, unit in language.units.items()}
    scales = {word: value for language in languages() for word, value in language.scales.items()}
    scales |= {"k": 1000}
    money = {unit for language in languages() for unit in language.money}
    text = _joined(unicodedata.normalize("NFC", text), units, money)
    found = []
    for match in _NUMERAL.finditer(text):
        after = _AFTER.match(text, match.end())
        word = fold(after[1]) if after else ""
        scale = scales.get(word)
        if scale is not None and after is not None:
            after = _AFTER.match(text, after.end())
            word = fold(after[1]) if after else ""
        unit = _currency(text[: match.start()], units, money) or units.get(word, "")
        amount = _amount(match[0], known, measured=bool(unit), money=unit in money)
        if scale is not None and amount.count(".") + amount.count(",") < 2:
            amount = _written(float(amount.replace(",", ".")) * scale)
        found.append((amount, unit))
    return tuple(found + [(_written(value), unit) for value, unit in _spelt(text, units, scales)])


def _currency(before: str, units: Mapping[str, str], money: Collection[str]) -> str:
    """Return the currency whose sign or code ends a text, or nothing."""
    found = _BEFORE.search(before)
    if found is None:
        return ""
    unit = units.get(fold(found[1]), "")
    if unit in money:
        return unit
    # A sign that no list has is a currency of its own.
    return "" if found[1].isalpha() else fold(found[1])


def _joined(text: str, units: Mapping[str, str], money: Collection[str]) -> str:
    """Return a text whose numbers hold no blanks between their thousands."""

    def join(match: re.Match[str]) -> str:
        after = _AFTER.match(text, match.end())
        named = after is not None and fold(after[1]) in units
        if named or _currency(text[: match.start()], units, money):
            return match[0].replace(" ", "")
        return match[0]

    text = _NO_BREAK.sub(lambda match: "".join(filter(str.isdigit, match[0])), text)
    return _BLANKS.sub(join, text)


def _amount(numeral: str, known: tuple[Language, ...], measured: bool, money: bool) -> str:
    """Return one spelling of a number: ``1000``, ``2.5``; versions stay as they are.

    The language of the text says whether the mark in ``1.000`` groups or divides. Where it divides,
    money keeps its three decimals, so that "R$ 1,000", copied from an English text, is neither 1
    nor 1000. Where no language is known, money has no three decimals, and what is measured otherwise
    stays as it is written, equal to itself only.
    """
    marks = [mark for mark in numeral if mark in ".,"]
    decimal = known[0].decimal if len(known) == 1 else ""
    grouped = _GROUPED.fullmatch(numeral)
    divides = grouped is not None and len(marks) == 1 and grouped[1] == decimal
    if len(set(marks)) == 2:
        # The last mark is the decimal one: 1.000,50 and 1,000.50.
        plain = numeral.replace(marks[0], "").replace(marks[-1], ".")
    elif grouped and len(marks) == 1 and not decimal and measured and not money:
        return numeral
    elif grouped and not divides and (len(marks) > 1 or decimal or money):
        plain = re.sub("[.,]", "", numeral)
    else:
        plain = numeral.replace(",", ".")
    if plain.count(".") > 1:
        return plain
    whole, point, fraction = plain.partition(".")
    whole = whole.lstrip("0") or "0"
    if measured and not (divides and money):
        fraction = fraction.rstrip("0")
    return whole + (point + fraction if fraction else "")


def _written(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _spelt(
    text: str, units: Mapping[str, str], scales: Mapping[str, int]
) -> list[tuple[float, str]]:
    """Return the numbers that a text spells in words."""
    values = {word: value for language in languages() for word, value in language.numbers.items()}
    joiners = {word for language in languages() for word in language.joiners}
    found: list[tuple[float, str]] = []
    total, part, size = 0, 0, 0
    for word in [*(fold(word) for word in _words(text)), ""]:
        for piece in word.split("-") if all(p in values for p in word.split("-")) else [word]:
            if piece in values:
                part += values[piece]
                size += 1
            elif piece in scales and piece != "k" and (size or piece != "mil"):
                factor = scales[piece]
                if factor >= 1000:
                    total, part = total + max(part, 1) * factor, 0
                else:
                    part = max(part, 1) * factor
                size += 2
            elif size and piece in joiners:
                continue
            elif size:
                unit = units.get(piece, "")
                if size > 1 or total + part != 1:
                    found.append((float(total + part), unit))
                total, part, size = 0, 0, 0
    return found


# --- names ----------------------------------------------------------------------------------------


def names_agree(asked: str, stored: str) -> bool:
    """Whether both questions are about the same named things, in the same roles.

    Names are words with a capital inside a sentence; every one has to occur in the other text.
    Roles are given by prepositions: "from A to B" and "from B to A" contain the same names.
    Emoji and other signs have to be the same, and so have words that only differ in an accent
    ("avó", "avô"), unless one of them stands in a text that is written without accents, as people
    write, and is no other word without them ("coco", "cocô").
    """
    if _signs(asked) != _signs(stored):
        return False
    texts = [unicodedata.normalize("NFC", text) for text in (asked, stored)]
    words = [[fold(word) for word in _words(text)] for text in texts]
    for text, others in ((texts[0], words[1]), (texts[1], words[0])):
        stems = {word[:_STEM] for word in others}
        if any(fold(name)[:_STEM] not in stems for name in _names(text)):
            return False
    if not _accents_agree(*texts):
        return False
    ends = [_targets(text) for text in texts]
    taken = ends[0] & (set(words[1]) - ends[1])
    given = ends[1] & (set(words[0]) - ends[0])
    return not (taken and given)


def _names(text: str) -> list[str]:
    # "USD" and "R$" are compared where amounts are.
    text = _SIGN.sub(" ", text)
    codes = {
        word
        for language in languages()
        for word, unit in language.units.items()
        if unit in language.money
    }
    names = []
    for sentence in re.split(r"(?<=[.!?:])\s+", text):
        words = [word for word in _words(sentence) if not word[0].isdigit()]
        names += [
            word
            for place, word in enumerate(words)
            if word not in ("I", "I'm", "I've", "I'd", "I'll")
            and not (word.isupper() and fold(word) in codes)
            and ((len(word) > 1 and word.isupper()) or (place > 0 and word[0].isupper()))
        ]
    return names


def _targets(text: str) -> set[str]:
    """Return the words that follow a preposition of direction, articles skipped, folded."""
    words = [fold(word) for word in _words(text)]
    known = languages_of(text)
    towards = {word for language in known for word in language.towards}
    skipped = {word for language in known for word in language.skipped}
    targets = set()
    for place, word in enumerate(words):
        if word in towards:
            following = (w for w in words[place + 1 : place + 4] if w not in skipped)
            targets.add(next(following, ""))
    return targets - {""}


def _signs(text: str) -> Counter[str]:
    """Count emoji and other signs that are no letters, digits, punctuation or currency."""
    return Counter(sign for sign in text if unicodedata.category(sign) in ("So", "Sm", "Co", "Cn"))


def _accents_agree(first: str, second: str) -> bool:
    """Whether no word of one text has a twin in the other that differs in its accents.

    A word without accents stands for its accented twin where all of its text is written without
    them, or where it is one of the frequent words and forms that grammar tells apart ("e", "é";
    "tem", "têm"), unless it is listed as another word.
    """
    spellings: list[dict[str, set[str]]] = []
    for text in (first, second):
        found: dict[str, set[str]] = {}
        for word in _words(text):
            found.setdefault(fold(word), set()).add(word.lower())
        spellings.append(found)
    others = {word for language in languages() for word in language.other_without_accent}
    frequent = {fold(word) for language in languages() for word in language.markers}
    plain = [all(forms == {word} for word, forms in found.items()) for found in spellings]
    for word in spellings[0].keys() & spellings[1].keys():
        forms = [spellings[0][word], spellings[1][word]]
        if not forms[0].isdisjoint(forms[1]):
            continue
        grammar = len(word) < _CONTENT or word in frequent
        left_out = any(
            word in given and (bare or grammar) for bare, given in zip(plain, forms, strict=True)
        )
        if word in others or not left_out:
            return False
    return True


# --- polarity -------------------------------------------------------------------------------------


def polarity_agrees(asked: str, stored: str) -> bool:
    """Whether both questions are in one language, negated or not, and on the same sides.

    No word of one may be turned round in the other, by a prefix ("mute", "unmute") or by the
    lists of what excludes each other ("on" and "off", "antes" and "depois").
    """
    known = [languages_of(text) for text in (asked, stored)]
    if len(known[0]) == len(known[1]) == 1 and known[0] != known[1]:
        return False
    applied = min(known, key=len)
    words = [
        {fold(word) for word in _words(unicodedata.normalize("NFC", text))}
        for text in (asked, stored)
    ]
    return all(_turns_alike(language, *words) for language in applied)


def _turns_alike(language: Language, here: set[str], there: set[str]) -> bool:
    negated = [
        not language.negators.isdisjoint(words)
        or any(word.endswith(language.negating_endings) for word in words)
        for words in (here, there)
    ]
    if negated[0] != negated[1]:
        return False
    if _turned(here, there, language.turning_prefixes):
        return False
    if _turned(there, here, language.turning_prefixes):
        return False
    for group in language.exclusive:
        # Few questions are on a side of any group: what is asked of the other text is asked rarely.
        sides = {n for n, side in enumerate(group) if side.meets(here)}
        if not sides or any(group[n].meets(there) for n in sides):
            continue
        if any(side.meets(there) for side in group):
            return False
    return True


def _turned(plain: Iterable[str], other: set[str], prefixes: tuple[str, ...]) -> bool:
    """Whether a word of ``plain`` occurs in ``other`` behind a prefix only, in any form of it."""
    stems = {word[:_TURNED_STEM] for word in plain if len(word) >= _TURNED_STEM}
    others = {word[:_TURNED_STEM] for word in other}
    for word in other:
        for prefix in prefixes:
            rest = word.removeprefix(prefix)
            if rest == word or len(rest) < _TURNED_STEM:
                continue
            stem = rest[:_TURNED_STEM]
            turned_here = any(w.startswith(word[: len(prefix) + _TURNED_STEM]) for w in plain)
            if stem in stems and stem not in others and not turned_here:
                return True
    return False


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


#: The guards by name, in the order in which they are cheapest to refuse.
GUARDS: Mapping[str, Callable[[str, str], bool]] = {
    "numbers": numbers_agree,
    "names": names_agree,
    "polarity": polarity_agrees,
}
