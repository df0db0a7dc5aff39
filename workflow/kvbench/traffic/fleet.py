"""Routing to replicas on a replayed log: cache-aware against random, hit ratio against replicas."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

from kvbench.traffic.prefix import Blocks

REPLICAS = (1, 2, 4, 8, 16, 32, 64)
ROUTINGS = ("random", "cache_aware")
#: A replica that has this much more work than the mean is passed over, however well it fits.
OVERLOAD = 1.25
#: Requests that are routed; routing to 64 replicas looks into each of them.
MOST_REQUESTS = 50_000


class _Fleet:
    """LRU prefix caches of equal machines, and who holds which block (a bit a machine)."""

    def __init__(self, replicas: int, capacity: int, size: int) -> None:
        self._capacity = capacity
        self._size = size
        self._held: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
        self._holders: dict[int, int] = {}
        self.loads = [0] * replicas

    def fitting(self, blocks: list[int]) -> list[int]:
        """The machines with the longest leading run; all of them where none has the first block."""
        everyone = (1 << len(self._held)) - 1
        best = everyone
        for block in blocks:
            holders = self._holders.get(block, 0) & best
            if not holders:
                break
            best = holders
        return [number for number in range(len(self._held)) if best >> number & 1]

    def serve(self, machine: int, blocks: list[int], cut: int, tokens: int) -> int:
        """Serve a request on one machine; return its reused tokens.

        ``cut`` is its length in the unit of the blocks, ``tokens`` the one that the log states.
        """
        held, bit = self._held[machine], 1 << machine
        run = 0
        for block in blocks:
            if block not in held:
                break
            run += 1
        reused = min(run * self._size, cut) * tokens // max(cut, 1)
        for block in blocks:
            if block in held:
                held.move_to_end(block)
                continue
            held[block] = None
            self._holders[block] = self._holders.get(block, 0) | bit
            if len(held) > self._capacity:
                self._drop(held.popitem(last=False)[0], bit)
        self.loads[machine] += tokens - reused
        return reused

    def _drop(self, block: int, bit: int) -> None:
        left = self._holders[block] & ~bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]


def route(
    asked: Blocks, replicas: int, capacity: int, routing: str, seed: int = 2025
) -> dict[str, Any]:
    """Replay a log on ``replicas`` machines that each hold ``capacity`` blocks.

    ``random`` draws a replica for each request. ``cache_aware`` takes the one with the longest
    leading run, among equals the least loaded, unless it has done :data:`OVERLOAD` times the mean
    work; then the least loaded one. Work is the tokens that had to be computed.

    Returns
    -------
    ``token_share`` (reused per input token) and ``imbalance`` (most work of a replica over the
    mean; 1 is even).
    """
    fleet = _Fleet(replicas, max(1, capacity), asked.tokens)
    loads, everyone = fleet.loads, range(replicas)
    draw = random.Random(seed)
    edges, cut = asked.offsets.tolist(), asked.cut_tokens.tolist()
    tokens = asked.input_tokens.tolist()
    reused = work = 0
    for number in range(asked.requests):
        blocks = asked.ids[edges[number] : edges[number + 1]].tolist()
        length = tokens[number]
        if routing == "random":
            machine = draw.randrange(replicas)
        else:
            machine = min(fleet.fitting(blocks), key=loads.__getitem__)
            if loads[machine] > OVERLOAD * (work / replicas) + length:
                machine = min(everyone, key=loads.__getitem__)
        found = fleet.serve(machine, blocks, cut[number], length)
        reused += found
        work += length - found
    total = sum(tokens)
    mean = work / replicas
    return {
        "token_share": reused / total if total else 0.0,
        "imbalance": max(loads) / mean if mean else 1.0,
    }


def sweep(asked: Blocks, capacity: int) -> list[dict[str, Any]]:
    """Both routings at every number of replicas; rows of ``replicas``, ``routing`` and its result."""
    head = asked.head(MOST_REQUESTS)
    return [
        {
            "replicas": replicas,
            "routing": routing,
            "requests": head.requests,
            **route(head, replicas, capacity, routing),
        }
        for replicas in REPLICAS
        for routing in ROUTINGS
    ]
