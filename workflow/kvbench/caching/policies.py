"""Eviction policies under test, Belady's limit, and the theory they have to meet.

Every policy has the same shape: ``request(key, size)`` says whether the key was resident and makes
it so. Capacity and sizes are in the same unit: entries when every size is 1, bytes otherwise.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.errors import InputError, one_of

#: The string by which Belady, Nelson and Shedler (CACM 12(6), 1969) showed that FIFO may miss
#: more often in a larger cache: 9 misses in 3 places, 10 misses in 4.
BELADY_ANOMALY = (1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5)


class Policy(ABC):
    """A cache that decides by itself what to give up when it is full.

    Parameters
    ----------
    capacity:
        Units of size that fit, at least 1.
    seed:
        Seed of the policies that draw lots.
    items:
        Entries expected to fit, for the policies that count in requests (lifetimes, ageing);
        the capacity itself when sizes are 1.
    future:
        The whole stream, for the one policy that knows it.

    Raises
    ------
    InputError
        If the capacity is less than 1.
    """

    name: str

    def __init__(
        self,
        capacity: int,
        *,
        seed: int = 0,
        items: int | None = None,
        future: Sequence[Hashable] = (),
    ) -> None:
        if capacity < 1:
            raise InputError(f"policy {self.name}: capacity is {capacity}; give at least 1")
        self.capacity = capacity
        self.items = max(1, items or capacity)
        self.used = 0
        self._sizes: dict[Hashable, int] = {}

    def request(self, key: Hashable, size: int = 1) -> bool:
        """Ask for ``key``; return whether it was there. What exceeds the cache is not kept."""
        if key in self._sizes:
            self._hit(key)
            return True
        if size <= self.capacity:
            self._miss(key, size)
        return False

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def resident(self) -> set[Hashable]:
        """Return the keys that are in the cache now."""
        return set(self._sizes)

    def _keep(self, key: Hashable, size: int) -> None:
        self._sizes[key] = size
        self.used += size

    def _drop(self, key: Hashable) -> int:
        size = self._sizes.pop(key)
        self.used -= size
        return size

    @abstractmethod
    def _hit(self, key: Hashable) -> None:
        """Note that a resident key was asked for."""

    @abstractmethod
    def _miss(self, key: Hashable, size: int) -> None:
        """Make room for a new key and keep it."""


class _Queue(Policy):
    """One ordered queue; the policies differ in which end leaves and whether hits move."""

    moves_on_hit = False
    newest_leaves = False

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def _hit(self, key: Hashable) -> None:
        if self.moves_on_hit:
            self._order.move_to_end(key)

    def _miss(self, key: Hashable, size: int) -> None:
        while self.used + size > self.capacity:
            self._drop(self._order.popitem(last=self.newest_leaves)[0])
        self._order[key] = None
        self._keep(key, size)


class FIFO(_Queue):
    """First in, first out: the oldest entry leaves, however often it was used."""

    name = "fifo"


class LIFO(_Queue):
    """Last in, first out: the newest entry leaves, so the first ones stay for ever."""

    name = "lifo"
    newest_leaves = True


class LRU(_Queue):
    """The least recently used entry leaves."""

    name = "lru"
    moves_on_hit = True


class MRU(_Queue):
    """The most recently used entry leaves: the best there is for a loop, poor for anything else."""

    name = "mru"
    moves_on_hit = True
    newest_leaves = True


class LFU(Policy):
    """The entry with the fewest requests since it came in leaves; among equals the least recent."""

    name = "lfu"
    ageing = False

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._priority: dict[Hashable, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, Hashable]] = []
        self._ticks = 0
        self._age = 0

    def _place(self, key: Hashable, count: int) -> None:
        self._ticks += 1
        self._priority[key] = (count, self._ticks)
        heapq.heappush(self._heap, (count, self._ticks, key))
        # Every hit leaves an outdated heap entry behind; rebuilding keeps memory bounded.
        if len(self._heap) > 8 * len(self._priority) + 64:
            self._heap = [(*rank, name) for name, rank in self._priority.items()]
            heapq.heapify(self._heap)

    def _hit(self, key: Hashable) -> None:
        count, _ = self._priority[key]
        self._place(key, self._grown(key, count))

    def _grown(self, key: Hashable, count: int) -> int:
        return count + 1

    def _miss(self, key: Hashable, size: int) -> None:
        while self.used + size > self.capacity:
            count, tick, victim = heapq.heappop(self._heap)
            if self._priority.get(victim) == (count, tick):
                del self._priority[victim]
                self._drop(victim)
                if self.ageing:
                    self._age = count
        self._keep(key, size)
        self._place(key, self._age + 1)


class LFUAgeing(LFU):
    """LFU with dynamic ageing: a new entry starts at the priority of the last one that left.

    Arlitt, Cherkasova, Dilley, Friedrich and Jin, "Evaluating content management techniques for
    Web proxy caches", 2000 (LFU-DA): ``K = F + L`` is set at every request.
    """

    name = "lfu_ageing"
    ageing = True

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._uses: Counter[Hashable] = Counter()

    def _grown(self, key: Hashable, count: int) -> int:
        self._uses[key] += 1
        return self._uses[key] + self._age

    def _miss(self, key: Hashable, size: int) -> None:
        super()._miss(key, size)
        self._uses[key] = 1

    def _drop(self, key: Hashable) -> int:
        del self._uses[key]
        return super()._drop(key)


class Clock(Policy):
    """CLOCK (second chance): the oldest entry leaves unless it was used since the hand last passed.

    Corbató, "A paging experiment with the Multics system", 1968.
    """

    name = "clock"

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._ring: OrderedDict[Hashable, bool] = OrderedDict()

    def _hit(self, key: Hashable) -> None:
        self._ring[key] = True

    def _miss(self, key: Hashable, size: int) -> None:
        while self.used + size > self.capacity:
            oldest, used = self._ring.popitem(last=False)
            if used:
                self._ring[oldest] = False
            else:
                self._drop(oldest)
        self._ring[key] = False
        self._keep(key, size)


class _Segment:
    """An ordered set of sized keys that knows its total; a building block of the queues below."""

    def __init__(self) -> None:
        self.keys: OrderedDict[Hashable, int] = OrderedDict()
        self.used = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self.keys

    def __len__(self) -> int:
        return len(self.keys)

    def push(self, key: Hashable, size: int) -> None:
        self.keys[key] = size
        self.used += size

    def pop_oldest(self) -> tuple[Hashable, int]:
        key, size = self.keys.popitem(last=False)
        self.used -= size
        return key, size

    def remove(self, key: Hashable) -> int:
        size = self.keys.pop(key)
        self.used -= size
        return size

    def trim(self, limit: float) -> None:
        while self.used > limit:
            self.pop_oldest()


class TwoQ(Policy):
    """2Q: newcomers wait in a FIFO; only a key asked for again after leaving it enters the LRU.

    Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement
    algorithm", VLDB 1994, full version, with ``Kin`` a quarter and ``Kout`` half of the capacity.
    """

    name = "two_q"

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._waiting, self._main, self._ghosts = _Segment(), _Segment(), _Segment()

    def _hit(self, key: Hashable) -> None:
        if key in self._main:
            self._main.keys.move_to_end(key)

    def _miss(self, key: Hashable, size: int) -> None:
        # Before room is made: the ghost of the newcomer would push this key's ghost out.
        returned = key in self._ghosts
        if returned:
            self._ghosts.remove(key)
        while self.used + size > self.capacity:
            if self._waiting.used > self.capacity / 4 or not self._main:
                victim, freed = self._waiting.pop_oldest()
                self._ghosts.push(victim, freed)
                self._ghosts.trim(self.capacity / 2)
            else:
                victim, _ = self._main.pop_oldest()
            self._drop(victim)
        if returned:
            self._main.push(key, size)
        else:
            self._waiting.push(key, size)
        self._keep(key, size)


class ARC(Policy):
    """Adaptive replacement: recency and frequency lists, balanced by the ghosts that return.

    Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure 4.
    """

    name = "arc"

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._once, self._often = _Segment(), _Segment()
        self._ghosts_once, self._ghosts_often = _Segment(), _Segment()
        self._target = 0.0

    def _hit(self, key: Hashable) -> None:
        home = self._once if key in self._once else self._often
        self._often.push(key, home.remove(key))

    def _replace(self, in_often_ghosts: bool) -> None:
        recent = self._once.used
        from_once = len(self._once) and (
            recent > self._target or (in_often_ghosts and recent == self._target)
        )
        if from_once or not len(self._often):
            victim, size = self._once.pop_oldest()
            self._ghosts_once.push(victim, size)
        else:
            victim, size = self._often.pop_oldest()
            self._ghosts_often.push(victim, size)
        self._drop(victim)

    def _miss(self, key: Hashable, size: int) -> None:
        returned_often = key in self._ghosts_often
        if key in self._ghosts_once or returned_often:
            ratio = self._ghosts_often.used / max(1, self._ghosts_once.used)
            if returned_often:
                step = max(1.0, self._ghosts_once.used / self._ghosts_often.used) * size
                self._target = max(0.0, self._target - step)
                self._ghosts_often.remove(key)
            else:
                self._target = min(float(self.capacity), self._target + max(1.0, ratio) * size)
                self._ghosts_once.remove(key)
            home = self._often
        else:
            while self._once.used + self._ghosts_once.used + size > self.capacity:
                if len(self._ghosts_once):
                    self._ghosts_once.pop_oldest()
                else:
                    self._drop(self._once.pop_oldest()[0])
            home = self._once
        while self.used + size > self.capacity:
            self._replace(returned_often)
        home.push(key, size)
        self._keep(key, size)
        remembered = self._ghosts_once.used + self._ghosts_often.used
        while self.used + remembered > 2 * self.capacity and len(self._ghosts_often):
            remembered -= self._ghosts_often.pop_oldest()[1]


class Sieve(Policy):
    """SIEVE: a hand walks from old to new, forgives the visited and evicts the first that was not.

    Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is simpler than LRU", NSDI 2024, algorithm 1.
    """

    name = "sieve"

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._visited: dict[Hashable, bool] = {}
        # A doubly linked list with one sentinel: newer[end] is the oldest, older[end] the newest.
        self._end = object()
        self._newer: dict[Hashable, Hashable] = {self._end: self._end}
        self._older: dict[Hashable, Hashable] = {self._end: self._end}
        self._hand: Hashable = self._end

    def _hit(self, key: Hashable) -> None:
        self._visited[key] = True

    def _evict(self) -> None:
        hand = self._hand if self._hand is not self._end else self._newer[self._end]
        while self._visited[hand]:
            self._visited[hand] = False
            hand = self._newer[hand]
            if hand is self._end:
                hand = self._newer[hand]
        newer, older = self._newer.pop(hand), self._older.pop(hand)
        self._newer[older], self._older[newer] = newer, older
        self._hand = newer
        del self._visited[hand]
        self._drop(hand)

    def _miss(self, key: Hashable, size: int) -> None:
        while self.used + size > self.capacity:
            self._evict()
        newest = self._older[self._end]
        self._newer[newest], self._older[key] = key, newest
        self._newer[key], self._older[self._end] = self._end, key
        self._visited[key] = False
        self._keep(key, size)


class S3FIFO(Policy):
    """S3-FIFO: a small queue filters what is asked for once; the main queue gives second chances.

    Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023,
    algorithm 1: a tenth for the small queue, ghosts for as much as the main queue holds, counts
    capped at 3 and cleared on promotion, which needs more than one further request.
    """

    name = "s3_fifo"

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._small, self._main, self._ghosts = _Segment(), _Segment(), _Segment()
        self._uses: dict[Hashable, int] = {}
        self._small_limit = max(1, capacity // 10)

    def _hit(self, key: Hashable) -> None:
        self._uses[key] = min(3, self._uses[key] + 1)

    def _forget(self, key: Hashable) -> None:
        del self._uses[key]
        self._drop(key)

    def _evict_main(self) -> None:
        while len(self._main):
            key, size = self._main.pop_oldest()
            if not self._uses[key]:
                self._forget(key)
                return
            self._uses[key] -= 1
            self._main.push(key, size)

    def _evict_small(self) -> None:
        while len(self._small):
            key, size = self._small.pop_oldest()
            if self._uses[key] <= 1:
                self._forget(key)
                self._ghosts.push(key, size)
                self._ghosts.trim(self.capacity - self._small_limit)
                return
            self._uses[key] = 0
            self._main.push(key, size)
            if self._main.used > self.capacity - self._small_limit:
                self._evict_main()

    def _miss(self, key: Hashable, size: int) -> None:
        while self.used + size > self.capacity:
            if self._small.used >= self._small_limit or not len(self._main):
                self._evict_small()
            else:
                self._evict_main()
        if key in self._ghosts:
            self._ghosts.remove(key)
            self._main.push(key, size)
        else:
            self._small.push(key, size)
        self._uses[key] = 0
        self._keep(key, size)


class WTinyLFU(Policy):
    """W-TinyLFU: a small LRU window, then a segmented LRU that admits only what is asked for more.

    Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM TOS
    2017. The sizes are those of Caffeine, which implements it: a window of one hundredth, four fifths
    of the rest protected, counts halved after ``10 * items`` requests. The counts are exact where the
    paper has a sketch, so what is measured
    is the policy and not the sketch's collisions.
    """

    name = "w_tiny_lfu"

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._window, self._probation, self._protected = _Segment(), _Segment(), _Segment()
        self._window_limit = max(1, capacity // 100)
        self._main_limit = capacity - self._window_limit
        self._protected_limit = self._main_limit * 4 // 5
        self._counts: dict[Hashable, int] = {}
        self._additions = 0

    def request(self, key: Hashable, size: int = 1) -> bool:
        """Count the request, then serve it; see :meth:`Policy.request`."""
        self._counts[key] = self._counts.get(key, 0) + 1
        self._additions += 1
        if self._additions >= 10 * self.items:
            self._additions //= 2
            self._counts = {name: n // 2 for name, n in self._counts.items() if n > 1}
        return super().request(key, size)

    def _hit(self, key: Hashable) -> None:
        if key in self._window:
            self._window.keys.move_to_end(key)
        elif key in self._protected:
            self._protected.keys.move_to_end(key)
        else:
            self._protected.push(key, self._probation.remove(key))
            while self._protected.used > self._protected_limit:
                self._probation.push(*self._protected.pop_oldest())

    def _admit(self, candidate: Hashable, size: int) -> None:
        popularity = self._counts.get(candidate, 0)
        while self._probation.used + self._protected.used + size > self._main_limit:
            segment = self._probation if len(self._probation) else self._protected
            victim = next(iter(segment.keys), None)
            if victim is None or popularity <= self._counts.get(victim, 0):
                self._drop(candidate)
                return
            segment.remove(victim)
            self._drop(victim)
        self._probation.push(candidate, size)

    def _miss(self, key: Hashable, size: int) -> None:
        self._window.push(key, size)
        self._keep(key, size)
        while self._window.used > self._window_limit:
            self._admit(*self._window.pop_oldest())


class TTL(Policy):
    """An entry lives for ``2 * items`` requests; the first to expire makes room earlier."""

    name = "ttl"

    def __init__(self, capacity: int, **rest) -> None:
        super().__init__(capacity, **rest)
        self._expires: OrderedDict[Hashable, int] = OrderedDict()
        self._now = 0

    def request(self, key: Hashable, size: int = 1) -> bool:
        """Let what is due expire, then serve the request; see :meth:`Policy.request`."""
        self._now += 1
        while self._expires and next(iter(self._expires.values())) <= self._now:
            self._drop(self._expires.popitem(last=False)[0])
        return super().request(key, size)

    def _hit(self, key: Hashable) -> None:
        """Use does not lengthen a fixed lifetime."""

    def _miss(self, key: Hashable, size: int) -> None:
        while self.used + size > self.capacity:
            self._drop(self._expires.popitem(last=False)[0])
        self._expires[key] = self._now + 2 * self.items
        self._keep(key, size)


class Random(Policy):
    """An entry drawn at random leaves."""

    name = "random"

    def __init__(self, capacity: int, *, seed: int = 0, **rest) -> None:
        super().__init__(capacity, seed=seed, **rest)
        self._draw = random.Random(seed)
        self._keys: list[Hashable] = []

    def _hit(self, key: Hashable) -> None:
        """Use changes nothing."""

    def _miss(self, key: Hashable, size: int) -> None:
        while self.used + size > self.capacity:
            place = self._draw.randrange(len(self._keys))
            self._keys[place], self._keys[-1] = self._keys[-1], self._keys[place]
            self._drop(self._keys.pop())
        self._keys.append(key)
        self._keep(key, size)


class OPT(Policy):
    """Belady's limit: the entry whose next request is farthest away leaves.

    Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal
    1966. Optimal among policies that keep what they just fetched when all sizes are 1; with
    unequal sizes it is only a strong heuristic.
    """

    name = "opt"

    def __init__(self, capacity: int, *, future: Sequence[Hashable] = (), **rest) -> None:
        super().__init__(capacity, future=future, **rest)
        self._next_use = next_uses(future)
        self._position = -1
        self._due: dict[Hashable, float] = {}
        self._heap: list[tuple[float, int, Hashable]] = []

    def request(self, key: Hashable, size: int = 1) -> bool:
        """Serve the next request of the known stream; see :meth:`Policy.request`."""
        self._position += 1
        return super().request(key, size)

    def _hit(self, key: Hashable) -> None:
        self._due[key] = due = self._next_use[self._position]
        heapq.heappush(self._heap, (-due, self._position, key))

    def _miss(self, key: Hashable, size: int) -> None:
        while self.used + size > self.capacity:
            due, _, victim = heapq.heappop(self._heap)
            if self._due.get(victim) == -due:
                del self._due[victim]
                self._drop(victim)
        self._keep(key, size)
        self._hit(key)


#: Every policy by name, in the order of the paper's table; ``opt`` is the limit, not a competitor.
POLICIES: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in (
        FIFO,
        LIFO,
        LRU,
        MRU,
        LFU,
        LFUAgeing,
        Clock,
        TwoQ,
        ARC,
        Sieve,
        S3FIFO,
        WTinyLFU,
        TTL,
        Random,
        OPT,
    )
}


def build(name: str, capacity: int, **rest) -> Policy:
    """Return a fresh, empty policy; ``rest`` is passed on to :class:`Policy`.

    Raises
    ------
    InputError
        If there is no such policy, or the capacity is less than 1.
    """
    one_of("policy", name, POLICIES)
    return POLICIES[name](capacity, **rest)


def next_uses(stream: Sequence[Hashable]) -> list[float]:
    """Return for each request the position of the next one of the same key, or infinity."""
    seen: dict[Hashable, int] = {}
    result = [math.inf] * len(stream)
    for position in range(len(stream) - 1, -1, -1):
        result[position] = seen.get(stream[position], math.inf)
        seen[stream[position]] = position
    return result


@dataclass(frozen=True)
class Tally:
    """What a replay counted: requests and hits, their bytes, and the seconds it took."""

    requests: int
    hits: int
    size_requested: int
    size_hit: int
    seconds: float

    @property
    def hit_ratio(self) -> float:
        """Hits per request."""
        return self.hits / self.requests if self.requests else 0.0

    @property
    def byte_hit_ratio(self) -> float:
        """Size served from the cache per size asked for."""
        return self.size_hit / self.size_requested if self.size_requested else 0.0


def simulate(
    policy: Policy, stream: Iterable[Hashable], sizes: Sequence[int] | None = None
) -> Tally:
    """Replay ``stream`` against ``policy``; ``sizes[key]`` is the size of a key, 1 if not given."""
    requests = hits = total = served = 0
    request = policy.request
    started = time.perf_counter()
    if sizes is None:
        for key in stream:
            requests += 1
            hits += request(key)
        total, served = requests, hits
    else:
        for key in stream:
            requests += 1
            size = sizes[key]
            total += size
            if request(key, size):
                hits += 1
                served += size
    return Tally(requests, hits, total, served, time.perf_counter() - started)


def _characteristic_time(occupancy, capacity: float) -> float:
    """Solve ``occupancy(T) = capacity`` for an increasing ``occupancy`` by bisection."""
    low, high = 0.0, 1.0
    while occupancy(high) < capacity:
        high *= 2
        if high > 1e18:
            return math.inf
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if occupancy(middle) < capacity else (low, middle)
    return (low + high) / 2


def che_lru_hit_ratio(popularity: np.ndarray, capacity: int) -> float:
    """Return the hit ratio of LRU under independent requests, by Che's approximation.

    ``sum(1 - exp(-p_i T)) = C`` gives the characteristic time ``T``; a key is then a hit with
    probability ``1 - exp(-p_i T)``. Che, Tung and Wang, IEEE JSAC 20(7), 2002.
    """
    if capacity >= len(popularity):
        return 1.0
    time_ = _characteristic_time(lambda t: float(-np.expm1(-popularity * t).sum()), capacity)
    return float((popularity * -np.expm1(-popularity * time_)).sum())


def che_fifo_hit_ratio(popularity: np.ndarray, capacity: int) -> float:
    """Return the hit ratio of FIFO (and random) under independent requests.

    As for LRU with occupancy ``p_i T / (1 + p_i T)``: Martina, Garetto and Leonardi, INFOCOM
    2014, arXiv 1307.6702; that FIFO and random agree is Gelenbe's (1973).
    """
    if capacity >= len(popularity):
        return 1.0

    def resident(t: float) -> np.ndarray:
        return popularity * t / (1 + popularity * t)

    time_ = _characteristic_time(lambda t: float(resident(t).sum()), capacity)
    return float((popularity * resident(time_)).sum())
