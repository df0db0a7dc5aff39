"""Time-to-live policies on a clock that can be turned by hand, and the renewal theory they obey.

Theory: requests for a key are a Poisson process of rate ``l`` per second and its truth changes as
another, of rate ``m``. A miss loads the newest value; a hit is *stale* if the truth has changed
since the load. Every load starts the process anew, so long-run shares are ratios of means over one
cycle (renewal-reward theorem; Ross, Introduction to Probability Models, chapter 7).
"""

from __future__ import annotations

import heapq
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from kvbench.errors import InputError


class VirtualClock:
    """A clock that moves only when told to, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the present time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move forward.

        Raises
        ------
        InputError
            If ``seconds`` is negative.
        """
        if seconds < 0:
            raise InputError(f"clock: cannot move by {seconds} s; time does not run backwards")
        self.now += seconds


class Lifetime(ABC):
    """How long an entry may be served after it was stored; after its last use if it ``renews``."""

    renews = False

    @abstractmethod
    def at_store(self, key: Hashable) -> float:
        """Return the lifetime of an entry that is stored now, seconds."""


def _positive(seconds: float) -> float:
    if not seconds > 0:
        raise InputError(f"expiry: a time to live of {seconds} s; give more than 0")
    return seconds


class Fixed(Lifetime):
    """Every entry lives ``ttl_s`` seconds from the moment it is stored."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = _positive(ttl_s)

    def at_store(self, key: Hashable) -> float:
        """See :class:`Lifetime`."""
        return self.ttl_s


class Sliding(Fixed):
    """Every use starts the ``ttl_s`` seconds anew: a popular entry never expires."""

    renews = True


class Jittered(Lifetime):
    """``ttl_s`` times a factor drawn evenly from ``[1 - spread, 1 + spread]`` for each entry."""

    def __init__(self, ttl_s: float, spread: float = 0.2, seed: int = 0) -> None:
        if not 0 < spread < 1:
            raise InputError(f"expiry: a spread of {spread}; give a number between 0 and 1")
        self.low, self.high = _positive(ttl_s) * (1 - spread), ttl_s * (1 + spread)
        self._draw = random.Random(seed)

    def at_store(self, key: Hashable) -> float:
        """See :class:`Lifetime`."""
        return self._draw.uniform(self.low, self.high)


class ByClass(Lifetime):
    """A lifetime per class of query, so that what changes often is kept shortly."""

    def __init__(self, classify: Callable[[Hashable], str], ttl_s: Mapping[str, float]) -> None:
        self._classify = classify
        self._ttl_s = {name: _positive(seconds) for name, seconds in ttl_s.items()}

    def at_store(self, key: Hashable) -> float:
        """See :class:`Lifetime`."""
        return self._ttl_s[self._classify(key)]


@dataclass
class _Entry:
    value: object
    lifetime: float
    expires: float


class TTLCache:
    """A cache whose entries expire, without a limit on their number.

    Parameters
    ----------
    lifetime:
        How long entries live.
    clock:
        Seconds, never running backwards: ``time.monotonic`` or a :class:`VirtualClock`.
    """

    def __init__(self, lifetime: Lifetime, clock: Callable[[], float]) -> None:
        self._lifetime = lifetime
        self._clock = clock
        self._entries: dict[Hashable, _Entry] = {}
        self._due: list[tuple[float, int, Hashable]] = []
        self._order = 0

    def __len__(self) -> int:
        self.expire()
        return len(self._entries)

    def get(self, key: Hashable, default: object = None) -> object:
        """Return the value of ``key`` if it has not expired, else ``default``."""
        entry = self._entries.get(key)
        now = self._clock()
        if entry is None or entry.expires <= now:
            return default
        if self._lifetime.renews:
            entry.expires = now + entry.lifetime
        return entry.value

    def set(self, key: Hashable, value: object) -> None:
        """Store ``value`` from now on for its lifetime."""
        lifetime = self._lifetime.at_store(key)
        expires = self._clock() + lifetime
        self._entries[key] = _Entry(value, lifetime, expires)
        self._order += 1
        heapq.heappush(self._due, (expires, self._order, key))

    def expire(self) -> int:
        """Drop everything that is due and return how many entries that was."""
        now, dropped = self._clock(), 0
        while self._due and self._due[0][0] <= now:
            _, _, key = heapq.heappop(self._due)
            entry = self._entries.get(key)
            if entry is None:
                continue
            if entry.expires <= now:
                del self._entries[key]
                dropped += 1
            elif self._lifetime.renews:
                # It was used since: look again when its new time is up.
                self._order += 1
                heapq.heappush(self._due, (entry.expires, self._order, key))
        return dropped


@dataclass(frozen=True)
class Prediction:
    """Long-run shares: hits per request, and stale hits per hit."""

    hit_ratio: float
    stale_share: float


def predict_fixed(rate: float, change_rate: float, ttl_s: float) -> Prediction:
    """Return the shares under a fixed lifetime.

    A cycle is one miss and on average ``l T`` hits, evenly spread over ``T``; a hit of age ``a`` is
    stale with probability ``1 - exp(-m a)``. Hence ``h = l T / (1 + l T)`` and a stale share of
    ``1 - (1 - exp(-m T)) / (m T)``.
    """
    hits = rate * ttl_s
    ageing = change_rate * ttl_s
    stale = 1 + math.expm1(-ageing) / ageing if ageing > 0 else 0.0
    return Prediction(hits / (1 + hits), stale)


def predict_jittered(rate: float, change_rate: float, ttl_s: float, spread: float) -> Prediction:
    """Return the shares when the lifetime is even on ``[(1 - spread) T, (1 + spread) T]``.

    As for a fixed lifetime with means over ``T``: hits stay ``l E[T]``; of these
    ``l E[(1 - exp(-m T)) / m]`` are fresh.
    """
    low, high = ttl_s * (1 - spread), ttl_s * (1 + spread)
    hits = rate * ttl_s
    if change_rate == 0:
        return Prediction(hits / (1 + hits), 0.0)
    mean_decay = (math.exp(-change_rate * low) - math.exp(-change_rate * high)) / (
        change_rate * (high - low)
    )
    return Prediction(hits / (1 + hits), 1 - (1 - mean_decay) / (change_rate * ttl_s))


def predict_sliding(rate: float, change_rate: float, ttl_s: float) -> Prediction:
    """Return the shares when every use renews the lifetime.

    A request hits if it follows the one before within ``T``: ``h = 1 - exp(-l T)``. The truth
    survives such a gap with probability ``f = l / (l + m) (1 - exp(-(l + m) T)) / h``, and the
    number of hits in a cycle is geometric, so a share ``f (1 - h) / (1 - h f)`` of hits is fresh.
    """
    hit = -math.expm1(-rate * ttl_s)
    both = rate + change_rate
    unchanged = rate / both * -math.expm1(-both * ttl_s) / hit
    # 1 - h f without cancellation where almost every request hits.
    missed = math.exp(-rate * ttl_s)
    left = missed + hit * (1 - unchanged)
    return Prediction(hit, 1 - unchanged * missed / left if left > 0 else 1.0)


@dataclass(frozen=True)
class Observation:
    """What a simulation counted for one key or class of keys.

    ``hit_error`` and ``stale_error`` are standard errors from the cycles between misses, which are
    independent (regenerative method); None with fewer than 30 cycles or when nothing varies.
    """

    requests: int
    hits: int
    stale: int
    hit_error: float | None
    stale_error: float | None

    @property
    def hit_ratio(self) -> float:
        """Hits per request."""
        return self.hits / self.requests if self.requests else 0.0

    @property
    def stale_share(self) -> float:
        """Stale hits per hit."""
        return self.stale / self.hits if self.hits else 0.0


def observe(
    cache: TTLCache,
    clock: VirtualClock,
    key: Hashable,
    rate: float,
    change_rate: float,
    requests: int,
    seed: int,
) -> Observation:
    """Send ``requests`` Poisson requests for one key through ``cache`` and count.

    The truth is a version that changes by a Poisson process of its own; a hit is stale if it
    returns an older version than the newest at that moment.
    """
    draw = random.Random(seed)
    started, elapsed, version = clock.now, 0.0, 0
    next_change = draw.expovariate(change_rate) if change_rate > 0 else math.inf
    cycles: list[tuple[int, int]] = []
    hits = stale = 0
    for _ in range(requests):
        gap = draw.expovariate(rate)
        elapsed += gap
        clock.now = started + elapsed
        while next_change <= elapsed:
            version += 1
            next_change += draw.expovariate(change_rate)
        found = cache.get(key)
        if found is None:
            cache.set(key, version)
            cycles.append((hits, stale))
            hits = stale = 0
        else:
            hits += 1
            stale += found != version
    # What came before the first miss and after the last one is not a whole cycle.
    whole = cycles[1:]
    if len(whole) < 30:
        # Too few cycles to judge by: count everything after the first miss, without an error.
        tail = [*whole, (hits, stale)]
        total = sum(h for h, _ in tail)
        return Observation(total + len(whole), total, sum(s for _, s in tail), None, None)
    total = sum(h for h, _ in whole)
    return Observation(
        requests=total + len(whole),
        hits=total,
        stale=sum(s for _, s in whole),
        hit_error=_ratio_error([(h, h + 1) for h, _ in whole]),
        stale_error=_ratio_error([(s, h) for h, s in whole]),
    )


def _ratio_error(pairs: list[tuple[int, int]]) -> float | None:
    """Return the standard error of ``sum(a) / sum(b)`` over independent pairs (delta method)."""
    count = len(pairs)
    below = sum(b for _, b in pairs)
    if below == 0:
        return None
    ratio = sum(a for a, _ in pairs) / below
    spread = sum((a - ratio * b) ** 2 for a, b in pairs)
    return math.sqrt(spread * count / (count - 1)) / below or None


def most_expiries_per_second(lifetime: Lifetime, entries: int, horizon_s: float) -> int:
    """Return how many of ``entries`` stored at once expire in the worst second after it.

    Entries are stored at time 0, as after a restart, and looked at once a second.
    """
    clock = VirtualClock()
    cache = TTLCache(lifetime, clock)
    for key in range(entries):
        cache.set(key, 0)
    worst = 0
    while clock.now < horizon_s:
        clock.advance(1.0)
        worst = max(worst, cache.expire())
    return worst
