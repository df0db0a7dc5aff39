"""Search time, recall and bytes of three vector indexes of the semantic study."""

from __future__ import annotations

import math
import time

import numpy as np

from kvbench.studies import Outcome
from kvbench.studies._estimates import quantile

_HNSW_LINKS, _HNSW_SEARCH = 32, 64
_INDEX_QUERIES = 200


def measure_index(entries: int, seed: int, dimension: int = 384) -> Outcome:
    """Search time, recall and bytes of three indexes over clustered unit vectors."""
    import faiss

    faiss.omp_set_num_threads(1)
    stored, asked = clustered(entries, _INDEX_QUERIES, dimension, seed)
    rows, samples, truth = [], {}, None
    for name in ("flat", "hnsw", "sq8"):
        index = {
            "flat": lambda: faiss.IndexFlatIP(dimension),
            "hnsw": lambda: faiss.IndexHNSWFlat(dimension, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT),
            "sq8": lambda: faiss.IndexScalarQuantizer(
                dimension, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            ),
        }[name]()
        if name == "hnsw":
            index.hnsw.efSearch = _HNSW_SEARCH
        started = time.perf_counter()
        index.train(stored)
        index.add(stored)
        build_s = time.perf_counter() - started
        index.search(asked[:1], 1)
        seconds, found = [], []
        for vector in asked:
            started = time.perf_counter()
            _, numbers = index.search(vector[None, :], 1)
            seconds.append(time.perf_counter() - started)
            found.append(int(numbers[0, 0]))
        truth = found if truth is None else truth
        median, low, high = quantile(seconds, 0.5)
        samples[name] = seconds
        rows.append(
            {
                "part": "index",
                "index": name,
                "entries": entries,
                "queries": len(asked),
                "p50_s": median,
                "p50_s_ci_low": low,
                "p50_s_ci_high": high,
                "p99_s": quantile(seconds, 0.99)[0],
                "recall_at_1": float(np.mean(np.equal(found, truth))),
                "build_s": build_s,
                "bytes_per_entry": faiss.serialize_index(index).nbytes / entries,
            }
        )
    return Outcome(rows, samples)


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
