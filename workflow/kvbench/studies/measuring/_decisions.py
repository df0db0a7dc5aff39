"""Right and wrong hits of a semantic cache on labelled questions, with intervals by intent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.caching.paraphrases import Paraphrases, Text
from kvbench.caching.semantic_cache import SemanticCache

#: Cached questions of the labels that come in pairs are the first of each pair.
_PAIRS = ("follow_up", "long")


@dataclass(frozen=True)
class Trial:
    """Questions to a cache that holds the canonical questions of one half.

    Attributes
    ----------
    cached:
        Texts that are in the cache.
    asked:
        Texts that are asked, each once.
    classes:
        Class of each asked text: ``exact``, ``paraphrase_<form>``, ``near_<kind>``,
        ``never_cached``, ``follow_up``, ``long``.
    groups:
        Number of the intent of each asked text: the unit that is resampled.
    may_hit:
        Whether a hit on the own intent is right.
    """

    cached: tuple[Text, ...]
    asked: tuple[Text, ...]
    classes: np.ndarray
    groups: np.ndarray
    may_hit: np.ndarray

    def members(self, name: str) -> np.ndarray:
        """Return which questions belong to a class, to ``paraphrase``, ``near_miss`` or ``all``."""
        if name == "all":
            return np.ones(len(self.asked), dtype=bool)
        if name == "near_miss":
            return np.char.startswith(self.classes, "near_")
        if name == "paraphrase":
            return np.char.startswith(self.classes, "paraphrase_")
        return self.classes == name


def trial(paraphrases: Paraphrases, half: str) -> Trial:
    """Return the trial of one half; ambiguous lines are left out."""
    cached = list(paraphrases.select("canonical", half))
    asked = [(text, "exact") for text in cached]
    asked += [(t, f"paraphrase_{t.form}") for t in paraphrases.select("paraphrase", half)]
    asked += [(t, f"near_{t.kind}") for t in paraphrases.select("near_miss", half)]
    asked += [(text, "never_cached") for text in paraphrases.select("never_cached", half)]
    for label in _PAIRS:
        pairs = paraphrases.select(label, half)
        cached += pairs[::2]
        asked += [(text, label) for text in pairs[1::2]]
    names: dict[str, int] = {}
    classes = np.array([name for _, name in asked])
    return Trial(
        tuple(cached),
        tuple(text for text, _ in asked),
        classes,
        np.array([names.setdefault(text.intent, len(names)) for text, _ in asked]),
        np.array([name == "exact" or name.startswith("paraphrase") for name in classes]),
    )


@dataclass(frozen=True)
class Verdicts:
    """What a policy would do with each question of a trial.

    Attributes
    ----------
    similarity:
        Cosine of the entry that would be served; minus infinity where the policy serves none at
        any threshold. A question is a hit at threshold t if this is at least t.
    own:
        Whether that entry has the intent of the question.
    """

    similarity: np.ndarray
    own: np.ndarray


def judge(
    case: Trial, make: Callable[[], SemanticCache], namespace: Callable[[Text], str]
) -> Verdicts:
    """Ask a real cache, made at threshold 0, every question of the trial."""
    cache = make()
    for text in case.cached:
        cache.put(text.text, text.intent, namespace(text))
    found = [cache.get(text.text, namespace(text)) for text in case.asked]
    return Verdicts(
        np.array([lookup.similarity if lookup.hit else -np.inf for lookup in found]),
        np.array([x.hit and x.value == t.intent for x, t in zip(found, case.asked, strict=True)]),
    )


#: Columns of :func:`counts`.
COUNTS = ("queries", "hits", "correct_hits", "wanted")


def counts(case: Trial, hits: np.ndarray, own: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return counts by group, shape (groups, thresholds, 4), see :data:`COUNTS`.

    ``hits`` has the shape (thresholds, questions). ``wanted`` counts the questions that a perfect
    cache would answer.
    """
    right = hits & own & case.may_hit
    asked = np.broadcast_to(members, hits.shape)
    wanted = np.broadcast_to(members & case.may_hit, hits.shape)
    stacked = np.stack([asked, hits & members, right & members, wanted], axis=-1).astype(float)
    total = np.zeros((int(case.groups.max()) + 1, hits.shape[0], len(COUNTS)))
    np.add.at(total, case.groups, stacked.transpose(1, 0, 2))
    return total


def rates(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rates of summed counts (last axis as in :data:`COUNTS`); 0/0 is NaN.

    ``hit_ratio``: hits per request. ``precision``: right hits per hit. ``recall``: right hits per
    question that a perfect cache answers. ``false_hit_rate``: wrong hits per request. ``f05``:
    F-measure with beta 0.5, which weighs precision over recall.
    """
    queries, hits, correct, wanted = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = correct / hits, correct / wanted
        return {
            "hit_ratio": hits / queries,
            "precision": precision,
            "recall": recall,
            "false_hit_rate": (hits - correct) / queries,
            # Of counts, so that it is 0 and not NaN where there is no hit.
            "f05": 1.25 * correct / (hits + 0.25 * wanted),
        }


def intervals(grouped: np.ndarray, draws: int, seed: int) -> dict[str, tuple]:
    """Return the 95 % bootstrap interval of each rate: (low, high) arrays over thresholds.

    Whole intents are drawn with replacement, because the questions of one intent are alike.
    """
    rng = np.random.default_rng(seed)
    groups = grouped.shape[0]
    weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=draws)
    drawn = rates(np.tensordot(weights, grouped, axes=1))
    found = {}
    for name, values in drawn.items():
        # A rate without a denominator in some draw (no hit at all) is left out of that draw.
        some = ~np.isnan(values).all(axis=0)
        ends = np.full((2, values.shape[1]), np.nan)
        ends[:, some] = np.nanpercentile(values[:, some], [2.5, 97.5], axis=0)
        found[name] = (ends[0], ends[1])
    return found


def best_threshold(thresholds: np.ndarray, f05: np.ndarray) -> float:
    """Return the threshold of the highest F0.5; of several equal ones the strictest."""
    best = np.flatnonzero(f05 >= np.nanmax(f05) - 1e-12)
    return float(thresholds[best[-1]])


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return how often a positive pair is more similar than a negative one (ties count half).

    This is the area under the ROC curve (Mann and Whitney's U over the number of pairs).
    """
    high = np.asarray(positive, dtype=float)[:, None]
    low = np.asarray(negative, dtype=float)[None, :]
    return float((high > low).mean() + 0.5 * (high == low).mean())


def auc_interval(
    positive: Sequence[float],
    positive_groups: Sequence[int],
    negative: Sequence[float],
    negative_groups: Sequence[int],
    draws: int,
    seed: int,
) -> tuple[float, float, float]:
    """Return the AUC and the ends of its 95 % bootstrap interval over whole intents."""
    positive, negative = np.asarray(positive, float), np.asarray(negative, float)
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    groups = int(max(*positive_groups, *negative_groups)) + 1
    # Sum of wins by pair of intents: a draw is then two small products.
    rows = np.zeros((groups, len(negative)))
    np.add.at(rows, np.asarray(positive_groups), wins)
    table = np.zeros((groups, groups))
    np.add.at(table.T, np.asarray(negative_groups), rows.T)
    sizes = [
        np.bincount(np.asarray(member), minlength=groups)
        for member in (positive_groups, negative_groups)
    ]
    present = np.flatnonzero(sizes[0] + sizes[1])
    rng = np.random.default_rng(seed)
    share = np.full(len(present), 1 / len(present))
    weights = np.zeros((draws, groups))
    weights[:, present] = rng.multinomial(len(present), share, size=draws)
    pairs = (weights @ sizes[0]) * (weights @ sizes[1])
    with np.errstate(invalid="ignore"):
        drawn = np.einsum("dg,gh,dh->d", weights, table, weights) / pairs
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(wins.mean()), float(low), float(high)


def precision_at(prevalence: float, paraphrase: tuple[float, float], near_miss: float) -> float:
    """Return the precision of traffic of which a share ``prevalence`` is near misses.

    Parameters
    ----------
    prevalence:
        Share of near misses among the requests; the others are paraphrases.
    paraphrase:
        Share of paraphrases that hit the right entry, and a wrong one.
    near_miss:
        Share of near misses that hit anything.
    """
    right, wrong = paraphrase
    good = (1 - prevalence) * right
    hits = good + (1 - prevalence) * wrong + prevalence * near_miss
    return good / hits if hits else float("nan")
