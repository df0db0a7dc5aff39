"""Filling a response cache before the first user asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable

from kvbench.caching.keys import Request
from kvbench.caching.response_cache import Answer, ResponseCache


def most_popular(log: Iterable[Hashable], count: int) -> list[Hashable]:
    """Return the ``count`` most frequent entries of a request log, most frequent first.

    Ties go to whatever came first, so that the result does not depend on hashing.
    """
    return [entry for entry, _ in Counter(log).most_common(count)]


def preload(
    cache: ResponseCache, requests: Iterable[Request], generate: Callable[[Request], Answer]
) -> int:
    """Make sure that each of ``requests`` is in the cache; return how many were generated.

    What is already stored is not generated again, and an answer that may not be stored (an error,
    a cut-off text) is not retried: the first user will.
    """
    return sum(not cache.answer(request, generate).hit for request in requests)
