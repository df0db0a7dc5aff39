"""A semantic cache: a question gets the answer that is stored for a question like it.

Lifting it into a service takes few lines::

    encoder = SentenceEncoder()
    cache = SemanticCache(encoder, encoder.dimension, threshold=0.9, fits=encoder.fits)
    found = cache.get(question, namespace=tenant)
    answer = found.value if found.hit else generate(question)
    if not found.hit:
        cache.put(question, answer, namespace=tenant)

Closeness of vectors is not sameness of answers: "from Lisbon to Porto" and "from Porto to Lisbon"
are nearly the same vector. What stands between the two here, each optional but the first:

* an exact repeat is recognised as text, before any vector is computed;
* guards (:data:`kvbench.caching.guards.GUARDS`) compare numbers, names and roles, and polarity of
  the two questions;
* a margin asks that no other answer is nearly as close;
* texts that the encoder would cut off are served by exact repeat only;
* :class:`ErrorBound` learns, entry by entry, how far similarity can be trusted.

None of them knows the conversation before the question: whatever else the answer depends on
(tenant, model, system prompt, history) belongs into ``namespace``.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from kvbench.caching.response_cache import MISS

#: Candidates that are looked at for one question: enough to step over one that a guard refuses.
_CANDIDATES = 8


@dataclass(frozen=True)
class Lookup:
    """What a lookup found.

    Attributes
    ----------
    value:
        The stored value, or ``MISS``.
    kind:
        ``exact``, ``semantic`` or ``miss``.
    similarity:
        Cosine to the nearest usable entry (1 for an exact hit), or NaN if there is none.
    entry:
        Number of that entry, also on a miss: what :class:`ErrorBound` learns about.
    text:
        The question that this entry was stored under, or "".
    refused:
        What stood between a near enough entry and a hit (a guard's name, ``margin``, ``bound``),
        or "".
    """

    value: Any = MISS
    kind: Literal["exact", "semantic", "miss"] = "miss"
    similarity: float = math.nan
    entry: int | None = None
    text: str = ""
    refused: str = ""

    @property
    def hit(self) -> bool:
        """Whether :attr:`value` may be served."""
        return self.kind != "miss"


@dataclass(frozen=True)
class Stats:
    """Counts since the cache was made; every lookup is in exactly one of the first three."""

    exact_hits: int = 0
    semantic_hits: int = 0
    misses: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    stored: int = 0
    evicted: int = 0
    expired: int = 0


@dataclass
class _Entry:
    text: str
    value: Any
    namespace: str
    deadline: float
    embedded: bool


class SemanticCache:
    """Values by question, per namespace; safe to share between threads.

    Parameters
    ----------
    encode:
        Text to a vector of shape (dimension,); it is scaled to length one here.
    dimension:
        Length of the vectors.
    threshold:
        Least cosine of a hit, within [0, 1].
    capacity, max_bytes:
        Most entries, and most bytes of texts and vectors, over all namespaces; the least recently
        used goes first. Values are not counted.
    ttl_s:
        Seconds an entry stays valid, its vector included; None for good.
    guards:
        Functions by name of (asked, stored) that return whether the stored question may answer.
    margin:
        How much closer the entry must be than the nearest entry with another value.
    bound:
        Learned per-entry trust; see :class:`ErrorBound`. Feed it through :meth:`learn`.
    fits:
        Whether a text is read whole by the encoder; others are matched exactly only.
    clock:
        Seconds that never go backwards.

    Raises
    ------
    ValueError
        If the threshold or margin is outside [0, 1], or the capacity below one.
    """

    def __init__(
        self,
        encode: Callable[[str], np.ndarray],
        dimension: int,
        *,
        threshold: float,
        capacity: int = 10_000,
        max_bytes: int | None = None,
        ttl_s: float | None = None,
        guards: Mapping[str, Callable[[str, str], bool]] | None = None,
        margin: float = 0.0,
        bound: ErrorBound | None = None,
        fits: Callable[[str], bool] = lambda _text: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it must be within [0, 1]")
        if not 0 <= margin <= 1:
            raise ValueError(f"margin is {margin}; it must be within [0, 1]")
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a cache needs at least one entry")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; it must be at least one, or None")
        if ttl_s is not None and not ttl_s > 0:
            raise ValueError(f"ttl_s is {ttl_s}; it must be above zero, or None")
        # A miss is looked up and then stored: its vector is computed once.
        self._encode = lru_cache(maxsize=64)(encode)
        self._dimension = dimension
        self._threshold = threshold
        self._capacity = capacity
        self._max_bytes = math.inf if max_bytes is None else max_bytes
        self._texts_bytes = 0
        self._ttl_s = ttl_s
        self._guards = dict(guards or {})
        self._margin = margin
        self._bound = bound
        self._fits = fits
        self._clock = clock
        # FAISS indexes are not safe for an add beside a search, so one lock guards everything
        # but the encoder.
        self._lock = threading.Lock()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._exact: dict[tuple[str, str], int] = {}
        self._indexes: dict[str, Any] = {}
        self._vectors = 0
        self._tombstones: dict[str, set[int]] = {}
        self._next = 0
        self._counts = {"exact": 0, "semantic": 0, "miss": 0}
        self._counts |= {"stored": 0, "evicted": 0, "expired": 0}
        self._refused: dict[str, int] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    @property
    def stats(self) -> Stats:
        """A consistent snapshot of the counts; ``refused`` says which guard refused how often."""
        with self._lock:
            counts = self._counts
            return Stats(
                counts["exact"],
                counts["semantic"],
                counts["miss"],
                dict(self._refused),
                counts["stored"],
                counts["evicted"],
                counts["expired"],
            )

    def footprint(self) -> tuple[int, int]:
        """Return entries and the bytes of their texts and vectors, dead vectors included."""
        with self._lock:
            return len(self._entries), self._bytes()

    def get(self, text: str, namespace: str = "") -> Lookup:
        """Return what is stored for ``text`` or for a question that counts as the same."""
        with self._lock:
            number = self._live(self._exact.get((namespace, text)))
            if number is not None:
                return self._found(number, "exact", 1.0)
            empty = namespace not in self._indexes
        if empty or not self._fits(text):
            return self._missed(Lookup())
        vector = self._vector(text)
        with self._lock:
            candidates = self._nearest(vector, namespace)
            return self._judge(text, candidates)

    def put(self, text: str, value: Any, namespace: str = "", ttl_s: float | None = None) -> int:
        """Store ``value`` for ``text``, in place of an older one; return the entry's number.

        ``ttl_s`` overrides the cache's own for this entry.
        """
        vector = self._vector(text) if self._fits(text) else None
        life = self._ttl_s if ttl_s is None else ttl_s
        with self._lock:
            self._bury(self._exact.get((namespace, text)))
            number = self._next
            self._next += 1
            deadline = math.inf if life is None else self._clock() + life
            self._entries[number] = _Entry(text, value, namespace, deadline, vector is not None)
            self._exact[namespace, text] = number
            if vector is not None:
                index = self._indexes.get(namespace)
                if index is None:
                    index = self._indexes[namespace] = _new_index(self._dimension)
                    self._tombstones[namespace] = set()
                index.add_with_ids(vector[None, :], np.array([number], dtype=np.int64))
                self._vectors += 1
            self._texts_bytes += len(text.encode())
            self._counts["stored"] += 1
            while self._entries and (
                len(self._entries) > self._capacity or self._bytes() > self._max_bytes
            ):
                self._bury(next(iter(self._entries)))
                self._counts["evicted"] += 1
            return number

    def learn(self, lookup: Lookup, correct: bool) -> None:
        """Tell the bound whether the entry of a *missed* lookup would have been right.

        Served answers must not be reported: only questions that were generated anyway give an
        unbiased picture.
        """
        if self._bound is not None and lookup.entry is not None and not lookup.hit:
            with self._lock:
                self._bound.observe(lookup.entry, lookup.similarity, correct)

    def invalidate(self, text: str, namespace: str = "") -> bool:
        """Forget the entry stored under exactly ``text``; return whether there was one."""
        with self._lock:
            return self._bury(self._exact.get((namespace, text)))

    def discard(self, values: Collection[Any]) -> None:
        """Forget every entry, in any namespace, whose value is one of these."""
        with self._lock:
            for number in [n for n, e in self._entries.items() if e.value in values]:
                self._bury(number)

    def clear(self, namespace: str) -> None:
        """Forget every entry of a namespace."""
        with self._lock:
            for number in [n for n, e in self._entries.items() if e.namespace == namespace]:
                self._bury(number)

    def _vector(self, text: str) -> np.ndarray:
        vector = np.asarray(self._encode(text), dtype=np.float32)
        length = float(np.linalg.norm(vector))
        if vector.shape != (self._dimension,) or not math.isfinite(length) or length == 0:
            raise ValueError(f"the encoder gave no direction of {self._dimension} numbers")
        return vector / length

    def _judge(self, text: str, candidates: Sequence[tuple[int, float]]) -> Lookup:
        """Return the nearest candidate that passes; the caller holds the lock."""
        nearest = Lookup()
        for place, (number, similarity) in enumerate(candidates):
            entry = self._entries[number]
            missed = Lookup(similarity=similarity, entry=number, text=entry.text)
            if place == 0:
                nearest = missed
            if similarity < self._threshold:
                break
            refusal = next(
                (name for name, agrees in self._guards.items() if not agrees(text, entry.text)),
                None,
            )
            if refusal is not None:
                self._refuse(refusal)
                if not nearest.refused:
                    nearest = replace(nearest, refused=refusal)
                continue
            rival = next(
                (s for n, s in candidates[place + 1 :] if self._entries[n].value != entry.value),
                -1.0,
            )
            if similarity - rival < self._margin:
                self._refuse("margin")
                nearest = replace(nearest, refused="margin")
                break
            if self._bound is not None and not self._bound.admits(number, similarity):
                self._refuse("bound")
                nearest = replace(missed, refused="bound")
                break
            return self._found(number, "semantic", similarity)
        return self._missed(nearest)

    def _nearest(self, vector: np.ndarray, namespace: str) -> list[tuple[int, float]]:
        """Return live entries and cosines, nearest first, stepping over tombstones."""
        wanted = _CANDIDATES
        while (index := self._indexes.get(namespace)) is not None:
            count = min(index.ntotal, wanted + len(self._tombstones[namespace]))
            cosines, numbers = index.search(vector[None, :], count)
            # A short index pads its answer with the id -1, which is no entry.
            pairs = [
                (int(number), float(min(1.0, cosine)))
                for number, cosine in zip(numbers[0], cosines[0], strict=True)
                if number >= 0 and number not in self._tombstones[namespace]
            ]
            live = [(n, c) for n, c in pairs if self._live(n) is not None]
            if len(live) == len(pairs):
                return live[:wanted]
        return []

    def _live(self, number: int | None) -> int | None:
        """Return ``number`` if its entry is still valid; bury it if it has expired."""
        if number is None:
            return None
        if self._clock() < self._entries[number].deadline:
            return number
        self._bury(number)
        self._counts["expired"] += 1
        return None

    def _bury(self, number: int | None) -> bool:
        """Forget an entry. Its vector gets a tombstone, and is swept out with many others."""
        if number is None:
            return False
        entry = self._entries.pop(number)
        self._texts_bytes -= len(entry.text.encode())
        del self._exact[entry.namespace, entry.text]
        if self._bound is not None:
            self._bound.forget(number)
        if entry.embedded:
            dead, index = self._tombstones[entry.namespace], self._indexes[entry.namespace]
            dead.add(number)
            if len(dead) == index.ntotal:
                self._vectors -= len(dead)
                del self._indexes[entry.namespace], self._tombstones[entry.namespace]
            elif len(dead) > max(4, index.ntotal // 4):
                index.remove_ids(np.fromiter(dead, dtype=np.int64))
                self._vectors -= len(dead)
                dead.clear()
        return True

    def _found(self, number: int, kind: Literal["exact", "semantic"], similarity: float) -> Lookup:
        self._entries.move_to_end(number)
        self._counts[kind] += 1
        entry = self._entries[number]
        return Lookup(entry.value, kind, similarity, number, entry.text)

    def _bytes(self) -> int:
        """Bytes of texts and vectors, dead vectors included; the caller holds the lock."""
        return self._texts_bytes + self._vectors * (4 * self._dimension + 8)

    def _missed(self, lookup: Lookup) -> Lookup:
        self._counts["miss"] += 1
        return lookup

    def _refuse(self, name: str) -> None:
        self._refused[name] = self._refused.get(name, 0) + 1


def _new_index(dimension: int) -> Any:
    """Return an exact inner-product index that keeps our numbers when vectors are removed."""
    import faiss

    faiss.omp_set_num_threads(1)
    return faiss.IndexIDMap(faiss.IndexFlatIP(dimension))


class ErrorBound:
    """Serves an entry only as often as keeps its expected errors per request below ``delta``.

    The idea is vCache's (Schroeder et al., arXiv 2502.03771): no global threshold, but trust that
    each entry earns. The rule here is our own and assumes no shape of the curve: the similarities
    of an entry are cut into bands; requests of one band that were generated anyway tell how often
    the entry would have been wrong (``k`` of ``n``); ``u`` is the upper Clopper-Pearson limit of
    that share at confidence ``1 - delta / 10``. The entry is then served with probability
    ``min(1, 0.9 delta / u)``, so that a request is answered wrongly with probability at most
    ``0.9 delta`` where the limit holds and ``delta / 10`` more where it does not.

    It holds for requests of a band that are exchangeable in time, and for each ``n`` by itself
    (the limit is not corrected for looking again and again). The price is generations: with
    ``delta`` of 1 % an entry that is never wrong needs hundreds of them before it is trusted.

    Parameters
    ----------
    delta:
        Bound on wrong answers per request, within (0, 1).
    bands:
        Increasing inner edges of the similarity bands.
    seed:
        Seed of the choice between serving and generating.
    """

    def __init__(
        self, delta: float, bands: Sequence[float] = (0.7, 0.8, 0.9, 0.95), seed: int = 0
    ) -> None:
        if not 0 < delta < 1:
            raise ValueError(f"delta is {delta}; it must be above 0 and below 1")
        self._delta = delta
        self._edges = np.asarray(bands, dtype=float)
        self._random = random.Random(seed)
        self._seen: dict[int, np.ndarray] = {}

    def trust(self, entry: int, similarity: float) -> float:
        """Return the probability with which the entry is served at this similarity."""
        if entry not in self._seen:
            return min(1.0, 0.9 * self._delta)
        wrong, total = self._seen[entry][int(np.searchsorted(self._edges, similarity))]
        limit = error_limit(int(wrong), int(total), self._delta / 10)
        return min(1.0, 0.9 * self._delta / limit)

    def admits(self, entry: int, similarity: float) -> bool:
        """Whether to serve this time; a draw with the probability of :meth:`trust`."""
        return self._random.random() < self.trust(entry, similarity)

    def observe(self, entry: int, similarity: float, correct: bool) -> None:
        """Count a generated request to which the entry was the candidate."""
        counts = self._seen.setdefault(entry, np.zeros((len(self._edges) + 1, 2), dtype=int))
        counts[int(np.searchsorted(self._edges, similarity))] += (not correct, 1)

    def forget(self, entry: int) -> None:
        """Drop what was learned about an entry that is gone."""
        self._seen.pop(entry, None)


@lru_cache(maxsize=65_536)
def error_limit(wrong: int, total: int, alpha: float) -> float:
    """Return the one-sided upper Clopper-Pearson limit of a share at confidence ``1 - alpha``.

    It is the error share at which ``wrong`` or fewer errors in ``total`` have probability
    ``alpha`` (Clopper and Pearson, 1934); 1 if nothing was seen or all of it was wrong.
    """
    if wrong >= total:
        return 1.0
    # The quantile of scipy.stats.beta, whose import takes longer than that of the index.
    from scipy.special import betaincinv

    return float(betaincinv(wrong + 1, total - wrong, 1 - alpha))
