"""Where should a write go, and what is stale or lost for it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies import _values as named
from kvbench.studies._values import first

if TYPE_CHECKING:
    import pandas as pd


POLICIES = (
    "aside_stale",
    "aside_invalidate",
    "aside_update",
    "read_through",
    "write_through",
    "write_around",
    "write_back",
)

OPTIONS = option.schema(
    policies=option.choices("Write policies to compare.", POLICIES),
    flush_every=option.integers(
        "Writes after which write_back writes to the store.", [50, 500], minimum=1, maximum=100_000
    ),
    write_shares=option.numbers(
        "Shares of the operations that write.", [0.1, 0.5], minimum=0, maximum=1
    ),
    external_shares=option.numbers(
        "Writes by another program straight to the store, per operation.",
        [0, 0.02],
        minimum=0,
        maximum=1,
    ),
    rounds=option.integer(
        "Rounds that a run is cut into: in each, every policy does the same stretch of operations.",
        15,
        minimum=1,
        maximum=10_000,
    ),
    operations=option.integer("Operations of a run.", 600, minimum=10, maximum=10_000_000),
    keys=option.integer(
        "Records in the store (Zipf popularity, exponent 0.9).", 500, minimum=1, maximum=1_000_000
    ),
    capacity=option.integer("Records the cache may hold (LRU).", 100, minimum=1, maximum=1_000_000),
    crashes=option.integer(
        "Runs per policy that are killed at a random operation, and their cache with them.",
        2,
        minimum=0,
        maximum=1000,
    ),
)


COLUMNS = {
    "kind": "steady (a whole run) or crash (killed at a random operation, cache lost)",
    "policy": "write policy",
    "flush_every": "writes between flushes, write_back only",
    "write_share": "share of the operations that write",
    "external_share": "writes by another program straight to the store, per operation",
    "repeat": "number of the crash",
    "operations": "reads and writes done",
    "read_hit_ratio": "reads answered from the cache per read",
    "stale_reads": "reads that returned less than the newest acknowledged value",
    "stale_share": "stale reads per read",
    "store_reads": "rows read from the store",
    "store_writes": "rows written to the store, final flush included",
    "transactions": "commits of the store, final flush included",
    "overwritten_keys": "keys whose newest value, written by the other program, was replaced by an "
    "older one",
    **{
        f"{kind}_{name}": meaning
        for kind in ("read", "write")
        for name, meaning in {
            "p50_s": f"median time of a {kind} (s)",
            "p50_s_ci_low": f"lower end of the 95 % interval of the median time of a {kind} (s)",
            "p50_s_ci_high": f"upper end of the 95 % interval of the median time of a {kind} (s)",
            "p99_s": f"99th percentile of the time of a {kind} (s)",
        }.items()
    },
    **{
        column: meaning
        for kind in ("read", "write")
        for column, meaning in _paired.meanings(
            f"{kind}_speedup", f"mean {kind} of write_through over that of this policy"
        ).items()
    },
    "written_keys": "keys with an acknowledged write before the crash",
    "dirty_keys": "of these, keys not yet in the store by the policy's own account",
    "lost_keys": "of these, keys whose newest acknowledged value is not in the store afterwards",
    "lost_is_dirty": "the lost keys are exactly the dirty ones",
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """Return one cell per share of writes; the policies share a server inside it."""
    rest = {key: value for key, value in options.items() if key != "write_shares"}
    return {
        f"writes-{share:g}": Cell({"write_share": share, **rest})
        for share in options["write_shares"]
    }


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with their reads and writes against those of write_through, round by round.

    Records made before there were rounds hold microseconds, and no ratios.
    """
    arms = record["samples"].get("arms", {})
    rows = []
    for recorded in record["rows"]:
        row = named.in_seconds(recorded)
        if row["kind"] == "steady":
            taken = arms.get(f"{row['external_share']:g}", {})
            flush = row["flush_every"]
            name = row["policy"] if flush is None else f"{row['policy']}-{flush}"
            if name in taken and name != "write_through":
                for kind in ("read", "write"):
                    means = {arm: _means(turns, kind) for arm, turns in taken.items()}
                    row |= _paired.compare(f"{kind}_speedup", means, "write_through", name)
        rows.append(row)
    return rows


def _means(arm: Mapping[str, Any], kind: str) -> dict[str, list]:
    """Return the mean time per round; a round without an operation of that kind has none."""
    marks = arm.get("disturbed", [False] * len(arm["round"]))
    rounds = zip(arm["round"], arm[f"{kind}_s"], marks, strict=True)
    found = [(number, sum(taken) / len(taken), mark) for number, taken, mark in rounds if taken]
    return {
        "round": [number for number, _, _ in found],
        "seconds": [mean for _, mean, _ in found],
        "disturbed": [mark for _, _, mark in found],
    }


def labels(table: pd.DataFrame) -> pd.Series:
    """Return the name of each row's policy, with the flush size for write_back."""
    return table["policy"].where(
        table["flush_every"].isna(),
        # An empty column is of no type in particular, to which a text cannot be added.
        table["policy"].astype(str) + "_" + table["flush_every"].fillna(0).astype(int).astype(str),
    )


#: The rows of the paper's table.
SHOWN = (*POLICIES[:-1], "write_back_50", "write_back_500")


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return staleness, store writes, latency and losses at a tenth of writes."""
    found: dict[str, Value] = {}
    labelled = table.assign(label=labels(table))
    steady = labelled[
        (labelled["kind"] == "steady") & np.isclose(labelled["write_share"].astype(float), 0.1)
    ]
    crash = labelled[labelled["kind"] == "crash"]
    for name in SHOWN:
        own = steady[steady["label"] == name]
        alone, disturbed = own[own["external_share"] == 0], own[own["external_share"] > 0]
        prefix = f"write_policy_{name}"
        for column, scale, unit, digits in (
            ("read_hit_ratio", 100, "%", 1),
            ("stale_share", 100, "%", 1),
            ("stale_reads", 1, "", 0),
            ("store_writes", 1, "", 0),
            ("transactions", 1, "", 0),
        ):
            found[f"{prefix}_{column}"] = named.single_value(scale * alone[column], unit, digits)
        row = first(alone)
        found[f"{prefix}_read_p50_us"] = named.with_interval(row, "read_p50_s", "us", 0, 1e6)
        found[f"{prefix}_write_p50_us"] = named.with_interval(row, "write_p50_s", "us", 0, 1e6)
        found[f"{prefix}_write_p99_us"] = named.number(row, "write_p99_s", "us", 0, 1e6)
        found[f"{prefix}_write_speedup"] = _paired.value(row, "write_speedup", "x", 2)
        found[f"{prefix}_read_speedup"] = _paired.value(row, "read_speedup", "x", 2)
        for column, scale, unit, digits in (
            ("stale_share", 100, "%", 1),
            ("overwritten_keys", 1, "", 0),
        ):
            found[f"{prefix}_external_{column}"] = named.single_value(
                scale * disturbed[column], unit, digits
            )
        own = crash[crash["label"] == name]
        found[f"{prefix}_lost_keys"] = Value(
            int(own["lost_keys"].max()) if len(own) else None, digits=0
        )
    found["write_policy_crashes"] = Value(len(crash) or None, digits=0)
    exact = crash["lost_is_dirty"].astype(bool)
    found["write_policy_lost_is_dirty"] = Value(int(exact.sum()) if len(crash) else None, digits=0)
    back = found["write_policy_write_back_500_store_writes"].value
    through = found["write_policy_write_through_store_writes"].value
    found["write_policy_writes_saved"] = Value(
        100 * (1 - back / through) if back is not None and through else None, unit="%", digits=0
    )
    return found


STUDY = Study(
    name="write_policy",
    question="Where should a write go, and what is stale or lost for it?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
    aggregate=aggregate,
)
