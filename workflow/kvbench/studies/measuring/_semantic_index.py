"""Search time, recall and bytes of three vector indexes of the semantic study."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from kvbench.studies import Outcome
from kvbench.studies._estimates import quantile
from kvbench.studies.measuring._rounds import SPARE, Log, with_controls

INDEXES = ("flat", "hnsw", "sq8")
_HNSW_LINKS, _HNSW_SEARCH = 32, 64
#: Every index is asked the same vectors; a turn asks those of one round.
_ROUNDS, _QUERIES_OF_A_TURN = 40, 10


def measure_index(
    entries: int, seed: int, dimension: int = 384, known: Collection[int] | None = None
) -> Outcome:
    """Search time, recall and bytes of three indexes over clustered unit vectors.

    They are built once, one after the other, and searched in rounds; a second exact one, which has
    no row, is the control.
    """
    import faiss

    faiss.omp_set_num_threads(1)
    spare = _ROUNDS // SPARE
    stored, asked = clustered(entries, (_ROUNDS + spare) * _QUERIES_OF_A_TURN, dimension, seed)
    built = {name: _build(name, stored) for name in INDEXES}
    searched = {
        arm: built[name][0] if arm == name else _build(name, stored)[0]
        for arm, name in with_controls(INDEXES, "flat").items()
    }
    log = Log(known)
    for number, name in log.turns(searched, _ROUNDS, seed, spare=spare):
        first = number * _QUERIES_OF_A_TURN
        seconds, found = _search(searched[name], asked[first : first + _QUERIES_OF_A_TURN])
        log.add(name, number, seconds=sum(seconds) / len(seconds), search_s=seconds, found=found)
    taken = log.arms()
    truth = _joined(taken["flat"]["found"])
    rows = []
    for name, (index, build_s) in built.items():
        searches = _joined(taken[name]["search_s"])
        median, low, high = quantile(searches, 0.5)
        rows.append(
            {
                "part": "index",
                "index": name,
                "entries": entries,
                "queries": len(searches),
                "p50_s": median,
                "p50_s_ci_low": low,
                "p50_s_ci_high": high,
                "p99_s": quantile(searches, 0.99)[0],
                "recall_at_1": float(np.mean(np.equal(_joined(taken[name]["found"]), truth))),
                "build_s": build_s,
                "bytes_per_entry": faiss.serialize_index(index).nbytes / entries,
            }
        )
    return Outcome(rows, {"arms": taken})


def _build(name: str, stored: np.ndarray) -> tuple[Any, float]:
    """Return an index of the stored vectors and the seconds that building it took."""
    import faiss

    dimension = stored.shape[1]
    if name == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = _HNSW_SEARCH
    elif name == "sq8":
        index = faiss.IndexScalarQuantizer(
            dimension, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
    else:
        index = faiss.IndexFlatIP(dimension)
    started = time.perf_counter()
    index.train(stored)
    index.add(stored)
    return index, time.perf_counter() - started


def _search(index: Any, asked: np.ndarray) -> tuple[list[float], list[int]]:
    """Return the seconds of each search, and the number of the vector that it found."""
    # Brings back into the processor's caches what the index before has driven out.
    index.search(asked[:1], 1)
    seconds, found = [], []
    for vector in asked:
        started = time.perf_counter()
        _, numbers = index.search(vector[None, :], 1)
        seconds.append(time.perf_counter() - started)
        found.append(int(numbers[0, 0]))
    return seconds, found


def _joined(turns_of_an_arm: Iterable[Iterable]) -> list:
    return list(itertools.chain.from_iterable(turns_of_an_arm))


def clustered(
    entries: int, queries: int, dimension: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors in clusters of about ten, and queries near some of them.

    Members of a cluster have a cosine of about 0.8 to its centre, as paraphrases have.
    """
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, entries // 10), dimension), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)

    def around(members: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal((len(members), dimension), dtype=np.float32)
        vectors = centres[members] + 0.75 * noise / np.float32(math.sqrt(dimension))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    stored = around(rng.integers(0, len(centres), size=entries))
    return stored, around(rng.integers(0, len(centres), size=queries))
