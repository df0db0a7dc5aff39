"""How fast request logs are replayed, and what memory a million requests take.

    PYTHONPATH=workflow python tests/benchmarks/replay.py [requests] [--runs 3]

Prints requests per second of each policy on the exact and on the prefix cache, the median of some runs
(50,000 on one core are asked for, of the slowest policy as well), and the peak memory and processor
seconds of reading, replaying and advising in a fresh process: half a million requests, so that `make bench`
stays short. What is asked for is 1 GiB for a million: pass 1000000, and wait some minutes. The log is
made up: conversations that grow by a block a turn. It has one thread for OpenMP.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bounds
import numpy as np

#: What is asked for: requests a second of every policy, and MiB for so many requests.
ASKED_PER_S, ASKED_MIB, ASKED_REQUESTS = 50_000, 1024, 1_000_000
#: Requests of the log that is replayed policy by policy.
EACH = 100_000

_BLOCK = 512
_TURNS = 5


def write_log(path: Path, requests: int, seed: int = 1) -> None:
    """Mooncake lines: conversations of up to five turns, a shared first block, a tenth repeated."""
    rng = np.random.default_rng(seed)
    turns: dict[int, list[int]] = {}
    fresh, last = 1, ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(requests):
            if last and rng.random() < 0.1:
                row = json.loads(last)
            else:
                who = int(rng.integers(0, 2000))
                ids = turns.setdefault(who, [0])
                ids.append(fresh)
                fresh += 1
                row = {"input_length": len(ids) * _BLOCK, "output_length": 50, "hash_ids": ids[:]}
                if len(ids) > _TURNS:
                    del turns[who]
            row = {"timestamp": number, **{k: v for k, v in row.items() if k != "timestamp"}}
            last = json.dumps(row)
            file.write(last + "\n")


def per_second(requests: int, runs: int, play: Callable[[], object]) -> float:
    """Requests a second, the median of some runs."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        play()
        seconds.append(time.perf_counter() - started)
    return requests / statistics.median(seconds)


def speeds(path: Path, runs: int) -> None:
    """Requests per second of every policy at a tenth of what the log asks for, and the verdict."""
    from kvbench.caching import policies
    from kvbench.traffic import log as logs
    from kvbench.traffic import prefix, simulators

    started = time.perf_counter()
    log = logs.read([path])
    rate = log.requests / (time.perf_counter() - started)
    print(f"reading                {rate:>12,.0f} requests/s")
    rates: dict[str, float] = {}
    size = max(1, (int(log.keys.max()) + 1) // 10)
    with simulators.Stream(log.keys) as stream:
        stream.hits("lru", size)
        for name in policies.POLICIES:
            rate = per_second(log.requests, runs, partial(stream.hits, name, size))
            rates[f"exact {name}"] = rate
            by = "libcachesim" if simulators.native(name, size) else "ours"
            print(f"exact   {name:<14} {rate:>12,.0f} requests/s  ({by})")
    asked = prefix.blocks(log)
    size = max(1, prefix.distinct(asked) // 10)
    each = len(asked.ids) / asked.requests
    for name in prefix.POLICIES:
        rate = per_second(log.requests, runs, partial(prefix.replay, asked, name, size))
        rates[f"prefix {name}"] = rate
        by = "libcachesim" if simulators.native(name, size) else "ours"
        print(f"prefix  {name:<14} {rate:>12,.0f} requests/s  ({by}, {each:.1f} blocks a request)")
    slowest = min(rates, key=lambda name: rates[name])
    print(
        bounds.line(
            bounds.judge(rates[slowest], rates[slowest], least=ASKED_PER_S),
            f"at least {ASKED_PER_S:,} requests/s of every policy",
            f"{rates[slowest]:,.0f} of the slowest, {slowest} (median of {runs}, no interval)",
        )
    )


def whole(path: Path) -> None:
    """Read, replay and advise as the command does; print this process's peak memory, and the verdict."""
    from kvbench.analysis import capacity
    from kvbench.traffic import advise, replay, tables
    from kvbench.traffic import log as logs

    started = time.perf_counter()
    log = logs.read([path])
    read = time.perf_counter() - started
    setting = replay.Setting(
        "log", "llama-3.2-1b", capacity.architecture("llama-3.2-1b"), 80 * 2**30
    )
    record = replay.run(log, setting, None)
    folder = path.parent / "advice"
    tables.write(folder, [record])
    advise.draw(folder / "figures", record, "en")
    advise.write_advice(folder, record, "en")
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    # macOS counts bytes, others KiB: getrusage(2).
    peak = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    print(
        f"{log.requests:,} requests, {len(log.blocks):,} blocks: read in {read:.0f} s, all in "
        f"{seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of processor), peak {peak:,.0f} MiB"
    )
    verdict, told = bounds.judge(peak, peak, most=ASKED_MIB), f"{peak:,.0f} MiB"
    if log.requests < ASKED_REQUESTS:
        told += f" of {log.requests:,}; pass {ASKED_REQUESTS} to see"
        if verdict == bounds.MET:
            verdict = bounds.CANNOT_TELL
    print(bounds.line(verdict, f"at most {ASKED_MIB:,} MiB for {ASKED_REQUESTS:,} requests", told))


def main() -> None:
    """Run both parts, each in a process of its own, so that the peak is that of the second alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("requests", type=int, nargs="?", default=500_000)
    parser.add_argument("--runs", type=int, default=3, help="of each policy")
    parser.add_argument("--speeds", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.requests < 1 or given.runs < 1:
        parser.error("requests and --runs have to be at least 1")
    if given.speeds:
        speeds(given.speeds, given.runs)
        return
    if given.whole:
        whole(given.whole)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        parts = {"--speeds": min(given.requests, EACH), "--whole": given.requests}
        for part, requests in parts.items():
            write_log(path, requests)
            subprocess.run(
                [sys.executable, __file__, part, str(path), "--runs", str(given.runs)],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )


if __name__ == "__main__":
    main()
