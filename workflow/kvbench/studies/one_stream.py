"""All caches in front of one model on one stream of repeats, paraphrases and near misses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies._estimates import p95, p95_columns, summary_columns
from kvbench.studies._values import first, milliseconds, number

if TYPE_CHECKING:
    import pandas as pd

STRATEGIES = ("none", "exact", "exact_semantic", "layered")
#: Kinds of an answer, in the order of the figure's bars.
KINDS = ("exact", "semantic", "memory", "server", "model")

OPTIONS = option.schema(
    strategies=option.choices(
        "What stands in front of the model; layered is memory, then a server.", STRATEGIES
    ),
    mixes=option.objects(
        "Shares of the stream; what is left over are new questions.",
        [{"repeats": 0.3, "paraphrases": 0.3, "near_misses": 0.1}],
        repeats=option.share("Share of questions asked before, word for word."),
        paraphrases=option.share("Share of questions asked before in other words."),
        near_misses=option.share("Share of questions like one asked before."),
    ),
    requests=option.integer("Requests of the stream.", 36, minimum=10, maximum=100_000),
    new_tokens=option.integer(
        "Tokens of an answer (greedy, exactly as many).", 16, minimum=1, maximum=1024
    ),
    threshold=option.number(
        "Cosine from which a question is alike (guards are on).", 0.8, minimum=0, maximum=1
    ),
    memory_entries=option.integer(
        "Entries of the memory level of layered, small so that both levels hit.", 8, minimum=1
    ),
    **option.encoder(),
)


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """Return one cell per mix: all strategies answer the same requests by turns."""
    shared = {name: value for name, value in options.items() if name != "mixes"}
    # Every strategy is compared with the model alone.
    shared["strategies"] = list(dict.fromkeys(["none", *options["strategies"]]))
    return {
        mix_name(mix): Cell(
            {"mix": mix_name(mix), "kinds": list(KINDS)} | dict(mix) | shared,
            # A fork holds in memory what it has touched of the libraries, not what its parent had.
            libraries="",
        )
        for mix in options["mixes"]
    }


def mix_name(mix: Mapping[str, float]) -> str:
    """Return a mix as text: ``r30-p30-n10`` is 30 % repeats, 30 % paraphrases, 10 % near misses."""
    shares = (mix["repeats"], mix["paraphrases"], mix["near_misses"])
    return "-".join(
        f"{letter}{100 * s:g}" for letter, s in zip("rpn", shares, strict=True)
    ).replace(".", "_")


COLUMNS: dict[str, str] = {
    "part": "strategy: one row per strategy; quantile: its latencies by share, for the figure",
    "mix": "stream: shares of repeats (r), paraphrases (p), near misses (n) in percent",
    "strategy": "none, exact, exact_semantic, or layered (exact, memory then server)",
    "repeats": "share of repeats that was asked for",
    "paraphrases": "share of paraphrases that was asked for",
    "near_misses": "share of near misses that was asked for",
    "repeat_requests": "requests that repeat an earlier one word for word",
    "paraphrase_requests": "requests that say an earlier question in other words",
    "near_miss_requests": "requests that look like an earlier question",
    "new_requests": "requests that are like no earlier one",
    "requests": "requests of the stream",
    "wrong_answers": "answers that were generated for a question with another answer",
    "exact_answers": "answers of the exact cache",
    "semantic_answers": "answers of the semantic cache",
    "memory_answers": "answers of the memory level of layered",
    "server_answers": "answers of the server level of layered",
    "model_answers": "answers that the model generated",
    "hit_ratio": "answers that the model did not generate, per request",
    "tokens_generated": "tokens that the model generated",
    "mean_s": "mean time of a request (s)",
    **_paired.meanings("speedup", "time of the stream without a cache over the time with it"),
    "speedup_limit": "time of the stream without a cache over that of the requests which this "
    "strategy let the model answer: hits that cost nothing, near 1/(1 - hit ratio)",
    **summary_columns("request", "time of a request"),
    **p95_columns("hit_p95_s", "time of a request that a cache answered"),
    **p95_columns("miss_p95_s", "time of a request that the model answered"),
    "cache_entries": "exact entries at the end",
    "cache_bytes": "bytes of keys, answers and vectors at the end; of layered, on the server",
    "added_memory_mib": "resident memory that starting the strategy added, such as encoder (MiB)",
    "share": "share of the requests that is at most this slow",
    "latency_s": "time of a request at this share (s)",
}


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with the speed-up over the model alone, request by request.

    In records made before there were rounds the strategies ran one after the other: no speed-up of
    theirs is told with an interval.
    """
    arms = record["samples"].get("arms", {})
    rows = []
    for recorded in record["rows"]:
        row = {key: held for key, held in recorded.items() if key != "place"}
        own = arms.get(row["strategy"])
        if own and row["part"] == "strategy" and row["strategy"] != "none":
            hit = [kind != "model" for kind in own["kind"]]
            row |= _paired.of_streams("speedup", arms, "none", row["strategy"], hit)
            for name, wanted in (("hit_p95_s", True), ("miss_p95_s", False)):
                part = [t for t, h in zip(own["seconds"], hit, strict=True) if h == wanted]
                row |= p95(part, name)
            free = {**own, "seconds": [0.0 if h else 1.0 for h in hit]}
            row["speedup_limit"] = _limit(_paired.pairs(arms["none"], free))
        elif not arms and recorded.get("place") == "server" and row["strategy"] == "none":
            # The model alone was measured beside both groups; the table shows it once.
            continue
        rows.append(row)
    return rows


def _limit(requests: list[tuple[float, float]]) -> float:
    """Return the time of all requests over that of those which the model answers.

    A request is its time without a cache, and 1 if the model answers it or else 0.
    """
    generated = sum(seconds * asked for seconds, asked in requests)
    return sum(seconds for seconds, _ in requests) / generated if generated else math.inf


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper and the claims, all named ``one_stream_...``.

    They describe the mix with 30 % repeats and 30 % paraphrases, or the first one of the table.
    """
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *COLUMNS])))
    rows = table[table["part"] == "strategy"]
    chosen = rows[(rows["repeats"] == 0.3) & (rows["paraphrases"] == 0.3)]
    mix = (chosen if len(chosen) else rows)["mix"].head(1).tolist()
    rows = rows[rows["mix"].isin(mix)]
    any_row = first(rows)
    # As drawn: a short stream does not have the shares that were asked for.
    drawn = rows["requests"].astype(float)
    found = {
        f"one_stream_{name}": number(
            first(rows.assign(drawn=100 * rows[column].astype(float) / drawn)), "drawn", "%", 0
        )
        for name, column in (
            ("repeats", "repeat_requests"),
            ("paraphrases", "paraphrase_requests"),
            ("near_misses", "near_miss_requests"),
        )
    }
    found["one_stream_requests"] = number(any_row, "requests", "", 0)
    found["one_stream_mixes"] = Value(int(table["mix"].nunique()) or None, digits=0)
    found["one_stream_speedups_beyond_limit"] = Value(
        _paired.beyond_limit(rows.to_dict("records"), "speedup", "speedup_limit")
        if len(rows)
        else None,
        digits=0,
    )
    for strategy in STRATEGIES:
        row = first(rows[rows["strategy"] == strategy])
        name = f"one_stream_{strategy}"
        for percentile in ("p50", "p99"):
            found[f"{name}_{percentile}_ms"] = milliseconds(row, f"request_{percentile}_s", 2)
        found[f"{name}_p95_ms"] = number(row, "request_p95_s", "ms", 2, 1000)
        for part in ("hit", "miss"):
            found[f"{name}_{part}_p95_ms"] = milliseconds(row, f"{part}_p95_s", 2)
        found[f"{name}_mean_ms"] = number(row, "mean_s", "ms", 1, 1000)
        found[f"{name}_hit_ratio"] = number(row, "hit_ratio", "%", 0, 100)
        for column in ("wrong_answers", "tokens_generated", *(f"{kind}_answers" for kind in KINDS)):
            found[f"{name}_{column}"] = number(row, column, "", 0)
        found[f"{name}_cache_kib"] = number(row, "cache_bytes", "KiB", 1, 1 / 1024)
        found[f"{name}_added_mib"] = number(row, "added_memory_mib", "MiB", 0)
        # No quotient of means stands in: strategies that ran one after the other met other weather.
        found[f"{name}_speedup"] = _paired.value(row, "speedup", "x", 2)
    return found


STUDY = Study(
    name="one_stream",
    question="Which cache helps most on one and the same stream, and how often is it wrong?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
    aggregate=aggregate,
    needs_model=True,
)
