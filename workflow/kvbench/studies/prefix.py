"""What one system prompt for many requests saves, and what tokenising the history again loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies._estimates import summary_columns
from kvbench.studies._values import first, milliseconds, number, share_value

if TYPE_CHECKING:
    import pandas as pd


WAYS = (
    "recompute",
    "copied",
    "shared",
    "paged",
    "paged_shared",
    "vllm",
    "vllm_prefix_caching",
)

OPTIONS = option.schema(
    ways=option.choices(
        "Ways to serve requests with one system prompt; the last two are vLLM's, where it is installed.",
        WAYS,
    ),
    system_tokens=option.integers(
        "Lengths of the system prompt that all requests share, in tokens.",
        [0, 64, 256, 1024],
        minimum=0,
        maximum=32_768,
    ),
    question_tokens=option.integer(
        "Tokens of a request after the system prompt; no two are alike.", 24, minimum=1
    ),
    new_tokens=option.integer("Tokens generated for a request.", 8, minimum=2),
    requests=option.integer(
        "Timed requests of each way to serve them, one a round.", 13, minimum=1
    ),
    together=option.integer(
        "Requests whose caches are held at once, to see what they take.", 4, minimum=1, maximum=64
    ),
    block_size=option.integer("Tokens per block of the paged engine.", 16, minimum=1, maximum=1024),
    vllm_block_size=option.integer(
        "Tokens per block of vLLM; its attention on a CPU takes multiples of 32.",
        32,
        minimum=1,
        maximum=1024,
    ),
    scenarios=option.texts(
        "Conversations whose history is decoded and tokenised again.", ["banking_loan_application"]
    ),
    turns=option.integer(
        "Turns of those conversations; null means all.", 6, nullable=True, minimum=2
    ),
    reply_tokens=option.integer("Longest reply in those conversations, in tokens.", 64, minimum=1),
    temperatures=option.numbers(
        "Temperatures of the replies; 0 is greedy.", [0, 1, 2], minimum=0, maximum=5
    ),
)


_SERVING = (
    "ways",
    "question_tokens",
    "new_tokens",
    "requests",
    "together",
    "block_size",
    "vllm_block_size",
)


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell per length of the system prompt; an untimed one per conversation."""
    cells = {
        f"system{length}": Cell(
            {"system_tokens": length, **{name: options[name] for name in _SERVING}},
            # Continuous batching looks for a GPU, and a fork may not where its parent has.
            libraries="",
        )
        for length in options["system_tokens"]
    }
    for scenario in options["scenarios"]:
        factors = {name: options[name] for name in ("turns", "reply_tokens", "temperatures")}
        cells[f"retokenise-{scenario}"] = Cell({"scenario": scenario, **factors}, timed=False)
    return cells


# Table and values -------------------------------------------------------------------------------

COLUMNS: dict[str, str] = {
    "part": "serving: requests with one system prompt; retokenise: a history kept as text",
    "way": "recompute, copied (prefix copied per request), shared (tensors lent), paged, paged_shared, "
    "vllm, vllm_prefix_caching",
    "system_tokens": "tokens of the system prompt that all requests share",
    "prompt_tokens": "tokens of a whole prompt",
    "new_tokens": "tokens generated for a request",
    "requests": "timed requests; one before them is not counted",
    "reused_tokens": "prompt tokens of a request whose keys and values were there, mean",
    "prefill_saved": "the same as a share of the prompt",
    "prefill_saved_predicted": "that share from the lengths: whole blocks only where it is paged",
    **_paired.meanings(
        "ttft_speedup",
        "time to first token when all is recomputed (of paged_shared and vllm_prefix_caching: by the "
        "same engine when nothing is shared) over that of this way, same question",
    ),
    "setup_s": "seconds of reading the system prompt once, beforehand (s)",
    **summary_columns("ttft", "time to first token"),
    **summary_columns("e2e", "time of a request"),
    "together": "requests whose caches are held at once for the next columns",
    "held_mib": "bytes of their caches; of the engine, of the most blocks in use (MiB)",
    "held_mib_predicted": "the same by the physics module (MiB)",
    "reserved_mib": "what an engine reserved for keys and values at its start, used or not (MiB)",
    "engine_start_s": "seconds until vLLM was ready, imports included, compilation not (s)",
    "engine_compile_s": "seconds of compilation, as vLLM counts them (s)",
    "tokens_equal": "share of requests with exactly the tokens of recompute",
    "scenario": "conversation that is held as text",
    "temperature": "temperature of the replies; 0 is greedy",
    "turn": "turn whose prompt was tokenised from the text, counted from 1",
    "held_tokens": "tokens the cache holds before it, without the end mark of the reply",
    "surviving_tokens": "leading tokens of those that the new prompt agrees with",
    "surviving": "the same as a share",
    "reply_tokens": "tokens of the last reply among those held",
    "reply_survives": "share of that reply that the new prompt agrees with",
}


#: The way that each is compared with: those that take turns with it.
_BASES = {
    "copied": "recompute",
    "shared": "recompute",
    "paged_shared": "paged",
    "vllm_prefix_caching": "vllm",
}


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with times to first token compared question by question.

    The first question is left out: it pays for what later ones find allocated.
    """
    arms = {way: _after_the_first(arm) for way, arm in record["samples"].get("arms", {}).items()}
    rows = []
    for recorded in record["rows"]:
        row = dict(recorded)
        way = row.get("way")
        if way in _BASES:
            row |= _paired.compare("ttft_speedup", arms, _BASES[way], way, measured="ttft_s")
        rows.append(row)
    return rows


def _after_the_first(arm: Mapping[str, list]) -> dict[str, list]:
    """Return an arm without its turn of round 0; an arm of older records has no rounds to tell."""
    kept = [place for place, number in enumerate(arm.get("round", ())) if number]
    return {name: [held[place] for place in kept] for name, held in arm.items()}


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper, all named ``prefix_...``, at the longest system prompt."""
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *COLUMNS])))
    served = table[table["part"] == "serving"]
    longest = served[served["system_tokens"] == served["system_tokens"].max()]
    base = first(longest[longest["way"] == "recompute"])
    found = {
        "prefix_system_tokens": number(base, "system_tokens", "", 0),
        "prefix_prompt_tokens": number(base, "prompt_tokens", "", 0),
        "prefix_requests": number(base, "requests", "", 0),
        "prefix_together": number(base, "together", "", 0),
    }
    for way in WAYS:
        row = first(longest[longest["way"] == way])
        name = f"prefix_{way}"
        found[f"{name}_ttft_ms"] = milliseconds(row, "ttft_p50_s", 2)
        found[f"{name}_e2e_ms"] = milliseconds(row, "e2e_p50_s", 2)
        found[f"{name}_saved"] = number(row, "prefill_saved", "%", 1, 100)
        found[f"{name}_held_mib"] = number(row, "held_mib", "MiB", 2)
        found[f"{name}_reused_tokens"] = number(row, "reused_tokens", "", 0)
        found[f"{name}_reserved_mib"] = number(row, "reserved_mib", "MiB", 0)
        found[f"{name}_start_s"] = number(row, "engine_start_s", "s", 1)
        found[f"{name}_tokens_equal"] = number(row, "tokens_equal", "%", 1, 100)
        found[f"{name}_held_predicted_mib"] = number(row, "held_mib_predicted", "MiB", 2)
        found[f"{name}_setup_ms"] = number(row, "setup_s", "ms", 2, 1000)
        other = first(longest[longest["way"] == _BASES.get(way, "recompute")])
        otherwise = _paired.quotient(other, row, "ttft_p50_s")
        found[f"{name}_ttft_speedup"] = _paired.value(row, "ttft_speedup", "x", 2, otherwise)
    found["prefix_tokens_equal"] = share_value(served["tokens_equal"].dropna())
    vllm = served[served["way"].isin(["vllm", "vllm_prefix_caching"])]
    found["prefix_vllm_answers_equal"] = share_value(vllm["tokens_equal"].dropna())
    lowest = vllm["tokens_equal"].min()
    found["prefix_vllm_lowest_equal"] = Value(
        None if math.isnan(lowest) else 100 * float(lowest), unit="%", digits=1
    )
    text = table[table["part"] == "retokenise"]
    found["prefix_retokenise_turns"] = Value(
        None if text.empty else int(text["turn"].max()), digits=0
    )
    hottest = text["temperature"].max()
    found["prefix_sampled_temperature"] = Value(float(hottest) if hottest > 0 else None, digits=1)
    for replies, chosen in (
        ("greedy", text["temperature"] == 0),
        ("sampled", (text["temperature"] == hottest) & (text["temperature"] > 0)),
    ):
        own = text[chosen]
        found[f"prefix_{replies}_survives"] = share_value(own["surviving"].dropna())
        found[f"prefix_{replies}_lost"] = share_value(1 - own["surviving"].dropna())
        found[f"prefix_{replies}_reply_survives"] = share_value(own["reply_survives"].dropna())
    return found


STUDY = Study(
    name="prefix",
    question="What does it save to read a system prompt once for many requests?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
    aggregate=aggregate,
    needs_model=True,
)
