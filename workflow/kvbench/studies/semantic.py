"""Which threshold a semantic cache needs, what it gets wrong, what guards it, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvbench.caching.paraphrases import KINDS
from kvbench.paper.values import Value
from kvbench.studies import Cell, Study
from kvbench.studies import _option as option
from kvbench.studies._values import first, interval_value, single_value

if TYPE_CHECKING:
    import pandas as pd

#: Policies, each with all that stands before it from ``context`` on.
POLICIES = ("static", "context", "numbers", "names", "polarity", "margin")
INDEXES = ("flat", "hnsw", "sq8")

OPTIONS = option.schema(
    **option.encoder(),
    paraphrases=option.text(
        "Paraphrase file; null for the one of the repository.", None, nullable=True
    ),
    lowest_threshold=option.number(
        "Where the sweep of thresholds begins; it ends at 0.99.", 0.5, minimum=0, maximum=0.98
    ),
    bootstrap=option.integer(
        "Bootstrap draws of the intervals.", 400, minimum=100, maximum=100_000
    ),
    deltas=option.numbers(
        "Bounds on wrong answers per request of the learned thresholds.",
        [0.01, 0.05],
        above=0,
        below=1,
    ),
    stream_requests=option.integer(
        "Requests of the stream on which thresholds are learned.", 8000, minimum=100
    ),
    stream_exponent=option.number(
        "Zipf exponent of the popularity of intents in that stream.", 0.9, minimum=0, maximum=3
    ),
    prevalences=option.numbers(
        "Shares of near misses in traffic for which precision is computed.",
        [0.01, 0.05, 0.2],
        minimum=0,
        maximum=1,
    ),
    service_ms=option.numbers(
        "Times of a generation for which the break-even hit ratio is computed.", [20, 200], above=0
    ),
    index_entries=option.integers(
        "Entries of the index whose search is timed.",
        [1000, 10_000],
        minimum=100,
        maximum=1_000_000,
    ),
)


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One cell that embeds and decides, and one per size of the index."""
    chosen = {name: value for name, value in options.items() if name != "index_entries"}
    cells = {"decisions": Cell({"part": "decisions", **chosen})}
    for entries in options["index_entries"]:
        cells[f"index-{entries}"] = Cell({"part": "index", "entries": entries})
    return cells


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
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
)
