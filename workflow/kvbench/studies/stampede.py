"""How often a value is loaded when many threads want it at once, and how long they wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies._estimates import summary_columns
from kvbench.studies._values import first, milliseconds, number

if TYPE_CHECKING:
    import pandas as pd

PROTECTIONS = (
    "none",
    "lru_cache",
    "cachetools_lock",
    "cachetools_condition",
    "single_flight",
    "xfetch",
    "stale_while_revalidate",
    "set_nx",
)

OPTIONS = option.schema(
    protections=option.choices(
        "Ways to load the value once; xfetch is run with every beta.", PROTECTIONS
    ),
    betas=option.numbers(
        "Eagerness of XFetch's early refresh; 1 is its authors' choice.", [1], maximum=10, above=0
    ),
    threads=option.integers("Threads that ask for the value.", [1, 50], minimum=1, maximum=500),
    service_ms=option.number(
        "Fixed service time of one load, in ms; not a model.", 10, minimum=1, maximum=10_000
    ),
    ttl_ms=option.number("Life of a loaded value, in ms.", 30, minimum=10),
    duration_ms=option.number(
        "How long the threads ask in one round, in ms, beginning with an empty cache; longer than a "
        "load and a life, so that the value expires too.",
        55,
        minimum=10,
    ),
    rounds=option.integer(
        "Rounds; in each every protection meets the crowd once.", 10, minimum=1, maximum=10_000
    ),
    pause_ms=option.number("Pause of a thread between two requests, in ms.", 5, minimum=0.1),
)

#: Ratio, what of a round it compares, and what it says.
_RATIOS = (
    ("wait_ratio", "wait_mean_s", "mean time of a request over that without protection"),
    ("wait_p99_ratio", "wait_p99_s", "99th percentile of a round's requests over the same of none"),
)


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell per number of threads, and one for the protection that needs a server."""
    shared = {
        name: options[name]
        for name in ("betas", "service_ms", "ttl_ms", "duration_ms", "rounds", "pause_ms")
    }
    local = [name for name in options["protections"] if name != "set_nx"]
    cells = {}
    if local:
        cells = {
            f"threads{threads}": Cell({"threads": [threads], "protections": local, **shared})
            for threads in options["threads"]
        }
    if "set_nx" in options["protections"]:
        cells["server"] = Cell({"threads": options["threads"], "protections": ["set_nx"], **shared})
    return cells


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with their waiting times over those without protection, round by round.

    Records made before there were rounds have one turn of each protection, one after the other, and
    no ratio.
    """
    arms = record["samples"].get("arms", {})
    rows = []
    for recorded in record["rows"]:
        row = {"rounds": 1, **recorded}
        base = f"none-{row['threads']:g}"
        if row["protection"] != "none":
            for name, measured, _ in _RATIOS:
                row |= _paired.compare(name, arms, _label(row), base, base, measured)
        rows.append(row)
    return rows


def _label(row: Mapping[str, Any]) -> str:
    """The arm of a row, as the measuring part calls it."""
    beta = f"-{row['beta']:g}" if row["protection"] == "xfetch" else ""
    return f"{row['protection']}-{row['threads']:g}{beta}"


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return loads and waiting times of every protection at the most threads."""
    named: dict[str, Value] = {}
    crowd = table[table["threads"] == table["threads"].max()]
    named["stampede_threads"] = number(first(crowd), "threads", "", 0)
    named["stampede_rounds"] = number(first(crowd), "rounds", "", 0)
    named["stampede_loads_minimum"] = number(first(crowd), "loads_minimum", "", 0)
    for name in PROTECTIONS:
        rows = crowd[crowd["protection"] == name]
        if name == "xfetch" and len(rows):
            # Its authors' choice of beta, or the nearest that was run.
            rows = rows.loc[[(rows["beta"] - 1).abs().idxmin()]]
        row = first(rows)
        named[f"stampede_{name}_loads"] = number(row, "loads", "", 0)
        named[f"stampede_{name}_loads_cold"] = number(row, "loads_cold", "", 0)
        named[f"stampede_{name}_loads_at_once"] = number(row, "loads_at_once", "", 0)
        named[f"stampede_{name}_wait_p99_ms"] = milliseconds(row, "wait_p99_s", 1)
        named[f"stampede_{name}_wait_ratio"] = _paired.value(row, "wait_ratio")
        named[f"stampede_{name}_wait_p99_ratio"] = _paired.value(row, "wait_p99_ratio")
        named[f"stampede_{name}_stale_share"] = number(row, "stale_share", "%", 1, 100)
    named["stampede_xfetch_beta"] = number(
        first(crowd[crowd["protection"] == "xfetch"]), "beta", "", 1
    )
    held = table[table["exclusive"].astype(bool)] if len(table) else table
    named["stampede_exclusive_loads_at_once"] = Value(
        None if held.empty else int(held["loads_at_once"].max()), digits=0
    )
    return named


STUDY = Study(
    name="stampede",
    question="How often is a value loaded when many threads want it at once?",
    options=OPTIONS,
    plan=plan,
    columns={
        "protection": "how the load is protected",
        "beta": "eagerness of XFetch",
        "threads": "threads that ask",
        "exclusive": "whether the protection promises one load at a time",
        "rounds": "turns of the crowd, each with an empty cache; what is counted below is their sum",
        "requests": "requests of all threads",
        "loads": "calls of the source within the duration of each turn, from its first one on",
        "loads_minimum": "loads that keep the value fresh: rounds times duration over "
        "(life + service time), rounded up; fewer where one was still waited for when the asking ended",
        "loads_cold": "loads that began before any of their turn had ended, with an empty cache",
        "loads_at_once": "most loads that ran together",
        "stale_share": "share of requests that got a value older than its life",
        **summary_columns("wait", "time of a request"),
        "wait_max_s": "longest time of a request (s)",
        **{
            column: meaning
            for name, _, words in _RATIOS
            for column, meaning in _paired.meanings(name, words).items()
        },
    },
    values=values,
    aggregate=aggregate,
)
