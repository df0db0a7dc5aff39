"""An exact response cache on a log: repeats, popularity, and hit ratios by capacity, TTL and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.caching import policies
from kvbench.traffic import simulators
from kvbench.traffic.log import Log

#: Times to live that are tried (s): a minute to a week.
TTLS_S = (60.0, 600.0, 3600.0, 6 * 3600.0, 86400.0, 7 * 86400.0)
#: Windows that the log is cut into, to see a cache decay.
WINDOWS = 20
#: Bytes of an entry beside the answer: a SHA-256 key as 64 hexadecimal digits.
KEY_BYTES = 64
_CHI_SQUARE_95 = 3.841458820694124


@dataclass(frozen=True)
class Popularity:
    """Zipf's exponent of a log: maximum likelihood, and its 95 % profile interval."""

    exponent: float
    low: float
    high: float
    top_share: float


def popularity(counts: np.ndarray) -> Popularity | None:
    """Fit ``p_i ~ i**-a`` to the requests of each key, keys ranked by what was observed.

    The interval holds the exponents whose log-likelihood is within half of chi-square(1; 0.95) of
    the best. It takes requests as independent, and ranks as known; with few requests a key the
    ranks follow the noise and the exponent is too high.

    Returns
    -------
    None where fewer than three keys, or no key twice, were asked for: there is nothing to fit.
    """
    ranked = np.sort(counts)[::-1].astype(float)
    if len(ranked) < 3 or ranked[0] < 2:
        return None
    logs, total = np.log(np.arange(1, len(ranked) + 1)), float(ranked.sum())
    weighted = float(ranked @ logs)

    def likelihood(exponent: float) -> float:
        return -exponent * weighted - total * math.log(float(np.exp(-exponent * logs).sum()))

    from scipy.optimize import brentq, minimize_scalar

    best = float(minimize_scalar(lambda a: -likelihood(a), bounds=(0, 8), method="bounded").x)
    bar = likelihood(best) - _CHI_SQUARE_95 / 2

    def edge(end: float) -> float:
        if likelihood(end) >= bar:
            return end
        return float(brentq(lambda a: likelihood(a) - bar, *sorted((best, end))))

    tenth = max(1, round(len(ranked) / 10))
    return Popularity(best, edge(0.0), edge(8.0), float(ranked[:tenth].sum() / total))


def spacing(log: Log) -> tuple[np.ndarray, np.ndarray | None]:
    """Requests, and seconds, between each repeat and the request it repeats."""
    assert log.keys is not None
    before = simulators.previous_uses(log.keys)
    again = np.flatnonzero(before >= 0)
    gaps = again - before[again]
    times = None if log.times_s is None else log.times_s[again] - log.times_s[before[again]]
    return gaps, times


def by_capacity(
    keys: np.ndarray, names: Sequence[str] = tuple(policies.POLICIES), *, points: int = 8
) -> list[dict[str, float]]:
    """Hit ratio of every policy at up to ``points`` capacities, the largest holding every key.

    Returns
    -------
    Rows of ``policy``, ``capacity`` (entries) and ``hit_ratio``.
    """
    distinct = int(keys.max()) + 1
    capacities = simulators.series(max(1, distinct / 1000), distinct)
    capacities = capacities[-points:]
    rows = []
    with simulators.Stream(keys) as stream:
        for name in names:
            for capacity in capacities:
                ratio = stream.hits(name, capacity) / len(keys)
                rows.append({"policy": name, "capacity": capacity, "hit_ratio": ratio})
    return rows


def by_ttl(keys: np.ndarray, times_s: np.ndarray, ttls_s: Sequence[float]) -> list[float]:
    """Hit ratio of an unbounded cache whose entries live ``ttl`` seconds from when they came in.

    A fixed lifetime: a hit does not prolong it (the answer would otherwise never be renewed).
    """
    ratios = []
    order, moments = keys.tolist(), times_s.tolist()
    for ttl in ttls_s:
        stored: dict[int, float] = {}
        hits = 0
        for key, now in zip(order, moments, strict=True):
            if now - stored.get(key, -math.inf) < ttl:
                hits += 1
            else:
                stored[key] = now
        ratios.append(hits / len(order))
    return ratios


def outcomes(keys: np.ndarray, policy: str, capacity: int) -> np.ndarray:
    """Whether each request is a hit, shape (requests,); the cache begins empty."""
    ask = simulators.requester(policy, capacity)
    return np.fromiter((ask(key) for key in _items(keys)), dtype=bool, count=len(keys))


def _items(keys: np.ndarray):
    for start in range(0, len(keys), 2**16):
        yield from keys[start : start + 2**16].tolist()


def windows(requests: int, count: int = WINDOWS) -> np.ndarray:
    """Edges of ``count`` windows of equally many requests, fewer where there are fewer requests."""
    return np.unique(np.linspace(0, requests, min(count, requests) + 1).astype(int))


def entry_bytes(log: Log) -> float | None:
    """Mean bytes of a stored answer with its key, or None where the log does not tell."""
    if log.answer_bytes is not None and log.answer_bytes.any():
        return float(log.answer_bytes.mean()) + KEY_BYTES
    if log.output_tokens is not None:
        from kvbench.traffic.log import BYTES_PER_TOKEN

        return float(log.output_tokens.mean()) * BYTES_PER_TOKEN + KEY_BYTES
    return None
