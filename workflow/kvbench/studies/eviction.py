"""Which entry should a full cache give up, and how far is each policy from the best possible?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching import policies
from kvbench.paper.values import Value
from kvbench.studies import Cell, Study
from kvbench.studies import _option as option
from kvbench.studies import _values as named

if TYPE_CHECKING:
    import pandas as pd

#: Workloads of the simulation; ``loop`` is a tenth longer than a cache of ``capacity``.
WORKLOADS = ("zipf", "loop", "scan", "shift", "sessions")

#: maxmemory policies of the real server.
SERVER_POLICIES = (
    "allkeys-lru",
    "allkeys-lfu",
    "allkeys-random",
    "volatile-ttl",
    "noeviction",
)

#: Capacity, as a share of the distinct keys, that the paper's table shows.
SHOWN_SHARE = 0.1

OPTIONS = option.schema(
    policies=option.choices(
        "Eviction policies to simulate; opt (Belady) is always computed too.", policies.POLICIES
    ),
    workloads=option.choices("Request streams to simulate.", WORKLOADS),
    capacity_shares=option.numbers(
        "Capacities as shares of the distinct keys of the stream.",
        [0.01, 0.05, 0.1, 0.5],
        maximum=1,
        above=0,
    ),
    exponents=option.numbers(
        "Zipf exponents of the zipf workload; the first also of scan and shift.",
        [0.9],
        minimum=0,
        maximum=3,
    ),
    keys=option.integer(
        "Distinct popular keys of a simulated stream.", 400, minimum=10, maximum=1_000_000
    ),
    requests=option.integer(
        "Requests of a simulated stream.", 4000, minimum=100, maximum=10_000_000
    ),
    repeats=option.integer(
        "Streams per workload, each from its own seed.", 4, minimum=1, maximum=100
    ),
    speed_rounds=option.integer(
        "Timed replays of each policy, one a round.", 10, minimum=1, maximum=1_000
    ),
    speed_requests=option.integer(
        "Requests of one timed replay of a policy.", 5_000, minimum=1000, maximum=10_000_000
    ),
    server_policies=option.choices(
        "maxmemory policies of the real server; an empty list skips the server.",
        SERVER_POLICIES,
        empty=True,
    ),
    server_samples=option.integers(
        "Values of maxmemory-samples (keys compared at an eviction).", [5], minimum=1, maximum=64
    ),
    server_pace_s=option.numbers(
        "Seconds over which a replay is spread by pauses; 0 is as fast as it goes. "
        "The server's recency clock ticks once a second, so only allkeys-lru is "
        "paced.",
        [0],
        minimum=0,
        maximum=600,
    ),
    server_requests=option.integer(
        "Requests replayed against the server; the first third only warms it.",
        8_000,
        minimum=300,
        maximum=10_000_000,
    ),
    server_keys=option.integer(
        "Distinct keys of the server's stream (Zipf, exponent 0.8).",
        5000,
        minimum=100,
        maximum=1_000_000,
    ),
    server_memory_kib=option.integer(
        "Memory for entries: maxmemory less what the empty server uses, KiB.",
        768,
        minimum=256,
        maximum=1_048_576,
    ),
    server_value_bytes=option.integer(
        "Size of a stored value, bytes.", 1000, minimum=1, maximum=1_048_576
    ),
)


COLUMNS = {
    "kind": "simulated, anomaly (Belady's string under FIFO), speed, or server",
    "workload": "request stream",
    "exponent": "Zipf exponent of the stream",
    "policy": "eviction policy",
    "capacity_share": "capacity as a share of the distinct keys of the stream",
    "capacity": "capacity in entries",
    "repeat": "number of the stream; its seed is the cell's seed plus this",
    "requests": "requests counted",
    "misses": "requests that were not served from the cache",
    "hit_ratio": "requests served from the cache per request",
    "warm_hit_ratio": "hit ratio of the second half of the stream",
    "byte_hit_ratio": "bytes served per byte asked for, with the same share of all bytes as "
    "capacity and log-normal entry sizes",
    "opt_hit_ratio": "hit ratio of Belady's OPT at the same capacity: the limit",
    "gap_closed": "share of the way from FIFO to OPT: (h - h_fifo) / (h_opt - h_fifo)",
    "predicted_hit_ratio": "warm hit ratio by the characteristic-time approximation "
    "(Che for LRU; Martina, Garetto and Leonardi for FIFO and random), independent requests only",
    "requests_per_s": "requests per second of the pure Python policy",
    "samples": "maxmemory-samples of the server",
    "pace_s": "seconds over which the replay was spread by pauses",
    "replay_s": "seconds the replay took; the server's recency clock ticks once a second",
    "items": "mean number of entries the server held (DBSIZE) while measured",
    "bytes_per_item": "server memory per entry beyond the empty server, bytes",
    "refused_writes": "writes refused for lack of memory",
    "exact_hit_ratio": "hit ratio of the exact policy at the measured number of entries",
    "server": "kind and version of the server",
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """Return one cell per stream, one for speed, one for the anomaly and one per setting of the server."""
    cells = {"anomaly": Cell({"kind": "anomaly"}, timed=False)}
    shared = {name: options[name] for name in ("policies", "capacity_shares", "keys", "requests")}
    for name in options["workloads"]:
        for exponent in options["exponents"] if name == "zipf" else options["exponents"][:1]:
            cells[f"simulated-{name}-{exponent:g}"] = Cell(
                {
                    "kind": "simulated",
                    "workload": name,
                    "exponent": exponent,
                    "repeats": options["repeats"],
                    **shared,
                },
                timed=False,
            )
    cells["speed"] = Cell(
        {
            "kind": "speed",
            "capacity_share": SHOWN_SHARE,
            "policies": options["policies"],
            "keys": options["keys"],
            "requests": options["speed_requests"],
            "rounds": options["speed_rounds"],
        }
    )
    for samples in options["server_samples"]:
        for pace in options["server_pace_s"]:
            chosen = [p for p in options["server_policies"] if pace == 0 or p == "allkeys-lru"]
            if not chosen:
                continue
            # The pauses make the replay's own clock part of the result: nothing beside it.
            cells[f"server-{samples}-{pace:g}s"] = Cell(
                {
                    "kind": "server",
                    "policies": chosen,
                    "samples": samples,
                    "pace_s": pace,
                    "requests": options["server_requests"],
                    "keys": options["server_keys"],
                    "memory_kib": options["server_memory_kib"],
                    "value_bytes": options["server_value_bytes"],
                }
            )
    return cells


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return hit ratios at a tenth of the keys, the tests against theory, and the server's rows."""
    found: dict[str, Value] = {}
    simulated = table[table["kind"] == "simulated"]
    at_share = simulated[np.isclose(simulated["capacity_share"].astype(float), SHOWN_SHARE)]
    at_share = at_share.sort_values(["exponent", "repeat"])
    for name in WORKLOADS:
        rows = at_share[at_share["workload"] == name]
        if name == "zipf" and len(rows):
            rows = rows[rows["exponent"] == _shown_exponent(rows["exponent"])]
        best = rows[rows["policy"] != "opt"].groupby("policy")["hit_ratio"].mean()
        found[f"eviction_{name}_best"] = Value(best.idxmax() if len(best) else None)
        for policy in policies.POLICIES:
            own = rows[rows["policy"] == policy]
            prefix = f"eviction_{name}_{policy}"
            found[f"{prefix}_hit"] = named.share_value(own["hit_ratio"])
            found[f"{prefix}_byte_hit"] = named.share_value(own["byte_hit_ratio"])
            found[f"{prefix}_gap_closed"] = named.mean_value(100 * own["gap_closed"], "%", 0)
    beaten = (simulated["hit_ratio"] > simulated["opt_hit_ratio"] + 1e-12).sum()
    found["eviction_opt_beaten"] = Value(int(beaten) if len(simulated) else None, digits=0)
    found["eviction_simulations"] = Value(len(simulated) or None, digits=0)
    for policy in ("lru", "fifo", "random"):
        own = simulated[(simulated["policy"] == policy) & simulated["predicted_hit_ratio"].notna()]
        groups = own.groupby(["exponent", "capacity_share"])
        means = groups[["warm_hit_ratio", "predicted_hit_ratio"]].mean()
        error = (means["warm_hit_ratio"] - means["predicted_hit_ratio"]).abs().max()
        found[f"eviction_{policy}_theory_error"] = Value(
            100 * float(error) if len(means) else None, digits=2
        )
    anomaly = table[table["kind"] == "anomaly"]
    for frames in (3, 4):
        own = anomaly[(anomaly["policy"] == "fifo") & (anomaly["capacity"] == frames)]
        found[f"eviction_anomaly_misses_{frames}"] = named.single_value(
            own["misses"].astype(int), digits=0
        )
    speed = table[table["kind"] == "speed"]
    for policy in policies.POLICIES:
        own = speed.loc[speed["policy"] == policy, "requests_per_s"]
        found[f"eviction_{policy}_requests_per_s"] = named.mean_value(own, "1/s", 0)
    found.update(_server_values(table[table["kind"] == "server"]))
    return found


def _shown_exponent(exponents: pd.Series) -> float:
    """Return the exponent that the table shows: 0.9, or the nearest one measured."""
    return min(exponents.unique(), key=lambda exponent: abs(exponent - 0.9))


def _server_values(rows: pd.DataFrame) -> dict[str, Value]:
    found = {"eviction_server": named.single_value(rows["server"])}
    paced = rows[rows["pace_s"] > 0]
    fast = rows[rows["pace_s"] == 0]
    for policy in SERVER_POLICIES:
        prefix = f"eviction_server_{policy.replace('-', '_')}"
        own = fast[fast["policy"] == policy]
        # Five is the server's own default; other sample counts stay in the table.
        own = own[own["samples"] == 5] if (own["samples"] == 5).any() else own
        found[f"{prefix}_hit"] = named.single_value(100 * own["hit_ratio"], "%", 1)
        found[f"{prefix}_exact_hit"] = named.single_value(100 * own["exact_hit_ratio"], "%", 1)
        found[f"{prefix}_items"] = named.single_value(own["items"], "", 0)
        found[f"{prefix}_bytes_per_item"] = named.single_value(own["bytes_per_item"], "B", 0)
        found[f"{prefix}_refused"] = named.single_value(own["refused_writes"], "", 0)
        found[f"{prefix}_replay_s"] = named.single_value(own["replay_s"], "s", 1)
    slow = paced[paced["policy"] == "allkeys-lru"].sort_values("pace_s", ascending=False)
    slow = slow[slow["samples"] == 5] if (slow["samples"] == 5).any() else slow
    for name, column, scale, unit, digits in (
        ("hit", "hit_ratio", 100, "%", 1),
        ("exact_hit", "exact_hit_ratio", 100, "%", 1),
        ("replay_s", "replay_s", 1, "s", 0),
    ):
        found[f"eviction_server_paced_lru_{name}"] = named.single_value(
            scale * slow[column], unit, digits
        )
    return found


STUDY = Study(
    name="eviction",
    question="Which entry should a full cache give up, and how far is each policy from the best?",
    options=OPTIONS,
    plan=plan,
    columns=COLUMNS,
    values=values,
)
