"""What a caching proxy in front of an OpenAI-compatible server does to the time of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.analysis import published
from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies._estimates import summary, summary_columns
from kvbench.studies._values import first, milliseconds, number, with_interval

if TYPE_CHECKING:
    import pandas as pd

CALLS = (
    "direct",
    "first",
    "repeated",
    "paraphrased",
    "near_miss",
    "no_store",
    "stream_first",
    "stream_repeated",
)

OPTIONS = option.schema(
    prompts=option.integer("Questions that are asked in every way.", 12, minimum=1, maximum=60),
    repeats=option.integer(
        "How often each question is repeated through the proxy.", 3, minimum=1, maximum=1000
    ),
    max_tokens=option.integer("Tokens of an answer.", 16, minimum=1, maximum=4096),
    threshold=option.number(
        "Cosine from which the proxy answers a question alike.", 0.8, minimum=0, maximum=1
    ),
    **option.encoder(),
    model=option.text(
        "Model name sent to a server named in OPENAI_BASE_URL; null otherwise.", None, nullable=True
    ),
    startup_timeout_s=option.number(
        "Longest wait until the server and the proxy answer, in seconds.",
        180,
        minimum=5,
        maximum=3600,
    ),
    call_timeout_s=option.number(
        "Longest wait for one answer, in seconds.", 60, minimum=1, maximum=3600
    ),
)


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell: server, proxy and client together."""
    return {"calls": Cell(dict(options))}


COLUMNS: dict[str, str] = {
    "call": "direct: without the proxy; first, repeated: the same question through it; paraphrased,"
    " near_miss: a question like it; paraphrased_hit: those of them that were hits; no_store: with"
    " Cache-Control: no-store; stream_...: streamed",
    "server": "transformers serve, or external for the one of OPENAI_BASE_URL",
    "calls": "calls made",
    "hits": "calls answered from the cache",
    "semantic_hits": "calls answered with what was stored for another question",
    "right": "answers that are right: equal to the direct one; no hit on a near miss",
    "min_s": "fastest call (s)",
    "max_s": "slowest call (s)",
    **_paired.meanings("speedup", "first call of the same question over this call"),
    **_paired.meanings("overhead_s", "time beyond the direct call of the same question (s)"),
    **summary_columns("call", "time from the call to the whole answer"),
}


#: Call, and the call that the same question makes without its cache.
_FIRST = {"repeated": "first", "paraphrased_hit": "first", "stream_repeated": "stream_first"}


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows, those of hits on paraphrases, and what is paired question by question.

    In records made before there were rounds nothing is paired.
    """
    arms = dict(record["samples"].get("arms", {}))
    rows = [dict(row) for row in record["rows"]]
    alike = arms.get("paraphrased", {})
    hit = [cache == "hit" for cache in alike.get("cache", ())]
    if any(hit):
        only = {
            name: [held for held, wanted in zip(part, hit, strict=True) if wanted]
            for name, part in alike.items()
        }
        arms["paraphrased_hit"] = only
        rows.append(
            {
                "call": "paraphrased_hit",
                "server": rows[0]["server"],
                "calls": len(only["seconds"]),
                "hits": len(only["seconds"]),
                "semantic_hits": only["kind"].count("semantic"),
                "right": only["right"].count(True),
                "min_s": min(only["seconds"]),
                "max_s": max(only["seconds"]),
                **summary(only["seconds"], "call"),
            }
        )
    for row in rows:
        call = row["call"]
        if call in _FIRST:
            row |= _paired.compare("speedup", arms, _FIRST[call], call)
        if call in ("first", "no_store"):
            row |= _paired.difference("overhead_s", arms, call, "direct")
    return rows


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper and the claims, all named ``llm_api_...``."""
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *COLUMNS])))
    rows = {name: first(table[table["call"] == name]) for name in (*CALLS, "paraphrased_hit")}
    found = {}
    for name, row in rows.items():
        found[f"llm_api_{name}_ms"] = milliseconds(row, "call_p50_s", 2)
        found[f"llm_api_{name}_p95_ms"] = number(row, "call_p95_s", "ms", 2, 1000)
        for column in ("calls", "hits", "semantic_hits", "right"):
            found[f"llm_api_{name}_{column}"] = number(row, column, "", 0)
    for name, base in _FIRST.items():
        otherwise = _paired.quotient(rows[base], rows[name], "call_p50_s")
        found[f"llm_api_{name}_speedup"] = _paired.value(rows[name], "speedup", "x", 1, otherwise)
    found["llm_api_miss_overhead_ms"] = with_interval(rows["first"], "overhead_s", "ms", 1, 1000)
    found["llm_api_rounds"] = number(rows["repeated"], "speedup_rounds", "", 0)
    printed = published.api_call()
    for name in ("first", "repeated"):
        seconds = printed[f"{name}_s"]
        found[f"llm_api_published_{name}_ms"] = Value(1000 * seconds, unit="ms", digits=2)
    ratio = printed["first_s"] / printed["repeated_s"]
    found["llm_api_published_speedup"] = Value(ratio, unit="x", digits=0)
    server = table["server"].dropna()
    found["llm_api_server"] = Value(None if server.empty else str(server.iloc[0]))
    return found


STUDY = Study(
    name="llm_api",
    question="What does a caching proxy do to the time of a call to a language model's API?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
    aggregate=aggregate,
    needs_model=True,
)
