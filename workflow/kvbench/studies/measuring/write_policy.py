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
from kvbench.studies._estimates import quantile
from kvbench.studies.measuring._rounds import Log, with_controls

if TYPE_CHECKING:
    from kvbench.caching.server import Server
    from kvbench.caching.write_policies import WritePolicy


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run every policy over SQLite and the cache server, then crash it."""
    from kvbench.caching.server import running

    settings = {
        policy if flush is None else f"{policy}-{flush}": (policy, flush)
        for policy in factors["policies"]
        for flush in (factors["flush_every"] if policy == "write_back" else [None])
    }
    rows, samples = [], {}
    with running(context.server_url, context.scratch) as server:

        def shared(name: str) -> dict[str, Any]:
            policy, flush = settings[name]
            return {"policy": policy, "flush_every": flush, "write_share": factors["write_share"]}

        for external in factors["external_shares"]:
            log = Log(context.known)
            # Each has a store and a part of the cache server to itself, the control as well.
            steady = {
                arm: _Steady(_Run(factors, context, server, f"{arm}-{external:g}", *settings[name]))
                for arm, name in with_controls(settings, "write_through").items()
            }
            for name in steady:
                steady[name].begin(external)
            # A round is a stretch of the operations: every policy does it before the next one.
            for number, name in log.turns(list(steady), factors["rounds"], context.seed):
                log.add(name, number, **steady[name].go_on(number, factors["rounds"]))
            for name in steady:
                measured = steady[name].end()
                if name not in settings:
                    continue
                rows.append(
                    {"kind": "steady", **shared(name), "external_share": external, **measured}
                )
            samples[f"{external:g}"] = log.arms()
        for name, setting in settings.items():
            for repeat in range(factors["crashes"]):
                run = _Run(factors, context, server, f"{name}-crash{repeat}", *setting)
                rows.append(
                    {"kind": "crash", **shared(name), "repeat": repeat, **run.crash(repeat)}
                )
    return Outcome(rows, {"arms": samples})


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

    def open(self) -> WritePolicy:
        from kvbench.caching import write_policies

        store = write_policies.Store(self.path)
        cache = write_policies.ServerCache(self.server.client(), self.prefix)
        bounded = write_policies.BoundedCache(cache, self.factors["capacity"])
        return write_policies.build(self.policy, store, bounded, self.flush or 1)

    def fill(self) -> dict[str, int]:
        """Give every record version 0 and return the truth by key."""
        from kvbench.caching.server import delete_prefix
        from kvbench.caching.write_policies import Store

        delete_prefix(self.server.client(), self.prefix)
        store = Store(self.path)
        truth = {str(key): 0 for key in range(self.factors["keys"])}
        store.put_many(truth)
        store.close()
        return truth

    def operations(self, seed: int) -> tuple[list[str], list[bool]]:
        count = self.factors["operations"]
        keys = workload.zipf(count, self.factors["keys"], seed, 0.9)
        draws = np.random.default_rng([seed, 1]).random(count) < self.factors["write_share"]
        return [str(key) for key in keys], draws.tolist()

    def crash(self, repeat: int) -> dict[str, Any]:
        """Kill a process at a random operation, lose its cache, and see what the store kept.

        The process is a real one and ends by SIGKILL. Just before, it notes for the judge, outside
        store and cache, what it had acknowledged and which keys its policy held to be dirty.
        """
        from kvbench.caching.server import delete_prefix
        from kvbench.caching.write_policies import Store

        truth = self.fill()
        seed = self.seed + 101 * (repeat + 1)
        moment = int(np.random.default_rng([seed, 3]).integers(1, self.factors["operations"] + 1))
        note = self.path.with_suffix(".json")
        child = os.fork()
        if child == 0:
            try:
                policy = self.open()
                acknowledged = {}
                keys, writes = self.operations(seed)
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


class _Steady:
    """A whole run of one policy, with another program writing beside it, done in stretches."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._times: dict[str, list[float]] = {"read": [], "write": []}
        self._stale = self._version = 0

    def begin(self, external_share: float) -> None:
        """Fill the store, open the policy and draw the operations."""
        from kvbench.caching.write_policies import Store

        run = self._run
        self._truth = run.fill()
        self._policy = run.open()
        self._outsider = Store(run.path)
        keys, writes = run.operations(run.seed)
        rng = np.random.default_rng([run.seed, 2])
        intrusions = (rng.random(len(keys)) < external_share).tolist()
        targets = workload.zipf(len(keys), run.factors["keys"], run.seed + 1, 0.9)
        self._operations = list(zip(keys, writes, intrusions, targets, strict=True))

    def go_on(self, number: int, rounds: int) -> dict[str, list[float]]:
        """Do the operations of one round; return the seconds of its reads and its writes."""
        count = len(self._operations)
        taken: dict[str, list[float]] = {"read": [], "write": []}
        policy, truth = self._policy, self._truth
        for key, write, intrusion, target in self._operations[
            number * count // rounds : (number + 1) * count // rounds
        ]:
            self._version += 1
            started = time.perf_counter()
            if write:
                policy.write(key, self._version)
                taken["write"].append(time.perf_counter() - started)
                truth[key] = self._version
            else:
                value = policy.read(key)
                taken["read"].append(time.perf_counter() - started)
                self._stale += value is None or value < truth[key]
            if intrusion:
                self._version += 1
                self._outsider.put(str(target), self._version)
                truth[str(target)] = self._version
        for kind, seconds in taken.items():
            self._times[kind] += seconds
        return {f"{kind}_s": seconds for kind, seconds in taken.items()}

    def end(self) -> dict[str, Any]:
        """Flush, close, and return what the run was like."""
        from kvbench.caching.server import delete_prefix

        policy = self._policy
        policy.flush()
        stored = self._outsider.everything()
        measured = {
            "operations": len(self._operations),
            "read_hit_ratio": policy.hits / max(1, policy.reads),
            "stale_reads": self._stale,
            "stale_share": self._stale / max(1, policy.reads),
            "store_reads": policy.store.reads,
            "store_writes": policy.store.writes,
            "transactions": policy.store.transactions,
            "overwritten_keys": sum(stored[key] != value for key, value in self._truth.items()),
        }
        for kind, taken in self._times.items():
            median, low, high = quantile(taken, 0.5)
            measured |= {
                f"{kind}_p50_s": median,
                f"{kind}_p50_s_ci_low": low,
                f"{kind}_p50_s_ci_high": high,
                f"{kind}_p99_s": quantile(taken, 0.99)[0],
            }
        policy.store.close()
        self._outsider.close()
        delete_prefix(self._run.server.client(), self._run.prefix)
        return measured
