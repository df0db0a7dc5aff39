"""Seeded request streams: which key is asked for, in which order.

Every stream is an array of integer keys. Keys ``0 .. keys-1`` are ranked by popularity where the
stream has one (0 is the most popular); streams that also visit never-repeated keys number those
from ``keys`` upwards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def popularity(keys: int, exponent: float) -> np.ndarray:
    """Return the Zipf probabilities ``p_i ~ 1 / i**exponent`` of ranks 1..keys; they sum to one.

    An exponent of 0 is the uniform distribution.
    """
    weights = np.arange(1, keys + 1, dtype=float) ** -exponent
    return weights / weights.sum()


def zipf(requests: int, keys: int, seed: int, exponent: float = 0.9) -> np.ndarray:
    """Independent draws from a Zipf popularity: the usual first model of repeated questions."""
    rng = np.random.default_rng(seed)
    return rng.choice(keys, size=requests, p=popularity(keys, exponent))


def uniform(requests: int, keys: int, seed: int) -> np.ndarray:
    """Independent draws with equal probabilities: nothing is worth keeping more than another."""
    return np.random.default_rng(seed).integers(0, keys, size=requests)


def loop(requests: int, keys: int, seed: int = 0) -> np.ndarray:
    """``0, 1, .., keys-1`` over and over: the worst case of LRU when the cache is smaller.

    ``seed`` only chooses where in the loop the stream starts.
    """
    start = int(np.random.default_rng(seed).integers(0, keys))
    return (start + np.arange(requests)) % keys


def scan(
    requests: int,
    keys: int,
    seed: int,
    exponent: float = 0.9,
    period: int | None = None,
    length: int | None = None,
) -> np.ndarray:
    """Zipf requests, interrupted by scans over keys that never come back.

    After every ``period`` Zipf requests (default ``2 * keys``) a scan of ``length`` new keys
    (default ``keys // 2``) passes through, as a batch job or a crawler does.
    """
    period = 2 * keys if period is None else period
    length = max(1, keys // 2) if length is None else length
    stream = zipf(requests, keys, seed, exponent)
    position = np.arange(requests) % (period + length)
    scanning = position >= period
    stream[scanning] = keys + np.arange(int(scanning.sum()))
    return stream


def shift(
    requests: int, keys: int, seed: int, exponent: float = 0.9, phases: int = 4
) -> np.ndarray:
    """Zipf requests whose ranking is dealt anew at the start of each of ``phases`` equal phases.

    The first phase keeps the identity, so rank 0 is key 0 until the first shift.
    """
    rng = np.random.default_rng([seed, 1])
    ranks = zipf(requests, keys, seed, exponent)
    phase = np.arange(requests) * phases // max(1, requests)
    tables = np.stack([np.arange(keys), *(rng.permutation(keys) for _ in range(phases - 1))])
    return tables[phase, ranks]


def sessions(
    requests: int,
    keys: int,
    seed: int,
    exponent: float = 0.9,
    active: int = 8,
    length: int = 40,
    working_set: int = 10,
    shared: float = 0.3,
) -> np.ndarray:
    """Interleaved user sessions: locality in time on top of a common popularity.

    ``active`` sessions take turns at random. Each owns ``working_set`` keys drawn from all, asks
    ``length`` requests and is then replaced. A request is common (Zipf over all keys) with
    probability ``shared``, else one of the session's own keys.
    """
    rng = np.random.default_rng(seed)
    stream = zipf(requests, keys, seed + 1, exponent)
    common = rng.random(requests) < shared
    turn = rng.integers(0, active, size=requests)
    pick = rng.integers(0, working_set, size=requests)
    own = rng.integers(0, keys, size=(active, working_set))
    left = np.full(active, length)
    for position in range(requests):
        who = turn[position]
        if left[who] == 0:
            own[who] = rng.integers(0, keys, size=working_set)
            left[who] = length
        left[who] -= 1
        if not common[position]:
            stream[position] = own[who, pick[position]]
    return stream


#: Streams by name, as options spell them. All take ``(requests, keys, seed)`` first.
STREAMS: dict[str, Callable[..., np.ndarray]] = {
    "zipf": zipf,
    "uniform": uniform,
    "loop": loop,
    "scan": scan,
    "shift": shift,
    "sessions": sessions,
}
