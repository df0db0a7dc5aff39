"""Pairs of questions that the word lists were not written from, by which the guards are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvbench import documents
from kvbench.errors import InputError
from kvbench.layout import shipped

#: Fifty pairs, half of them English and half Portuguese.
PAIRS = shipped("resources") / "guards" / "held-out" / "pairs.yaml"


@dataclass(frozen=True)
class Pair:
    """Two questions, and whether one answer serves both."""

    asked: str
    stored: str
    same: bool


def load(path: Path = PAIRS) -> dict[str, list[Pair]]:
    """Read the pairs, by language.

    Raises
    ------
    InputError
        One line with file and pair.
    """
    found = documents.read_yaml(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no languages; write en: and the pairs below it")
    pairs: dict[str, list[Pair]] = {}
    for language, entries in found.items():
        if not isinstance(entries, list):
            raise InputError(f"{path}: {language} is no list of pairs")
        pairs[language] = []
        for number, entry in enumerate(entries):
            try:
                pair = Pair(**entry)
            except TypeError:
                raise InputError(
                    f"{path}: {language}[{number}] needs exactly the keys asked, stored and same"
                ) from None
            if not (isinstance(pair.same, bool) and pair.asked and pair.stored):
                raise InputError(
                    f"{path}: {language}[{number}]: two questions, and same is true or false"
                )
            pairs[language].append(pair)
    return pairs


def judged_rightly(pair: Pair, guards: Mapping[str, Callable[[str, str], bool]]) -> bool:
    """Whether all guards together let a pair pass if, and only if, one answer serves both."""
    return all(guard(pair.asked, pair.stored) for guard in guards.values()) is pair.same
