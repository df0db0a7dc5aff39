"""Static and learned thresholds of the semantic study on one long stream of questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching.semantic_cache import ErrorBound, SemanticCache
from kvbench.caching.workload import zipf
from kvbench.studies import _estimates

if TYPE_CHECKING:
    from kvbench.caching.paraphrases import Text
    from kvbench.studies.measuring._decisions import Trial

#: Shares of the stream: exact repeats, paraphrases, near misses, never cached.
_STREAM_MIX = (0.3, 0.4, 0.2, 0.1)


def stream_rows(
    case: Trial,
    make: Callable[..., SemanticCache],
    guards: Mapping[str, Callable[[str, str], bool]],
    tuned: Mapping[str, float],
    factors: Mapping[str, Any],
    seed: int,
) -> list[dict]:
    """Static and learned thresholds on one long stream over the canonical questions."""
    asked = _stream(case, factors["stream_requests"], factors["stream_exponent"], seed)
    floor = factors["lowest_threshold"]
    runs: list[tuple[str, float | None, dict[str, Any]]] = [
        ("static", None, {"threshold": tuned["static"]}),
        ("guarded", None, {"threshold": tuned["polarity"], "guards": guards}),
    ]
    for delta in factors["deltas"]:
        runs.append(("learned", delta, {"threshold": floor, "guards": None}))
        runs.append(("learned_guarded", delta, {"threshold": floor, "guards": guards}))
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
        low, high = _estimates.share_interval(int(outcomes[:, 2].sum()), len(outcomes), "wilson")
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
