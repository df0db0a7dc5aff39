"""Which entry should a full cache give up, and how far is each policy from the best possible?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvbench.caching import policies, workload
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome
from kvbench.studies.measuring._rounds import Log

#: The server's policies and the exact policy that each of them approximates. With equal
#: lifetimes ``volatile-ttl`` evicts in the order of arrival; ``noeviction`` keeps the first ones.
EXACT = {
    "allkeys-lru": "lru",
    "allkeys-lfu": "lfu",
    "allkeys-random": "random",
    "volatile-ttl": "fifo",
    "noeviction": "lifo",
}


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run one cell; see :func:`plan` for the kinds."""
    kinds = {
        "anomaly": _anomaly,
        "simulated": _simulated,
        "speed": _speed,
        "server": _servers,
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
    capacity = max(1, round(factors["capacity_share"] * factors["keys"]))
    log = Log(context.known)
    for number, name in log.turns(factors["policies"], factors["rounds"], context.seed):
        policy = policies.build(name, capacity, future=stream)
        log.add(name, number, seconds=policies.simulate(policy, stream).seconds)
    rows = [
        {
            "kind": "speed",
            "workload": "zipf",
            "exponent": 0.9,
            "policy": name,
            "capacity_share": factors["capacity_share"],
            "capacity": capacity,
            "repeat": number,
            "requests": len(stream),
            "requests_per_s": len(stream) / taken,
        }
        for name in factors["policies"]
        for number, taken in enumerate(log.of(name, "seconds"))
    ]
    return Outcome(rows, {"arms": log.arms()})


def _servers(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Replay one stream under every policy, each on a server of its own that starts empty."""
    rows, samples = [], {}
    for policy in factors["policies"]:
        rows_of_it, samples[policy] = _server(factors | {"policy": policy}, context)
        rows += rows_of_it
    return Outcome(rows, {"items": samples})


def _server(factors: Mapping[str, Any], context: Context) -> tuple[list[dict[str, Any]], list[int]]:
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
    exact = policies.build(EXACT[factors["policy"]], measured, seed=context.seed)
    policies.simulate(exact, stream[:warm])
    rest = stream[warm:]
    return (
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
        counts,
    )
