"""Which threshold a semantic cache needs, what it gets wrong, what guards it, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import reduce
from operator import and_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.caching import paraphrases
from kvbench.caching.paraphrases import KINDS
from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies._values import first, number, single_value, with_interval

if TYPE_CHECKING:
    import pandas as pd

#: Policies, each with all that stands before it from ``context`` on.
POLICIES = ("static", "context", "numbers", "names", "polarity", "margin")
INDEXES = ("flat", "hnsw", "sq8")
LANGUAGES = ("en", "pt")

OPTIONS = option.schema(
    **option.encoder(),
    languages=option.choices(
        "Languages of the questions; one without a file in resources/paraphrases is left out.",
        LANGUAGES,
    ),
    paraphrases=option.text(
        "Paraphrase file, in English; null for the one of the repository.", None, nullable=True
    ),
    lowest_threshold=option.number(
        "Where the sweep of thresholds begins; it ends at 0.99.", 0.5, minimum=0, maximum=0.98
    ),
    bootstrap=option.integer(
        "Bootstrap draws of the intervals.", 200, minimum=100, maximum=100_000
    ),
    deltas=option.numbers(
        "Bounds on wrong answers per request of the learned thresholds.",
        [0.01, 0.05],
        above=0,
        below=1,
    ),
    stream_requests=option.integer(
        "Requests of the stream on which thresholds are learned.", 4_000, minimum=100
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
    """One cell per language that embeds and decides, and one per size of the index."""
    chosen = {
        name: value
        for name, value in options.items()
        if name not in ("index_entries", "languages", "paraphrases")
    }
    there = paraphrases.files()
    cells = {}
    for language in options["languages"]:
        file = options["paraphrases"] if language == "en" else there.get(language)
        if language == "en" or file is not None:
            # The name of the file is relative, so that a record names no folder of a machine.
            factors = {"language": language, "paraphrases": file and _relative(file)}
            cells["decisions" if language == "en" else f"decisions-{language}"] = Cell(
                {"part": "decisions", **chosen, **factors}, libraries="models"
            )
    for entries in options["index_entries"]:
        cells[f"index-{entries}"] = Cell({"part": "index", "entries": entries})
    return cells


def _relative(file: Path | str) -> str:
    return os.path.relpath(file) if isinstance(file, Path) else file


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
    " latency, break_even, guide (the caching guide's own pair), held_out (the guards alone, on"
    " pairs that their word lists were not written from) or index",
    "language": "language of the questions",
    "half": "half of the intents: thresholds are tuned on tune and reported on report",
    "score": "score scale: cosine, l2_snippet (squared L2 < 1 - t), gptcache, l2_unnormalised",
    "policy": "static: threshold only; context: conversations and cut-off texts apart; numbers,"
    " names, polarity, margin: one guard more each; guarded, learned, learned_guarded: on the"
    " stream; guards: all guards together, without a cosine",
    "query_class": "class of the questions, all for the mix of the set; of held_out: whether the two"
    " questions of a pair are the same or different",
    "threshold": "threshold on the score's own scale",
    "cosine_asked": "cosine that the threshold means",
    "cosine": "cosine of the guide's own pair of questions",
    "squared_distance": "squared Euclidean distance of that pair",
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
    "judged_rightly": "share of held-out pairs that the guards let pass (same) or refuse (different)",
    "judged_rightly_ci_low": "lower end of its 95 % interval",
    "judged_rightly_ci_high": "upper end of its 95 % interval",
    "semantic_hit_ratio": "hits that were no exact repeat, per request",
    "late_semantic_hit_ratio": "the same over the second half of the stream",
    "auc": "how often a paraphrase is closer to its cached question than one of this class",
    "auc_ci_low": "lower end of its 95 % interval",
    "auc_ci_high": "upper end of its 95 % interval",
    "median_similarity": "median cosine to the own (never_cached: to the nearest) cached question",
    "prevalence": "share of near misses among the requests",
    "step": "embed, search, or lookup (both)",
    "encoder": "sentence encoder",
    "embedding_mean_s": "time per text when all are embedded in batches, as many at a time as the cell has"
    " threads (older records: one) (s)",
    "service_s": "time of a generation (s)",
    "break_even_hit_ratio": "hit ratio from which the cache saves time; above 1 it never does",
    "index": "flat, hnsw (32 links, search width 64) or sq8 (8-bit scalars)",
    "entries": "vectors in the index",
    "p50_s": "median time (s)",
    "p50_s_ci_low": "lower end of the 95 % interval of the median (s)",
    "p50_s_ci_high": "upper end of the 95 % interval of the median (s)",
    "p99_s": "99th percentile of the time (s)",
    **_paired.meanings("search_ratio", "mean time of a search over that of flat, same vectors"),
    "recall_at_1": "share of queries whose nearest vector is the one that flat finds",
    "build_s": "time to build the index, once (s): a single run, which is compared with no other",
    "bytes_per_entry": "serialised bytes per vector",
}


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows, those of an index with its search time over that of flat, round by round.

    Rows of older records are English, and their indexes were searched one after the other: without a
    ratio.
    """
    arms = record.get("samples", {}).get("arms", {})
    rows = []
    for recorded in record["rows"]:
        row = {"language": "en"} | recorded
        if row.get("index") in INDEXES and row["index"] != "flat":
            row |= _paired.compare("search_ratio", arms, row["index"], "flat", "flat")
        rows.append(row)
    return rows


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper and the claims: ``semantic_...``, ``semantic_pt_...``."""
    table = table.reindex(columns=[*table.columns, *(c for c in COLUMNS if c not in table)])
    spoken = table["language"].fillna("en")
    found = {}
    for language in LANGUAGES:
        prefix = "semantic_" if language == "en" else f"semantic_{language}_"
        found |= _Named(table[spoken == language], prefix).all()
    return found | _index_values(table)


class _Named:
    """Values of one language, by name."""

    def __init__(self, table: pd.DataFrame, prefix: str) -> None:
        self._table, self._prefix = table, prefix
        self._found: dict[str, Value] = {}

    def all(self) -> dict[str, Value]:
        """Return every value of the decisions."""
        self._sizes_and_times()
        self._similarities()
        self._policies()
        self._scales()
        self._guide()
        self._streams()
        for name in ("different", "same"):
            chosen = {"part": "held_out", "query_class": name}
            self._rate(f"held_out_{name}", "judged_rightly", 0, **chosen)
        return self._found

    def _rows(self, wanted: Mapping[str, Any]) -> pd.DataFrame:
        # Each smaller table on the way would copy all of its columns.
        conditions = [self._table[column] == value for column, value in wanted.items()]
        return self._table[reduce(and_, conditions)]

    def _rate(self, name: str, column: str, digits: int = 1, **wanted: Any) -> None:
        """Add a share in percent, with its interval where the table has one."""
        row = first(self._rows(wanted))
        self._found[f"{self._prefix}{name}"] = with_interval(row, column, "%", digits, 100)

    def _single(
        self, name: str, column: str, unit: str, digits: int, scale: float = 1, **wanted: Any
    ) -> None:
        value = single_value(self._rows(wanted)[column] * scale, unit, digits)
        self._found[f"{self._prefix}{name}"] = value

    def _sizes_and_times(self) -> None:
        for name, column, query_class in (
            ("texts", "queries", "all"),
            ("intents", "queries", "canonical"),
            ("ambiguous", "ambiguous", "all"),
        ):
            self._single(name, column, "", 0, part="dataset", query_class=query_class)
        for step, digits in (("embed", 1), ("search", 3), ("lookup", 1)):
            self._single(f"{step}_ms", "p50_s", "ms", digits, 1e3, part="latency", step=step)
        for milliseconds in (20, 200):
            chosen = {"part": "break_even", "service_s": milliseconds / 1000}
            self._rate(f"break_even_{milliseconds}ms", "break_even_hit_ratio", 0, **chosen)

    def _similarities(self) -> None:
        near = ("near_miss", *(f"near_{kind}" for kind in KINDS), "never_cached")
        for name in (*near, "paraphrase"):
            chosen = {"part": "auc", "query_class": name}
            self._single(f"median_{name}", "median_similarity", "", 2, **chosen)
            if name != "paraphrase":
                row = first(self._rows(chosen))
                self._found[f"{self._prefix}auc_{name}"] = with_interval(row, "auc", "", 2)
        lowest = self._rows({"part": "threshold"})["threshold"]
        self._found[f"{self._prefix}lowest_threshold"] = Value(
            None if lowest.empty else float(lowest.min()), digits=2
        )

    def _policies(self) -> None:
        for policy in POLICIES:
            chosen = {"part": "policy", "policy": policy, "query_class": "all"}
            self._single(f"{policy}_threshold", "threshold", "", 2, **chosen)
            for column in ("precision", "recall", "false_hit_rate", "hit_ratio"):
                self._rate(f"{policy}_{column}", column, **chosen)
            near = chosen | {"query_class": "near_miss"}
            self._rate(f"{policy}_near_miss_hits", "hit_ratio", **near)
            for column in ("follow_up", "long"):
                pair = chosen | {"query_class": column}
                self._rate(f"{policy}_{column}_hits", "hit_ratio", 0, **pair)
        for prevalence in (0.01, 0.05, 0.2):
            for policy in ("static", "polarity"):
                chosen = {"part": "prevalence", "prevalence": prevalence, "policy": policy}
                name = f"{policy}_precision_at_{round(100 * prevalence)}"
                self._rate(name, "precision", **chosen)

    def _scales(self) -> None:
        """What thresholds of 0.8 and of 0.9, the guide's, mean and do on each score scale."""
        for threshold in (0.8, 0.9):
            at = f"at_{round(100 * threshold)}"
            for score in ("cosine", "l2_snippet", "gptcache", "l2_unnormalised"):
                chosen = {
                    "part": "threshold",
                    "half": "report",
                    "score": score,
                    "threshold": threshold,
                }
                for name, query_class, column in (
                    ("recall", "paraphrase", "recall"),
                    ("near_miss_hits", "near_miss", "hit_ratio"),
                ):
                    self._rate(f"{at}_{score}_{name}", column, query_class=query_class, **chosen)
                self._single(
                    f"{at}_{score}_cosine", "cosine_asked", "", 2, query_class="all", **chosen
                )
            self._found[f"{self._prefix}{at}_cosine_cosine"] = Value(threshold, digits=2)

    def _guide(self) -> None:
        row = first(self._rows({"part": "guide"}))
        for name, column, digits in (("cosine", "cosine", 3), ("distance", "squared_distance", 3)):
            self._found[f"{self._prefix}guide_pair_{name}"] = number(row, column, "", digits)
        # 1 if the guide's own pair is a hit under its own rule, else 0.
        self._found[f"{self._prefix}guide_pair_hit"] = number(row, "hits", "", 0)

    def _streams(self) -> None:
        runs: list[tuple[str, dict[str, Any]]] = [
            (policy, {"policy": policy}) for policy in ("static", "guarded")
        ]
        for delta in (0.01, 0.05):
            for policy in ("learned", "learned_guarded"):
                name = f"{policy}_{round(100 * delta)}"
                runs.append((name, {"policy": policy, "delta": delta}))
        for name, chosen in runs:
            self._rate(f"stream_{name}_errors", "false_hit_rate", 2, part="stream", **chosen)
            self._rate(f"stream_{name}_hits", "semantic_hit_ratio", 1, part="stream", **chosen)


def _index_values(table: pd.DataFrame) -> dict[str, Value]:
    """Return what the search of an index takes, which is the same in every language."""
    found = {}
    rows = table[table["part"] == "index"]
    for entries in (1000, 10_000, 50_000):
        for index in INDEXES:
            row = first(rows[(rows["index"] == index) & (rows["entries"] == entries)])
            name = f"semantic_{index}_{entries}"
            found[f"{name}_ms"] = number(row, "p50_s", "ms", 3, 1e3)
            if index != "flat":
                found[f"{name}_ratio"] = _paired.value(row, "search_ratio")
            found[f"{name}_recall"] = number(row, "recall_at_1", "%", 1, 100)
            found[f"{name}_build_s"] = number(row, "build_s", "s", 2)
    return found


STUDY = Study(
    name="semantic",
    question="Which similarity is enough to serve a stored answer, and how often is it wrong?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
    aggregate=aggregate,
)
