"""Ways to memoise a pure function, shown on the recursive Fibonacci numbers.

Every builder returns a *fresh* function, so that nothing of an earlier call is remembered, and a
way to ask how many of its calls were computed (misses) and how many were remembered (hits).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from kvbench.errors import one_of


@dataclass(frozen=True)
class Memo:
    """A fresh function and its counters.

    Attributes
    ----------
    call:
        The function, from ``n`` to the n-th Fibonacci number (0, 1, 1, 2, ...).
    counts:
        Returns (misses, hits) so far, or None where nothing is cached.
    """

    call: Callable[[int], int]
    counts: Callable[[], tuple[int, int] | None]


class DictCache:
    """A decorator of a few lines: results by argument in a dict that only grows.

    It asks whether the key is there, not whether the value is true, so ``None``, 0 and an empty
    answer are remembered too. An exception is not remembered: the next call computes again.
    """

    def __init__(self, function: Callable) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.results: dict = {}
        self.misses = self.hits = 0

    def __call__(self, *args):
        """Return the remembered result for ``args``, or compute and remember it."""
        if args in self.results:
            self.hits += 1
            return self.results[args]
        self.misses += 1
        result = self.results[args] = self.function(*args)
        return result


def plain() -> Memo:
    """Recursion without a cache: ``2 F(n+1) - 1`` calls."""

    def fib(n: int) -> int:
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    return Memo(fib, lambda: None)


def iterative() -> Memo:
    """Two variables and a loop: what a better algorithm does without any cache."""

    def fib(n: int) -> int:
        current, following = 0, 1
        for _ in range(n):
            current, following = following, current + following
        return current

    return Memo(fib, lambda: None)


def _functools(decorate: Callable) -> Memo:
    @decorate
    def fib(n: int) -> int:
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    def counts() -> tuple[int, int]:
        info = fib.cache_info()
        return info.misses, info.hits

    return Memo(fib, counts)


def hand_written() -> Memo:
    """The recursion behind :class:`DictCache`."""

    @DictCache
    def fib(n: int) -> int:
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    return Memo(fib, lambda: (fib.misses, fib.hits))


#: Ways to compute the same number, by name. ``functools.cache`` *is* ``lru_cache(maxsize=None)``.
VARIANTS: dict[str, Callable[[], Memo]] = {
    "plain": plain,
    "cache": lambda: _functools(functools.cache),
    "lru_cache": lambda: _functools(functools.lru_cache(maxsize=None)),
    "lru_128": lambda: _functools(functools.lru_cache(maxsize=128)),
    "lru_3": lambda: _functools(functools.lru_cache(maxsize=3)),
    "lru_2": lambda: _functools(functools.lru_cache(maxsize=2)),
    "lru_1": lambda: _functools(functools.lru_cache(maxsize=1)),
    "dict": hand_written,
    "iterative": iterative,
}


def build(variant: str) -> Memo:
    """Return a fresh function of the named variant.

    Raises
    ------
    InputError
        If there is no such variant; the message names the known ones.
    """
    one_of("variant", variant, VARIANTS)
    return VARIANTS[variant]()


def fibonacci(n: int) -> int:
    """Return the n-th Fibonacci number by iteration."""
    return iterative().call(n)


def plain_calls(n: int) -> int:
    """Return how many calls the recursion without a cache makes: ``2 F(n+1) - 1``."""
    return 2 * fibonacci(n + 1) - 1


def counted_calls(n: int) -> int:
    """Count the calls of the recursion without a cache by making them."""
    return 1 if n < 2 else 1 + counted_calls(n - 1) + counted_calls(n - 2)


def ideal_counts(n: int, calls: int = 1) -> tuple[int, int]:
    """Return (misses, hits) after ``calls`` calls for ``n >= 2`` with room for three results.

    Each of ``0 .. n`` is computed once. Of the ``2 n - 1`` requests of the first call, its own
    included, ``n + 1`` are therefore misses and ``n - 2`` hits; every further call is one hit.
    """
    return n + 1, n - 2 + (calls - 1)
