"""What a private first level in front of a shared cache server gains, level by level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies._values import first, milliseconds, number

if TYPE_CHECKING:
    import pandas as pd

CONFIGURATIONS = ("source", "l1", "l2", "l1_l2", "l1_l2_promotion", "guide")

OPTIONS = option.schema(
    configurations=option.choices(
        "Levels to compare; source is the run without a cache, guide the layers of the caching "
        "guide (a dict that gives up its oldest entry, then a server).",
        CONFIGURATIONS,
    ),
    service_ms=option.numbers(
        "Fixed service times of the source (L3), in ms; not a model.",
        [1],
        minimum=0.1,
        maximum=10_000,
    ),
    l1_share=option.numbers("Capacities of L1, as shares of the keys.", [0.1], maximum=1, above=0),
    workers=option.integers(
        "Worker processes, each with an L1 of its own and one L2 for all.",
        [1, 2],
        minimum=1,
        maximum=16,
    ),
    guide_entries=option.integer("Entries of the guide's dict.", 1_000, minimum=1),
    **option.streams(
        "every configuration gets the same streams and begins empty", "each worker in a round"
    ),
    exponent=option.number(
        "Zipf exponent of the popularity of requests.", 0.9, minimum=0, maximum=3
    ),
)


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell per service time and number of workers; the configurations share it."""
    shared = (
        "configurations",
        "l1_share",
        "guide_entries",
        "rounds",
        "requests",
        "uncached_requests",
        "keys",
        "exponent",
    )
    return {
        f"service{service_ms}ms-workers{workers}": Cell(
            {
                "service_ms": service_ms,
                "workers": workers,
                **{name: options[name] for name in shared},
            }
        )
        for service_ms in options["service_ms"]
        for workers in options["workers"]
    }


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with their speed-up over the source, paired within rounds."""
    arms = record["samples"].get("arms", {})
    rows = []
    for recorded in record["rows"]:
        row, share = dict(recorded), recorded.get("l1_share")
        sized = share is not None and not math.isnan(share)
        name = f"{row['configuration']}-{share}" if sized else row["configuration"]
        own = arms.get(name)
        if own and row["configuration"] != "source":
            row |= _paired.compare("speedup", arms, "source", name)
            row["speedup_limit"] = _paired.limit(arms, "source", name)
        if own and row["configuration"] == "l1_l2_promotion":
            row |= _paired.compare("speedup_over_l2", arms, "l2", name)
        rows.append(row)
    return rows


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return means per configuration, times per level and what each level gains."""
    # The reference: fewest workers, slowest source, middle size of L1.
    named: dict[str, Value] = {}
    fewest = table[table["workers"] == table["workers"].min()]
    reference = fewest[fewest["service_ms"] == fewest["service_ms"].max()]
    sizes = sorted(reference["l1_share"].dropna().unique())
    size = sizes[len(sizes) // 2] if sizes else math.nan
    rows = {
        name: first(
            reference[
                (reference["configuration"] == name)
                & (reference["l1_share"].isna() | (reference["l1_share"] == size))
            ]
        )
        for name in CONFIGURATIONS
    }
    for name, row in rows.items():
        named[f"layered_{name}_mean_ms"] = milliseconds(row, "mean_s")
        for level in (1, 2, 3):
            named[f"layered_{name}_l{level}_share"] = number(
                row, f"l{level}_share_of_requests", "%", 1, 100
            )
    both = rows["l1_l2_promotion"]
    for level in (1, 2, 3):
        named[f"layered_l{level}_p50_ms"] = milliseconds(both, f"l{level}_p50_s", 4)
    named["layered_service_ms"] = number(both, "service_ms", "ms", 0)
    named["layered_l1_percent_of_keys"] = number(both, "l1_share", "%", 0, 100)
    named["layered_promotion_gain_limit_us"] = number(both, "l1_gain_limit_s", "us", 1, 1e6)
    for name, configuration in (
        ("l1_l2", "l1_l2_promotion"),
        ("l2", "l2"),
        ("l1", "l1"),
        ("guide", "guide"),
    ):
        row = rows[configuration]
        otherwise = _paired.quotient(rows["source"], row, "mean_s")
        named[f"layered_{name}_speedup"] = _paired.value(row, "speedup", "x", 2, otherwise)
    named["layered_l1_gain_over_l2"] = _paired.value(both, "speedup_over_l2", "x", 3)
    named["layered_rounds"] = number(both, "speedup_rounds", "", 0)
    named["layered_speedups_beyond_limit"] = Value(
        _paired.beyond_limit(table.to_dict("records"), "speedup", "speedup_limit")
        if len(table)
        else None,
        digits=0,
    )
    limit = named["layered_promotion_gain_limit_us"].value
    mean = named["layered_l2_mean_ms"].value
    named["layered_l1_gain_limit_percent"] = Value(
        limit / (mean * 10) if limit is not None and mean else None, unit="%", digits=2
    )
    cached = table[table["configuration"] != "source"]
    named["layered_mean_prediction_error"] = Value(
        None
        if cached.empty
        else float((cached["mean_predicted_s"] / cached["mean_s"] - 1).abs().max() * 100),
        unit="%",
        digits=1,
    )
    named["layered_wrong_answers"] = Value(
        None if cached.empty else int(cached["wrong_answers"].sum()), digits=0
    )
    shared = table[(table["workers"] > 1) & (table["service_ms"] == table["service_ms"].max())]
    most = shared[shared["workers"] == shared["workers"].max()]
    at_size = most[most["l1_share"].isna() | (most["l1_share"] == size)]
    named["layered_shared_workers"] = number(first(most), "workers", "", 0)
    for name in ("l1", "l2", "l1_l2_promotion"):
        row = first(at_size[at_size["configuration"] == name])
        named[f"layered_shared_{name}_generations"] = number(row, "generations", "", 0)
    named["layered_shared_unique"] = number(
        first(at_size[at_size["configuration"] == "l2"]), "unique_requests", "", 0
    )
    return named


STUDY = Study(
    name="layered",
    question="What does a private memory in front of the shared cache server gain?",
    options=OPTIONS,
    plan=plan,
    columns={
        "configuration": "source (no cache), l1, l2, both without and both with promotion, "
        "or guide (a dict that gives up its oldest entry, then a server)",
        "service_ms": "fixed service time of the source, L3 (ms)",
        "workers": "worker processes, each with its own L1",
        "l1_share": "capacity of L1 as a share of the keys",
        "rounds": "streams sent, each to an empty cache",
        "requests": "requests of all workers in all rounds",
        "unique_requests": "different requests of all workers together, summed over rounds",
        "unique_per_worker": "different requests of each worker, summed over workers and rounds",
        "generations": "requests that the source answered",
        "wrong_answers": "answers that belong to a different request",
        "mean_s": "mean time of a request (s)",
        "mean_s_ci_low": "lower end of the 95 % interval of the mean, over rounds (s)",
        "mean_s_ci_high": "upper end of the 95 % interval of the mean, over rounds (s)",
        **_paired.meanings("speedup", "time of the source over the time of a request"),
        "speedup_limit": "requests per generation: hits that cost nothing",
        **_paired.meanings("speedup_over_l2", "time with the server alone over the time with both"),
        "mean_predicted_s": "sum over levels of share times median (s)",
        **{
            column: meaning
            for level, what in ((1, "memory"), (2, "server"), (3, "source"))
            for column, meaning in {
                f"l{level}_share_of_requests": f"share of requests answered by L{level} ({what})",
                f"l{level}_p50_s": f"median time of those requests, L{level} (s)",
                f"l{level}_p50_s_ci_low": f"lower end of its 95 % interval, L{level} (s)",
                f"l{level}_p50_s_ci_high": f"upper end of its 95 % interval, L{level} (s)",
                f"l{level}_p99_s": f"99th percentile of those requests, L{level} (s)",
            }.items()
        },
        "l1_gain_limit_s": "share of L1 hits times what an L2 hit takes longer (s per request)",
    },
    values=values,
    aggregate=aggregate,
)
