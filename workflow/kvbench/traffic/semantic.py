"""A semantic cache on a log: candidate hits by threshold, guard refusals, pairs for a person to judge.

Only a person can say whether two questions have the same answer, so a replay gives *candidate*
hits. The sheet of the riskiest pairs (:func:`riskiest`) is filled in by hand, and
:func:`judged` reads the share of false hits from it, with its interval.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kvbench.analysis import intervals
from kvbench.caching.guards import GUARDS
from kvbench.errors import InputError
from kvbench.traffic.log import LONGEST_QUESTION, Log

THRESHOLDS = (0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.99)
#: Threshold of the sheet and of the summary.
SHEET_THRESHOLD = 0.80
PAIRS = 30
#: Columns of the sheet; the last one is for the person who judges.
SHEET = (
    "pair",
    "asked_at",
    "stored_at",
    "asked",
    "stored",
    "cosine",
    "words_changed",
    "refused_by",
    "false_hit",
)
#: Entries that are looked at for one question, as the cache itself does.
_CANDIDATES = 8


@dataclass(frozen=True)
class Pair:
    """A question and the stored one that would have answered it; places are requests of the log."""

    asked: int
    stored: int
    cosine: float
    refused_by: str


@dataclass(frozen=True)
class Swept:
    """What one threshold gave: requests by what answered them, and what the guards refused.

    ``beyond`` are the candidates that no exact cache would have answered.
    """

    threshold: float
    requests: int
    exact: int
    candidates: int
    beyond: int
    candidates_unguarded: int
    refused: dict[str, int]
    served: np.ndarray
    pairs: tuple[Pair, ...]


class Encoder(Protocol):
    """What the semantic part needs of :class:`kvbench.caching.encoder.SentenceEncoder`."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of shape (texts, dimension)."""

    def fits(self, text: str) -> bool:
        """Whether the whole text is read."""


def similarities(log: Log, encoder: Encoder) -> np.ndarray:
    """Cosines between the log's questions, shape (questions, questions).

    A question that the encoder would cut off is like no other: what differs behind the cut would
    be overlooked.
    """
    vectors = np.asarray(encoder.encode(log.questions), dtype=np.float32)
    cosines = vectors @ vectors.T
    for place, text in enumerate(log.questions):
        if len(text) >= LONGEST_QUESTION or not encoder.fits(text):
            cosines[place, :] = cosines[:, place] = -1
    return cosines


class _Stored:
    """Questions that a cache holds in one context, and the requests that brought them."""

    def __init__(self) -> None:
        self.count = 0
        self.questions = np.empty(8, dtype=np.int64)
        self.requests = np.empty(8, dtype=np.int64)

    def add(self, question: int, request: int) -> None:
        if self.count == len(self.questions):
            self.questions = np.resize(self.questions, 2 * self.count)
            self.requests = np.resize(self.requests, 2 * self.count)
        self.questions[self.count], self.requests[self.count] = question, request
        self.count += 1


def sweep(log: Log, cosines: np.ndarray, threshold: float, guarded: bool = True) -> Swept:
    """Replay an unbounded semantic cache behind an exact one, in the order of the log.

    A question is only compared with stored ones of the same context (system prompt, history,
    model, parameters). What is answered alike is not stored; everything else is.
    """
    stored: dict[int, _Stored] = {}
    first: dict[tuple[int, int], int] = {}
    refused = dict.fromkeys(GUARDS, 0)
    pairs: list[Pair] = []
    exact = candidates = beyond = unguarded = 0
    asked: set[tuple[int, int]] = set()
    served = np.zeros(len(log.question_of), dtype=bool)
    for number, (question, context) in enumerate(zip(log.question_of, log.contexts, strict=True)):
        if (context, question) in first:
            exact += 1
            continue
        held = stored.setdefault(context, _Stored())
        hit = None
        if held.count:
            scores = cosines[question, held.questions[: held.count]]
            close = np.flatnonzero(scores >= threshold)
            near = close[np.argsort(-scores[close], kind="stable")][:_CANDIDATES].tolist()
            unguarded += bool(near)
            for place in near:
                other = int(held.requests[place])
                guard = _refusing(log.questions[question], log.questions[log.question_of[other]])
                if guarded and guard:
                    refused[guard] += 1
                    pairs.append(Pair(number, other, float(scores[place]), guard))
                    continue
                hit = other
                pairs.append(Pair(number, other, float(scores[place]), ""))
                break
        if hit is None:
            held.add(question, number)
            first[context, question] = number
        else:
            candidates += 1
            beyond += (context, question) not in asked
            served[number] = True
        asked.add((context, question))
    return Swept(
        threshold,
        len(log.question_of),
        exact,
        candidates,
        beyond,
        unguarded,
        refused,
        served,
        tuple(pairs),
    )


def _refusing(asked: str, stored: str) -> str:
    """The first guard that refuses a pair, or nothing."""
    return next((name for name, agrees in GUARDS.items() if not agrees(asked, stored)), "")


_WORD = re.compile(r"\w+")


def changed_words(asked: str, stored: str) -> int:
    """Words of either question that the other does not have."""
    return len(set(_WORD.findall(asked.lower())) ^ set(_WORD.findall(stored.lower())))


def riskiest(log: Log, swept: Swept, count: int = PAIRS) -> list[Pair]:
    """The pairs that a person should judge first: hits that the guards let through.

    Near misses differ in a word or two, paraphrases in many; so the fewest changed words come
    first, among equals the less alike.
    """
    hits = [pair for pair in swept.pairs if not pair.refused_by]
    return sorted(hits, key=lambda pair: (_changed(log, pair), pair.cosine, pair.asked))[:count]


def _changed(log: Log, pair: Pair) -> int:
    return changed_words(*_texts(log, pair))


def _texts(log: Log, pair: Pair) -> tuple[str, str]:
    return (
        log.questions[log.question_of[pair.asked]],
        log.questions[log.question_of[pair.stored]],
    )


def hashed(text: str, log: Log) -> str:
    """A digest that stands for a text; the log itself is the key, so no list of guesses opens it."""
    key = log.digest.encode()
    return "hmac:" + hmac.new(key, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:16]


def sheet(log: Log, pairs: Sequence[Pair], keep_text: bool) -> list[dict[str, object]]:
    """Rows of the sheet: places in the log, and texts only where they may be kept."""
    rows = []
    for number, pair in enumerate(pairs, start=1):
        asked, stored = _texts(log, pair)
        shown = (asked, stored) if keep_text else (hashed(asked, log), hashed(stored, log))
        rows.append(
            dict(
                zip(
                    SHEET,
                    (
                        number,
                        log.lines[pair.asked],
                        log.lines[pair.stored],
                        *shown,
                        round(pair.cosine, 4),
                        _changed(log, pair),
                        pair.refused_by,
                        "",
                    ),
                    strict=True,
                )
            )
        )
    return rows


@dataclass(frozen=True)
class Judged:
    """What a person's marks say of the pairs of a sheet: Clopper and Pearson's 95 % interval."""

    marked: int
    false: int
    share: float
    low: float
    high: float


_YES, _NO = (
    {"1", "yes", "y", "true", "x", "sim", "s", "false hit"},
    {"0", "no", "n", "false", "nao"},
)


def judged(path: Path, name: str) -> Judged | None:
    """Read the marks of a sheet (column ``false_hit``: yes or no); None while none is set.

    Parameters
    ----------
    name:
        The log: a sheet may hold the pairs of several, and each pair once a model and memory.

    Raises
    ------
    InputError
        The file is no such sheet, has no pair of this log, or a mark is neither yes nor no.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a sheet of pairs ({error})") from None
    marks: dict[str, bool] = {}
    known = False
    for number, row in enumerate(rows, start=2):
        if not {"false_hit", "log", "pair"} <= set(row):
            raise InputError(
                f"{path}: columns log, pair and false_hit are needed; give the sheet of an advice"
            )
        if row["log"] != name:
            continue
        known = True
        mark = (row["false_hit"] or "").strip().lower().replace("ã", "a")
        if mark in _YES or mark in _NO:
            marks[row["pair"]] = mark in _YES
        elif mark:
            raise InputError(f"{path}: line {number}: false_hit is {mark!r}; write yes or no")
    if not known:
        raise InputError(f"{path}: no pair of the log {name!r}; give the sheet of its advice")
    return interval(sum(marks.values()), len(marks)) if marks else None


def interval(false: int, marked: int) -> Judged:
    """Share of false hits with Clopper and Pearson's 95 % interval."""
    return Judged(marked, false, false / marked, *intervals.share(false, marked))
