"""Where should a write go, and what is stale or lost for it?"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching import workload
from kvbench.studies import Context, Outcome

if TYPE_CHECKING:
    from kvbench.caching.server import Server
    from kvbench.caching.write_policies import WritePolicy


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run every policy over SQLite and the cache server, then crash it."""
    from kvbench.caching.server import running

    rows, samples = [], {}
    settings = [
        (policy, flush)
        for policy in factors["policies"]
        for flush in (factors["flush_every"] if policy == "write_back" else [None])
    ]
    with running(context.server_url, context.scratch) as server:
        for number, (policy, flush) in enumerate(settings):
            shared = {
                "policy": policy,
                "flush_every": flush,
                "write_share": factors["write_share"],
            }
            for external in factors["external_shares"]:
                run = _Run(factors, context, server, f"{number}-{external:g}", policy, flush)
                measured, times = run.steady(external)
                rows.append({"kind": "steady", **shared, "external_share": external, **measured})
                samples[f"{policy}-{flush}-{external:g}"] = times
            for repeat in range(factors["crashes"]):
                run = _Run(factors, context, server, f"{number}-crash{repeat}", policy, flush)
                crashed = run.crash(repeat)
                rows.append({"kind": "crash", **shared, "repeat": repeat, **crashed})
    return Outcome(rows, samples)


class _Run:
    """One stream of operations against one fresh store and one fresh part of the cache server."""

    def __init__(
        self,
        factors: Mapping[str, Any],
        context: Context,
        server: Server,
        name: str,
        policy: str,
        flush: int | None,
    ) -> None:
        self.factors = factors
        self.seed = context.seed
        self.server = server
        self.path = Path(context.scratch) / f"store-{name}.db"
        self.prefix = f"{server.namespace}{name}:"
        self.policy = policy
        self.flush = flush

    def _open(self) -> WritePolicy:
        from kvbench.caching import write_policies

        store = write_policies.Store(self.path)
        cache = write_policies.ServerCache(self.server.client(), self.prefix)
        bounded = write_policies.BoundedCache(cache, self.factors["capacity"])
        return write_policies.build(self.policy, store, bounded, self.flush or 1)

    def _fill(self) -> dict[str, int]:
        """Give every record version 0 and return the truth by key."""
        from kvbench.caching.server import delete_prefix
        from kvbench.caching.write_policies import Store

        delete_prefix(self.server.client(), self.prefix)
        store = Store(self.path)
        truth = {str(key): 0 for key in range(self.factors["keys"])}
        store.put_many(truth)
        store.close()
        return truth

    def _operations(self, seed: int) -> tuple[list[str], list[bool]]:
        count = self.factors["operations"]
        keys = workload.zipf(count, self.factors["keys"], seed, 0.9)
        draws = np.random.default_rng([seed, 1]).random(count) < self.factors["write_share"]
        return [str(key) for key in keys], draws.tolist()

    def steady(self, external_share: float) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """Do all operations, with another program writing beside them."""
        from kvbench.caching.server import delete_prefix
        from kvbench.caching.write_policies import Store

        truth = self._fill()
        policy = self._open()
        outsider = Store(self.path)
        keys, writes = self._operations(self.seed)
        rng = np.random.default_rng([self.seed, 2])
        intrusions = (rng.random(len(keys)) < external_share).tolist()
        targets = workload.zipf(len(keys), self.factors["keys"], self.seed + 1, 0.9)
        times: dict[str, list[float]] = {"read": [], "write": []}
        stale = version = 0
        for key, write, intrusion, target in zip(keys, writes, intrusions, targets, strict=True):
            version += 1
            started = time.perf_counter()
            if write:
                policy.write(key, version)
                times["write"].append(time.perf_counter() - started)
                truth[key] = version
            else:
                value = policy.read(key)
                times["read"].append(time.perf_counter() - started)
                stale += value is None or value < truth[key]
            if intrusion:
                version += 1
                outsider.put(str(target), version)
                truth[str(target)] = version
        policy.flush()
        stored = outsider.everything()
        measured = {
            "operations": len(keys),
            "read_hit_ratio": policy.hits / max(1, policy.reads),
            "stale_reads": stale,
            "stale_share": stale / max(1, policy.reads),
            "store_reads": policy.store.reads,
            "store_writes": policy.store.writes,
            "transactions": policy.store.transactions,
            "overwritten_keys": sum(stored[key] != value for key, value in truth.items()),
        }
        for kind, taken in times.items():
            for percent in (50, 99):
                measured[f"{kind}_p{percent}_us"] = (
                    1e6 * float(np.percentile(taken, percent)) if taken else None
                )
        policy.store.close()
        outsider.close()
        delete_prefix(self.server.client(), self.prefix)
        return measured, times

    def crash(self, repeat: int) -> dict[str, Any]:
        """Kill a process at a random operation, lose its cache, and see what the store kept.

        The process is a real one and ends by SIGKILL. Just before, it notes for the judge, outside
        store and cache, what it had acknowledged and which keys its policy held to be dirty.
        """
        from kvbench.caching.server import delete_prefix
        from kvbench.caching.write_policies import Store

        truth = self._fill()
        seed = self.seed + 101 * (repeat + 1)
        moment = int(np.random.default_rng([seed, 3]).integers(1, self.factors["operations"] + 1))
        note = self.path.with_suffix(".json")
        child = os.fork()
        if child == 0:
            try:
                policy = self._open()
                acknowledged = {}
                keys, writes = self._operations(seed)
                for version in range(1, moment + 1):
                    key = keys[version - 1]
                    if writes[version - 1]:
                        policy.write(key, version)
                        acknowledged[key] = version
                    else:
                        policy.read(key)
                note.write_text(json.dumps({"new": acknowledged, "dirty": sorted(policy.dirty)}))
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                # Reached only if something above failed: never run the parent's clean-up twice.
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise RuntimeError(f"the process to be killed ended by itself, status {status}")
        delete_prefix(self.server.client(), self.prefix)
        told = json.loads(note.read_text())
        truth |= told["new"]
        store = Store(self.path)
        stored = store.everything()
        store.close()
        lost = {key for key, value in truth.items() if stored.get(key) != value}
        return {
            "operations": moment,
            "written_keys": len(told["new"]),
            "dirty_keys": len(told["dirty"]),
            "lost_keys": len(lost),
            "lost_is_dirty": lost == set(told["dirty"]),
        }
