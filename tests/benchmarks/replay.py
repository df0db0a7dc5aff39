"""How fast request logs are replayed, and what memory a million requests take.

    PYTHONPATH=workflow python tests/benchmarks/replay.py [requests]

Prints requests per second of each policy on the exact and on the prefix cache (the target is
50,000 on one core), and the peak memory and processor seconds of reading and replaying a log in a
fresh process: half a million requests, so that `make bench` stays short. The target is 1 GiB for a
million: pass 1000000, and wait some minutes. The log is made up: conversations that grow by a block a
turn.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

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


def speeds(path: Path) -> None:
    """Requests per second of every policy at a tenth of what the log asks for."""
    from kvbench.caching import policies
    from kvbench.traffic import log as logs
    from kvbench.traffic import prefix, simulators

    started = time.perf_counter()
    log = logs.read([path])
    rate = log.requests / (time.perf_counter() - started)
    print(f"reading                {rate:>12,.0f} requests/s")
    size = max(1, (int(log.keys.max()) + 1) // 10)
    with simulators.Stream(log.keys) as stream:
        stream.hits("lru", size)
        for name in policies.POLICIES:
            started = time.perf_counter()
            stream.hits(name, size)
            rate = log.requests / (time.perf_counter() - started)
            by = "libcachesim" if simulators.native(name, size) else "ours"
            print(f"exact   {name:<14} {rate:>12,.0f} requests/s  ({by})")
    asked = prefix.blocks(log)
    size = max(1, prefix.distinct(asked) // 10)
    each = len(asked.ids) / asked.requests
    for name in prefix.POLICIES:
        started = time.perf_counter()
        prefix.replay(asked, name, size)
        rate = log.requests / (time.perf_counter() - started)
        by = "libcachesim" if simulators.native(name, size) else "ours"
        print(f"prefix  {name:<14} {rate:>12,.0f} requests/s  ({by}, {each:.1f} blocks a request)")


def whole(path: Path) -> None:
    """Read and replay a log as the command does, and print the peak memory of this process."""
    from kvbench.analysis import capacity
    from kvbench.traffic import log as logs
    from kvbench.traffic import replay

    started = time.perf_counter()
    log = logs.read([path])
    read = time.perf_counter() - started
    setting = replay.Setting(
        "log", "llama-3.2-1b", capacity.architecture("llama-3.2-1b"), 80 * 2**30
    )
    replay.run(log, setting, None)
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = used.ru_maxrss / 1024
    print(
        f"{log.requests:,} requests, {len(log.blocks):,} blocks: read in {read:.0f} s, all in "
        f"{seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of processor), peak {peak:,.0f} MiB"
    )


def main() -> None:
    """Run both parts; the second in a process of its own, so that its peak is its own."""
    if sys.argv[1:2] == ["--whole"]:
        whole(Path(sys.argv[2]))
        return
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 500_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        write_log(path, min(requests, 100_000))
        speeds(path)
        write_log(path, requests)
        subprocess.run(
            [sys.executable, __file__, "--whole", str(path)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


if __name__ == "__main__":
    main()
