"""What a caching proxy in front of an OpenAI-compatible server does to the time of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study
from kvbench.studies import _option as option
from kvbench.studies._estimates import summary_columns
from kvbench.studies._values import first, milliseconds, number

if TYPE_CHECKING:
    import pandas as pd

#: What the guide printed for one first and one repeated call, in seconds.
PUBLISHED = {"first": 1.458, "repeated": 0.00035}

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
    prompts=option.integer("Questions that are asked in every way.", 10, minimum=1, maximum=60),
    repeats=option.integer(
        "How often each question is repeated through the proxy.", 5, minimum=1, maximum=1000
    ),
    max_tokens=option.integer("Tokens of an answer.", 32, minimum=1, maximum=4096),
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
    **summary_columns("call", "time from the call to the whole answer"),
}


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper and the claims, all named ``llm_api_...``."""
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *COLUMNS])))
    rows = {name: first(table[table["call"] == name]) for name in (*CALLS, "paraphrased_hit")}
    found = {}
    for name, row in rows.items():
        found[f"llm_api_{name}_ms"] = milliseconds(row, "call_p50_s", 2)
        for column in ("calls", "hits", "semantic_hits", "right"):
            found[f"llm_api_{name}_{column}"] = number(row, column, "", 0)
    for name in ("repeated", "paraphrased_hit", "stream_repeated"):
        base = rows["stream_first" if name.startswith("stream") else "first"]
        found[f"llm_api_{name}_speedup"] = _speedup(base, rows[name])
    found["llm_api_miss_overhead_ms"] = _difference(rows["first"], rows["direct"])
    for name, seconds in PUBLISHED.items():
        found[f"llm_api_published_{name}_ms"] = Value(1000 * seconds, unit="ms", digits=2)
    ratio = PUBLISHED["first"] / PUBLISHED["repeated"]
    found["llm_api_published_speedup"] = Value(ratio, unit="x", digits=0)
    server = table["server"].dropna()
    found["llm_api_server"] = Value(None if server.empty else str(server.iloc[0]))
    return found


def _speedup(slow: Mapping[str, Any] | None, fast: Mapping[str, Any] | None) -> Value:
    """Return the ratio of two medians; its interval combines the ends of theirs (conservative)."""
    above, below = (number(row, "call_p50_s", "s", 6).value for row in (slow, fast))
    if above is None or not below:
        return Value(None, unit="x", digits=1)
    ends = (
        slow["call_p50_s_ci_low"] / fast["call_p50_s_ci_high"],
        slow["call_p50_s_ci_high"] / fast["call_p50_s_ci_low"],
    )
    return Value(above / below, (float(ends[0]), float(ends[1])), "x", 1)


def _difference(more: Mapping[str, Any] | None, less: Mapping[str, Any] | None) -> Value:
    above, below = (number(row, "call_p50_s", "s", 6).value for row in (more, less))
    if above is None or below is None:
        return Value(None, unit="ms", digits=1)
    return Value(1000 * (above - below), unit="ms", digits=1)


STUDY = Study(
    name="llm_api",
    question="What does a caching proxy do to the time of a call to a language model's API?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
    needs_model=True,
)
