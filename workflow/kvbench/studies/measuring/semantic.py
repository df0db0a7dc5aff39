"""Which threshold a semantic cache needs, what it gets wrong, what guards it, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching import held_out
from kvbench.caching import paraphrases as paraphrase_set
from kvbench.caching.guards import GUARDS
from kvbench.caching.paraphrases import KINDS, Text
from kvbench.caching.semantic_cache import SemanticCache
from kvbench.caching.similarity import HITS, cosine_asked, squared_l2
from kvbench.studies import Context, Outcome
from kvbench.studies._estimates import quantile, share_interval
from kvbench.studies.measuring import _decisions as decisions
from kvbench.studies.measuring._semantic_index import measure_index
from kvbench.studies.measuring._semantic_stream import stream_rows

if TYPE_CHECKING:
    from kvbench.studies.measuring._decisions import Trial, Verdicts

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
POLICIES = ("static", "context", *GUARDS, "margin")

#: The caching guide's own example: two questions that may share an answer, and its rule for them.
_GUIDE_PAIR = ("What is AI?", "Can you explain AI?")
_GUIDE_THRESHOLD = 0.9

_MARGIN = 0.05
_EMBEDDINGS_TIMED = 60


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run one cell: decisions in one language, or the search of an index of one size."""
    if factors["part"] == "index":
        return measure_index(int(factors["entries"]), context.seed, known=context.known)
    return _measure_decisions(factors, context.seed)


# --- decisions ------------------------------------------------------------------------------------


def _measure_decisions(factors: Mapping[str, Any], seed: int) -> Outcome:
    from kvbench.caching.encoder import SentenceEncoder, unit

    path = factors["paraphrases"]
    texts = paraphrase_set.load(Path(path) if path else paraphrase_set.DEFAULT)
    encoder = SentenceEncoder(factors["encoder"], factors["encoder_revision"])
    unique = list(dict.fromkeys(text.text for text in texts.texts))
    started = time.perf_counter()
    found = encoder.encode(unique, normalise=False, side_by_side=True)
    raw = dict(zip(unique, found, strict=True))
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
    # The same pairs of questions meet under every policy; what a guard says of them does not change.
    guards = {name: lru_cache(maxsize=None)(agree) for name, agree in GUARDS.items()}
    trials = {half: decisions.trial(texts, half) for half in paraphrase_set.HALVES}
    thresholds = np.round(np.arange(factors["lowest_threshold"], 0.995, 0.01), 2)
    draws = factors["bootstrap"]

    rows = _dataset_rows(texts, encoder, len(unique), batch_s)
    verdicts = {
        (policy, half): decisions.judge(case, *_policy(policy, make, vectors, guards))
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
    rows += stream_rows(trials["report"], make, guards, tuned, factors, seed)
    rows += _latency_rows(encoder, make, trials["report"], vectors, factors["service_ms"])
    rows.append(_guide_row(encoder, unit))
    similarities = {
        half: {
            "id": [text.id for text in case.asked],
            "similarity": [round(float(s), 6) for s in verdicts["static", half].similarity],
            "own": [bool(own) for own in verdicts["static", half].own],
        }
        for half, case in trials.items()
    }
    language = factors["language"]
    rows += _held_out_rows(language)
    rows = [{"language": language} | row for row in rows]
    return Outcome(rows, {"paraphrases_sha256": texts.sha256, "nearest": similarities})


def _held_out_rows(language: str) -> list[dict[str, Any]]:
    """How many pairs that the word lists were not written from all guards together judge rightly."""
    pairs = held_out.load().get(language, [])
    rows = []
    for name, same in (("different", False), ("same", True)):
        chosen = [pair for pair in pairs if pair.same is same]
        if not chosen:
            continue
        right = sum(held_out.judged_rightly(pair, GUARDS) for pair in chosen)
        low, high = share_interval(right, len(chosen))
        rows.append(
            {
                "part": "held_out",
                "policy": "guards",
                "query_class": name,
                "queries": len(chosen),
                "judged_rightly": right / len(chosen),
                "judged_rightly_ci_low": low,
                "judged_rightly_ci_high": high,
            }
        )
    return rows


def _policy(
    policy: str,
    make: Callable[..., SemanticCache],
    vectors: Mapping[str, np.ndarray],
    guards: Mapping[str, Callable[[str, str], bool]],
) -> tuple[Callable[[], SemanticCache], Callable[[Text], str]]:
    """Return how the cache of a policy is made, and the namespace of a text under it."""
    if policy == "static":
        # The cache of the guides: no guard, cut-off texts and all conversations in one pot.
        dimension = len(next(iter(vectors.values())))
        return partial(
            SemanticCache, vectors.__getitem__, dimension, threshold=0.0
        ), lambda _text: ""
    chosen = tuple(guards)[: max(0, POLICIES.index(policy) - 1)]
    margin = _MARGIN if policy == "margin" else 0.0
    return partial(
        make, guards={name: guards[name] for name in chosen}, margin=margin
    ), lambda text: text.context


def _guide_row(encoder: Any, unit: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """Whether the guide's own pair is a hit under the guide's rule: squared L2 < 1 - threshold."""
    stored, asked = (unit(encoder(text)) for text in _GUIDE_PAIR)
    cosine = float(stored @ asked)
    distance = squared_l2(cosine)
    return {
        "part": "guide",
        "score": "l2_snippet",
        "threshold": _GUIDE_THRESHOLD,
        "cosine_asked": cosine_asked("l2_snippet", _GUIDE_THRESHOLD),
        "cosine": cosine,
        "squared_distance": float(distance),
        "hits": int(bool(HITS["l2_snippet"](distance, _GUIDE_THRESHOLD))),
        "queries": 1,
    }


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
