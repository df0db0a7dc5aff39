"""How much load an OpenAI-compatible endpoint bears, seen from outside."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired, control_of
from kvbench.studies import _option as option
from kvbench.studies._estimates import summary_columns
from kvbench.studies._values import first, number, with_interval

if TYPE_CHECKING:
    import pandas as pd

#: Servers the study can start, and the one that is already there.
SERVERS = ("transformers_serve", "proxy", "vllm_serve", "vllm_proxy", "configured")
#: Servers that are asked in turn, all alive. Two engines would share cores and memory, and of a server
#: that somebody else runs nobody knows what it does meanwhile: those have cells of their own, and
#: nothing is concluded from one cell's times beside another's.
_TOGETHER = {
    "transformers": ("transformers_serve", "proxy"),
    "vllm": ("vllm_serve", "vllm_proxy"),
    "configured": ("configured",),
}
#: A proxy, and the server behind it that it is compared with.
_BEHIND = {"proxy": "transformers_serve", "vllm_proxy": "vllm_serve"}

OPTIONS = option.schema(
    servers=option.choices(
        "Servers that are asked: transformers serve; proxy: ours in front of it; vLLM's own server;"
        " vllm_proxy: our proxy in front of that; configured: the one of url.",
        SERVERS,
        ["transformers_serve", "proxy"],
    ),
    url=option.text(
        "Base address of the configured server, such as http://127.0.0.1:8000/v1.",
        None,
        nullable=True,
    ),
    model=option.text("Name of the configured server's model.", None, nullable=True),
    key_variable=option.text(
        "Environment variable that holds the configured server's key.", None, nullable=True
    ),
    open_conversations=option.integers(
        "Closed loop: conversations that are open at a time, one load each.",
        [1, 2],
        minimum=1,
        maximum=1024,
    ),
    rates_per_s=option.numbers(
        "Open loop: conversations that begin in a second on average (Poisson), one load each.",
        [2.0],
        above=0,
        maximum=10000,
    ),
    conversations=option.integer(
        "Conversations of each load in a round.", 4, minimum=1, maximum=100000
    ),
    turns=option.integer("Questions of each conversation.", 2, minimum=1, maximum=15),
    repeated_share=option.number(
        "Share of the conversations that have the words of an earlier one; the others are like none"
        " before, in any load or round.",
        0.25,
        minimum=0,
        maximum=1,
    ),
    rounds=option.integer(
        "Rounds; in each every load is put on every server once, in an order drawn anew.",
        12,
        minimum=1,
        maximum=1000,
    ),
    max_tokens=option.integer("Longest answer, in tokens.", 16, minimum=2, maximum=4096),
    ttft_limit_s=option.number("Service level: longest time to the first token (s).", 0.5, above=0),
    tpot_limit_s=option.number("Service level: longest time per token after it (s).", 0.1, above=0),
    good_share=option.number(
        "Share of the requests that must keep both limits for a load to be borne.",
        0.95,
        above=0,
        maximum=1,
    ),
    startup_timeout_s=option.number(
        "Longest wait until a server answers (s).", 180, minimum=5, maximum=3600
    ),
    call_timeout_s=option.number("Longest wait for one answer (s).", 60, minimum=1, maximum=3600),
)


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell an engine, with the servers that are asked in turn."""
    shared = {key: value for key, value in options.items() if key != "servers"}
    cells = {}
    for engine, servers in _TOGETHER.items():
        asked = [server for server in options["servers"] if server in servers]
        if asked:
            cells[engine] = Cell({"servers": asked, **shared})
    return cells


#: Ratio, what of a turn it compares, and what it says.
_RATIOS = tuple(
    (f"{name}_ratio", f"{name}_mean_s", f"mean {words} over that of the server behind the proxy")
    for name, words in (
        ("ttft", "time to the first token"),
        ("tpot", "time per token after the first"),
        ("e2e", "time to the whole answer"),
    )
)

COLUMNS: dict[str, str] = {
    "server": "which server was asked",
    "load": "closed: a fixed number of open conversations; open: conversations that begin at random",
    "level": "open conversations (closed), or conversations that begin in a second (open)",
    "requests": "questions that were asked",
    "failed": "questions without a complete answer",
    "rounds": "how often the load was put on the server",
    **summary_columns("ttft", "time to the first token"),
    **summary_columns("tpot", "time per token after the first: (E2E - TTFT)/(tokens - 1)"),
    **summary_columns("e2e", "time to the whole answer"),
    "itl_p99_s": "99th percentile of the gaps between pieces of text (s)",
    "output_tokens_per_s": "tokens that were generated in a second of the load (1/s)",
    "requests_per_s": "complete answers in a second of the load (1/s)",
    "prompt_tokens": "prompt tokens, as the server's usage says",
    "cached_share": "share of them that the server says it reused; empty where it does not say",
    "hit_share": "share of the answers that a proxy says it had stored; empty where none says so",
    "prefix_queries": "vllm:prefix_cache_queries during the load; empty where the server has none",
    "prefix_hits": "vllm:prefix_cache_hits during the load; empty where the server has none",
    "good_share": "share of the requests within both limits of the service level",
    "good_per_s": "goodput: requests within both limits in a second of the load (1/s)",
    "ttft_limit_s": "service level: longest time to the first token (s)",
    "tpot_limit_s": "service level: longest time per token after it (s)",
    "good_share_wanted": "share of the requests that must keep both limits",
    "borne": "whether the load kept the service level: good_share is at least what was asked for",
    **{
        column: meaning
        for name, _, words in _RATIOS
        for column, meaning in _paired.meanings(name, words).items()
    },
}


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows, a proxy's with its times over those of the server behind it, by rounds."""
    arms = record["samples"].get("arms", {})

    def turns(server: str, row: Mapping[str, Any], measured: str) -> dict[str, list]:
        arm = arms.get(f"{server}-{row['load']}-{row['level']:g}", {})
        # A turn without a complete answer has no times.
        there = [held is not None for held in arm.get(measured, ())]
        return {name: list(itertools.compress(column, there)) for name, column in arm.items()}

    rows = []
    for recorded in record["rows"]:
        row = dict(recorded)
        behind = _BEHIND.get(row["server"])
        if behind is not None:
            for name, measured, _ in _RATIOS:
                compared = (row["server"], behind, control_of(behind))
                ends = {server: turns(server, row, measured) for server in compared}
                row |= _paired.compare(name, ends, row["server"], behind, behind, measured)
        rows.append(row)
    return rows


#: Kinds of load.
LOADS = ("closed", "open")

#: Column of the table to name, unit, digits and factor of its value at one load.
_AT = {
    "ttft_p50_s": ("ttft_ms", "ms", 1, 1000),
    "ttft_p99_s": ("ttft_p99_ms", "ms", 1, 1000),
    "tpot_p50_s": ("tpot_ms", "ms", 2, 1000),
    "tpot_p99_s": ("tpot_p99_ms", "ms", 2, 1000),
    "good_per_s": ("good_per_s", "req/s", 2, 1),
    "good_share": ("good_share", "%", 0, 100),
    "cached_share": ("cached_share", "%", 0, 100),
    "hit_share": ("hit_share", "%", 0, 100),
}


def highest_borne(rows: pd.DataFrame) -> float | None:
    """The highest level up to which every load kept the service level; None if the lowest did not.

    A level that was kept above one that was not is chance, and not what the server bears.
    """
    highest = None
    for _, row in rows.sort_values("level").iterrows():
        if row["borne"] != True:  # noqa: E712  a table that was read may hold numpy's or None
            break
        highest = float(row["level"])
    return highest


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper and the claims, all named ``endpoint_...``.

    Of each server and kind of load: the levels put on it, the highest one that it bears, and its
    times at the lowest level (``..._light_...``) and at the highest one put on it (``..._full_...``).
    """
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *COLUMNS])))
    asked = first(table)
    there = [name for name in SERVERS if (table["server"] == name).any()]
    found: dict[str, Value] = {
        "endpoint_servers": Value(", ".join(there)),
        "endpoint_requests": Value(int(table["requests"].sum()) or None, digits=0),
        "endpoint_ttft_limit_ms": number(asked, "ttft_limit_s", "ms", 0, 1000),
        "endpoint_tpot_limit_ms": number(asked, "tpot_limit_s", "ms", 0, 1000),
        "endpoint_good_share_wanted": number(asked, "good_share_wanted", "%", 0, 100),
    }
    for server in SERVERS:
        for load in LOADS:
            name = f"endpoint_{server}_{load}"
            rows = table[(table["server"] == server) & (table["load"] == load)]
            rows = rows.sort_values("level")
            found[f"{name}_highest"] = Value(highest_borne(rows), digits=1)
            for place, row in (("light", first(rows)), ("full", first(rows[::-1]))):
                found[f"{name}_{place}_level"] = number(row, "level", "", 1)
                for column, (short, unit, digits, scale) in _AT.items():
                    found[f"{name}_{place}_{short}"] = with_interval(
                        row, column, unit, digits, scale
                    )
                if server in _BEHIND:
                    for ratio, *_ in _RATIOS:
                        found[f"{name}_{place}_{ratio}"] = _paired.value(row, ratio)
        found[f"endpoint_{server}_failed"] = Value(
            int(table.loc[table["server"] == server, "failed"].sum()) if server in there else None,
            digits=0,
        )
    return found


STUDY = Study(
    name="endpoint",
    question="How much load does an OpenAI-compatible endpoint bear, seen from outside?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
    aggregate=aggregate,
    needs_model=True,
)
