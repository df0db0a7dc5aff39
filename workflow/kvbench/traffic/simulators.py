"""Which program plays a policy: libCacheSim where it is installed and agrees, ours otherwise."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvbench import checkout
from kvbench.caching import policies

#: Policies that libCacheSim has and that give the same number of hits, request by request; S3-FIFO
#: to a thousandth or two of the requests (its queues are rounded otherwise). Its 2Q, W-TinyLFU and
#: random differ in more than that; LFUDA and BeladySize never come back.
_NATIVE = {
    "fifo": "FIFO",
    "lru": "LRU",
    "lfu": "LFU",
    "clock": "Clock",
    "arc": "ARC",
    "sieve": "Sieve",
    "s3_fifo": "S3FIFO",
    "opt": "Belady",
}


#: Below this capacity libCacheSim is not asked: with queues of no length it ends the process.
_LEAST_NATIVE = 64


def native(policy: str, capacity: int) -> bool:
    """Whether libCacheSim plays this policy at this capacity here."""
    return policy in _NATIVE and capacity >= _LEAST_NATIVE and _library() is not None


def _library():
    try:
        import libcachesim
    except ImportError:
        return None
    return libcachesim


def _hashpower(capacity: int) -> int:
    # Its default table alone takes 128 MiB; the table grows by itself.
    return min(24, max(8, math.ceil(math.log2(capacity + 1))))


def requester(policy: str, capacity: int, *, own: bool = False) -> Callable[[int], bool]:
    """A fresh cache of ``capacity`` equal entries as a function: key in, whether it was there out.

    Parameters
    ----------
    policy:
        A name of :data:`kvbench.caching.policies.POLICIES`, ``opt`` excepted.
    own:
        Take our implementation even where libCacheSim has one.
    """
    if own or not native(policy, capacity):
        return policies.build(policy, capacity).request
    library = _library()
    cache = getattr(library, _NATIVE[policy])(capacity, hashpower=_hashpower(capacity))
    request, get = library.Request(obj_size=1), cache.get

    def ask(key: int) -> bool:
        request.obj_id = key
        return get(request)

    return ask


class Stream:
    """A stream of keys that is replayed against many policies; a context manager.

    Parameters
    ----------
    keys:
        Keys in the order of the requests, shape (requests,), whole numbers.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys
        self._list: Sequence[int] | None = None
        self._folder: Path | None = None
        self._trace: Path | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_exc) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def hits(self, policy: str, capacity: int, *, own: bool = False) -> int:
        """Requests found in a cache of ``capacity`` equal entries that begins empty."""
        if own or not native(policy, capacity):
            if self._list is None:
                self._list = self._keys.tolist()
            future = self._list if policy == "opt" else ()
            return policies.simulate(
                policies.build(policy, capacity, future=future), self._list
            ).hits
        library = _library()
        reader = library.TraceReader(
            str(self._file()),
            library.TraceType.ORACLE_GENERAL_TRACE,
            library.ReaderInitParam(ignore_obj_size=True),
        )
        cache = getattr(library, _NATIVE[policy])(capacity, hashpower=_hashpower(capacity))
        missed, _bytes = cache.process_trace(reader)
        return round((1 - missed) * len(self._keys))

    def _file(self) -> Path:
        """The stream with the place of each key's next use, which Belady's policy reads."""
        if self._trace is None:
            self._folder = checkout.scratch()
            self._trace = self._folder / "stream.oracleGeneral"
            count = len(self._keys)
            layout = [("time", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next", "<i8")]
            rows = np.zeros(count, dtype=layout)
            rows["time"] = np.arange(count)
            rows["key"], rows["size"] = self._keys, 1
            rows["next"] = next_uses(self._keys)
            rows.tofile(self._trace)
        return self._trace


def previous_uses(keys: np.ndarray) -> np.ndarray:
    """For each request the place of the one before with the same key, or -1; no dictionary."""
    order = np.argsort(keys, kind="stable")
    result = np.full(len(keys), -1, dtype=np.int64)
    same = keys[order[1:]] == keys[order[:-1]]
    result[order[1:][same]] = order[:-1][same]
    return result


def next_uses(keys: np.ndarray) -> np.ndarray:
    """For each request the place of the next one with the same key, or -1."""
    before = previous_uses(keys)
    result = np.full(len(keys), -1, dtype=np.int64)
    places = np.flatnonzero(before >= 0)
    result[before[places]] = places
    return result


def series(low: float, high: float) -> list[int]:
    """Round capacities (1, 2, 3, 5, 10 ...) from ``low`` to ``high``, with ``high`` as the last."""
    high = max(1, int(high))
    found = {high}
    power = 0
    while 10**power <= high:
        found |= {n for d in (1, 2, 3, 5) if low <= (n := d * 10**power) < high}
        power += 1
    return sorted(found)
