"""Which entry should a full cache give up, and how far is each policy from the best possible?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching import policies, workload
from kvbench.errors import Unsupported
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study, _estimates

if TYPE_CHECKING:
    import pandas as pd

#: Workloads of the simulation; ``loop`` is a tenth longer than a cache of ``capacity``.
WORKLOADS = ("zipf", "loop", "scan", "shift", "sessions")

#: The server's policies and the exact policy that each of them approximates. With equal
#: lifetimes ``volatile-ttl`` evicts in the order of arrival; ``noeviction`` keeps the first ones.
SERVER_POLICIES = {
    "allkeys-lru": "lru",
    "allkeys-lfu": "lfu",
    "allkeys-random": "random",
    "volatile-ttl": "fifo",
    "noeviction": "lifo",
}

#: Capacity, as a share of the distinct keys, that the paper's table shows.
SHOWN_SHARE = 0.1

OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "policies": {
            "type": "array",
            "items": {"enum": list(policies.POLICIES)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(policies.POLICIES),
            "description": "Eviction policies to simulate; opt (Belady) is always computed too.",
        },
        "workloads": {
            "type": "array",
            "items": {"enum": list(WORKLOADS)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(WORKLOADS),
            "description": "Request streams to simulate.",
        },
        "capacity_shares": {
            "type": "array",
            "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0.01, 0.05, 0.1, 0.5],
            "description": "Capacities as shares of the distinct keys of the stream.",
        },
        "exponents": {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 3},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0.9],
            "description": "Zipf exponents of the zipf workload; the first also of scan and shift.",
        },
        "keys": {
            "type": "integer",
            "minimum": 10,
            "maximum": 1_000_000,
            "default": 400,
            "description": "Distinct popular keys of a simulated stream.",
        },
        "requests": {
            "type": "integer",
            "minimum": 100,
            "maximum": 10_000_000,
            "default": 6_000,
            "description": "Requests of a simulated stream.",
        },
        "repeats": {
            "type": "integer",
            "minimum": 1,
            "maximum": 100,
            "default": 5,
            "description": "Streams per workload, each from its own seed.",
        },
        "speed_requests": {
            "type": "integer",
            "minimum": 1_000,
            "maximum": 10_000_000,
            "default": 20_000,
            "description": "Requests of one timed replay of a policy.",
        },
        "server_policies": {
            "type": "array",
            "items": {"enum": list(SERVER_POLICIES)},
            "uniqueItems": True,
            "default": list(SERVER_POLICIES),
            "description": "maxmemory policies of the real server; an empty list skips the server.",
        },
        "server_samples": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 64},
            "minItems": 1,
            "uniqueItems": True,
            "default": [5],
            "description": "Values of maxmemory-samples (keys compared at an eviction).",
        },
        "server_pace_s": {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 600},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0],
            "description": "Seconds over which a replay is spread by pauses; 0 is as fast as it "
            "goes. The server's recency clock ticks once a second, so only allkeys-lru is paced.",
        },
        "server_requests": {
            "type": "integer",
            "minimum": 300,
            "maximum": 10_000_000,
            "default": 12_000,
            "description": "Requests replayed against the server; the first third only warms it.",
        },
        "server_keys": {
            "type": "integer",
            "minimum": 100,
            "maximum": 1_000_000,
            "default": 5_000,
            "description": "Distinct keys of the server's stream (Zipf, exponent 0.8).",
        },
        "server_memory_kib": {
            "type": "integer",
            "minimum": 256,
            "maximum": 1_048_576,
            "default": 768,
            "description": "Memory for entries: maxmemory less what the empty server uses, KiB.",
        },
        "server_value_bytes": {
            "type": "integer",
            "minimum": 1,
            "maximum": 1_048_576,
            "default": 1_000,
            "description": "Size of a stored value, bytes.",
        },
    },
}

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
    "(Che for LRU; Fricker, Robert and Roberts for FIFO and random), independent requests only",
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
    """Return one cell per stream, one for speed, one for the anomaly and one per server setting."""
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
            "policies": options["policies"],
            "keys": options["keys"],
            "requests": options["speed_requests"],
        }
    )
    for policy in options["server_policies"]:
        for samples in options["server_samples"]:
            for pace in options["server_pace_s"] if policy == "allkeys-lru" else [0]:
                # The pauses make the replay's own clock part of the result: nothing beside it.
                cells[f"server-{policy}-{samples}-{pace:g}s"] = Cell(
                    {
                        "kind": "server",
                        "policy": policy,
                        "samples": samples,
                        "pace_s": pace,
                        "requests": options["server_requests"],
                        "keys": options["server_keys"],
                        "memory_kib": options["server_memory_kib"],
                        "value_bytes": options["server_value_bytes"],
                    }
                )
    return cells


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run one cell; see :func:`plan` for the kinds."""
    kinds = {
        "anomaly": _anomaly,
        "simulated": _simulated,
        "speed": _speed,
        "server": _server,
    }
    return kinds[factors["kind"]](factors, context)


def _anomaly(factors: Mapping[str, Any], context: Context) -> Outcome:
    stream = policies.BELADY_ANOMALY
    rows = []
    for name in ("fifo", "lru", "opt"):
        for frames in (3, 4):
            tally = policies.simulate(policies.build(name, frames, future=stream), stream)
            rows.append(
                {
                    "kind": "anomaly",
                    "workload": "belady",
                    "policy": name,
                    "capacity": frames,
                    "requests": tally.requests,
                    "misses": tally.requests - tally.hits,
                    "hit_ratio": tally.hit_ratio,
                }
            )
    return Outcome(rows)


def _stream(factors: Mapping[str, Any], seed: int) -> list[int]:
    kind, requests, keys = factors["workload"], factors["requests"], factors["keys"]
    if kind == "loop":
        return workload.loop(requests, keys, seed).tolist()
    stream = workload.STREAMS[kind](requests, keys, seed, exponent=factors["exponent"])
    return stream.tolist()


def _simulated(factors: Mapping[str, Any], context: Context) -> Outcome:
    rows = []
    names = list(dict.fromkeys(["fifo", "opt", *factors["policies"]]))
    for repeat in range(factors["repeats"]):
        seed = context.seed + repeat
        stream = _stream(factors, seed)
        half = len(stream) // 2
        distinct = len(set(stream))
        # Sizes of answers: log-normal, median 4 KiB, drawn apart from the popularity.
        draw = np.random.default_rng([seed, 1])
        sizes = np.ceil(draw.lognormal(np.log(4096), 1.0, max(stream) + 1)).astype(int).tolist()
        volume = sum(sizes[key] for key in set(stream))
        for share in factors["capacity_shares"]:
            capacity = max(1, round(share * distinct))
            tallies, warm = {}, {}
            for name in names:
                policy = policies.build(name, capacity, future=stream, seed=seed)
                first = policies.simulate(policy, stream[:half])
                second = policies.simulate(policy, stream[half:])
                tallies[name] = (first.hits + second.hits) / len(stream)
                warm[name] = second.hit_ratio
            gap = tallies["opt"] - tallies["fifo"]
            for name in factors["policies"]:
                room = max(1, round(share * volume))
                sized = policies.build(name, room, future=stream, seed=seed, items=capacity)
                rows.append(
                    {
                        "kind": "simulated",
                        "workload": factors["workload"],
                        "exponent": factors["exponent"],
                        "policy": name,
                        "capacity_share": share,
                        "capacity": capacity,
                        "repeat": repeat,
                        "requests": len(stream),
                        "misses": round((1 - tallies[name]) * len(stream)),
                        "hit_ratio": tallies[name],
                        "warm_hit_ratio": warm[name],
                        "byte_hit_ratio": policies.simulate(sized, stream, sizes).byte_hit_ratio,
                        "opt_hit_ratio": tallies["opt"],
                        "gap_closed": (tallies[name] - tallies["fifo"]) / gap if gap > 0 else None,
                        "predicted_hit_ratio": _predicted(factors, name, capacity),
                    }
                )
    return Outcome(rows)


def _predicted(factors: Mapping[str, Any], policy: str, capacity: int) -> float | None:
    theory = {
        "lru": policies.che_lru_hit_ratio,
        "fifo": policies.che_fifo_hit_ratio,
        "random": policies.che_fifo_hit_ratio,
    }.get(policy)
    if factors["workload"] != "zipf" or theory is None:
        return None
    return theory(workload.popularity(factors["keys"], factors["exponent"]), capacity)


def _speed(factors: Mapping[str, Any], context: Context) -> Outcome:
    stream = workload.zipf(factors["requests"], factors["keys"], context.seed).tolist()
    capacity = max(1, round(SHOWN_SHARE * factors["keys"]))
    seconds: dict[str, list[float]] = {name: [] for name in factors["policies"]}
    # Policies take turns, so that a slow spell of the machine does not fall on one of them.
    for _ in range(5):
        for name, taken in seconds.items():
            policy = policies.build(name, capacity, future=stream)
            taken.append(policies.simulate(policy, stream).seconds)
    rows = [
        {
            "kind": "speed",
            "workload": "zipf",
            "exponent": 0.9,
            "policy": name,
            "capacity_share": SHOWN_SHARE,
            "capacity": capacity,
            "repeat": repeat,
            "requests": len(stream),
            "requests_per_s": len(stream) / taken,
        }
        for name, times in seconds.items()
        for repeat, taken in enumerate(times)
    ]
    return Outcome(rows, {"seconds": seconds})


def _server(factors: Mapping[str, Any], context: Context) -> Outcome:
    import redis

    from kvbench.caching.server import running

    stream = workload.zipf(factors["requests"], factors["keys"], context.seed, 0.8).tolist()
    warm = len(stream) // 3
    value = b"x" * factors["value_bytes"]
    life_s = 3600 if factors["policy"] == "volatile-ttl" else None
    hits = refused = 0
    counts: list[int] = []
    with running(context.server_url, context.scratch) as server:
        if not server.private:
            raise Unsupported(
                "eviction sets maxmemory and fills the server, so it needs a private one: "
                "remove app.server_url and REDIS_URL"
            )
        client = server.client()
        client.ping()
        empty = client.info("memory")["used_memory"]
        client.config_set("maxmemory-policy", factors["policy"])
        client.config_set("maxmemory-samples", factors["samples"])
        client.config_set("maxmemory", empty + factors["memory_kib"] * 1024)
        started = time.perf_counter()
        for position, key in enumerate(stream):
            if position == warm:
                refused = 0
            name = b"%d" % key
            if client.get(name) is not None:
                hits += position >= warm
            else:
                try:
                    client.set(name, value, ex=life_s)
                except redis.exceptions.OutOfMemoryError:
                    refused += 1
            if position % 200 == 0:
                if position >= warm:
                    counts.append(client.dbsize())
                due = factors["pace_s"] * position / len(stream)
                time.sleep(max(0.0, due - (time.perf_counter() - started)))
        replay_s = time.perf_counter() - started
        used = client.info("memory")["used_memory"] - empty
        items = client.dbsize()
        version = f"{server.kind}, {server.version}"
    measured = max(1, round(float(np.mean(counts))))
    exact = policies.build(SERVER_POLICIES[factors["policy"]], measured, seed=context.seed)
    policies.simulate(exact, stream[:warm])
    rest = stream[warm:]
    return Outcome(
        [
            {
                "kind": "server",
                "workload": "zipf",
                "exponent": 0.8,
                "policy": factors["policy"],
                "capacity": measured,
                "capacity_share": measured / factors["keys"],
                "requests": len(rest),
                "misses": len(rest) - hits,
                "hit_ratio": hits / len(rest),
                "samples": factors["samples"],
                "pace_s": factors["pace_s"],
                "replay_s": replay_s,
                "items": float(np.mean(counts)),
                "bytes_per_item": used / max(1, items),
                "refused_writes": refused,
                "exact_hit_ratio": policies.simulate(exact, rest).hit_ratio,
                "server": version,
            }
        ],
        {"items": counts},
    )


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
            found[f"{prefix}_hit"] = _estimates.share_value(own["hit_ratio"])
            found[f"{prefix}_byte_hit"] = _estimates.share_value(own["byte_hit_ratio"])
            found[f"{prefix}_gap_closed"] = _estimates.mean_value(100 * own["gap_closed"], "%", 0)
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
        found[f"eviction_anomaly_misses_{frames}"] = _estimates.single_value(
            own["misses"].astype(int), digits=0
        )
    speed = table[table["kind"] == "speed"]
    for policy in policies.POLICIES:
        own = speed.loc[speed["policy"] == policy, "requests_per_s"]
        found[f"eviction_{policy}_requests_per_s"] = _estimates.mean_value(own, "1/s", 0)
    found.update(_server_values(table[table["kind"] == "server"]))
    return found


def _shown_exponent(exponents: pd.Series) -> float:
    """Return the exponent that the table shows: 0.9, or the nearest one measured."""
    return min(exponents.unique(), key=lambda exponent: abs(exponent - 0.9))


def _server_values(rows: pd.DataFrame) -> dict[str, Value]:
    found = {"eviction_server": _estimates.single_value(rows["server"])}
    paced = rows[rows["pace_s"] > 0]
    fast = rows[rows["pace_s"] == 0]
    for policy in SERVER_POLICIES:
        prefix = f"eviction_server_{policy.replace('-', '_')}"
        own = fast[fast["policy"] == policy]
        # Five is the server's own default; other sample counts stay in the table.
        own = own[own["samples"] == 5] if (own["samples"] == 5).any() else own
        found[f"{prefix}_hit"] = _estimates.single_value(100 * own["hit_ratio"], "%", 1)
        found[f"{prefix}_exact_hit"] = _estimates.single_value(100 * own["exact_hit_ratio"], "%", 1)
        found[f"{prefix}_items"] = _estimates.single_value(own["items"], "", 0)
        found[f"{prefix}_bytes_per_item"] = _estimates.single_value(own["bytes_per_item"], "B", 0)
        found[f"{prefix}_refused"] = _estimates.single_value(own["refused_writes"], "", 0)
        found[f"{prefix}_replay_s"] = _estimates.single_value(own["replay_s"], "s", 1)
    slow = paced[paced["policy"] == "allkeys-lru"].sort_values("pace_s", ascending=False)
    slow = slow[slow["samples"] == 5] if (slow["samples"] == 5).any() else slow
    for name, column, scale, unit, digits in (
        ("hit", "hit_ratio", 100, "%", 1),
        ("exact_hit", "exact_hit_ratio", 100, "%", 1),
        ("replay_s", "replay_s", 1, "s", 0),
    ):
        found[f"eviction_server_paced_lru_{name}"] = _estimates.single_value(
            scale * slow[column], unit, digits
        )
    return found


STUDY = Study(
    name="eviction",
    question="Which entry should a full cache give up, and how far is each policy from the best?",
    options=OPTIONS,
    plan=plan,
    measure=measure,
    columns=COLUMNS,
    values=values,
)
