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


class _Replica:
    """An LRU prefix cache of one machine, and the tokens it had to compute."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[int, None] = OrderedDict()
        self.load = 0

    def run(self, blocks: list[int]) -> int:
        """Length of the leading run that is held; changes nothing."""
        held = self._held
        for place, block in enumerate(blocks):
            if block not in held:
                return place
        return len(blocks)

    def serve(self, blocks: list[int], tokens: int, size: int) -> int:
        """Serve a request; return its reused tokens."""
        reused = min(self.run(blocks) * size, tokens)
        held = self._held
        for block in blocks:
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = None
                if len(held) > self._capacity:
                    held.popitem(last=False)
        self.load += tokens - reused
        return reused


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
    machines = [_Replica(max(1, capacity)) for _ in range(replicas)]
    draw = random.Random(seed)
    edges, tokens = asked.offsets.tolist(), asked.cut_tokens.tolist()
    reused = work = 0
    for number in range(asked.requests):
        blocks = asked.ids[edges[number] : edges[number + 1]].tolist()
        length = tokens[number]
        if routing == "random":
            machine = machines[draw.randrange(replicas)]
        else:
            # Among machines that fit equally well, and before any has worked, chance decides.
            machine = max(machines, key=lambda one: (one.run(blocks), -one.load, draw.random()))
            if machine.load > OVERLOAD * (work / replicas) + length:
                machine = min(machines, key=lambda one: one.load)
        found = machine.serve(blocks, length, asked.tokens)
        reused += found
        work += length - found
    total = sum(tokens)
    mean = work / replicas
    return {
        "token_share": reused / total if total else 0.0,
        "imbalance": max(one.load for one in machines) / mean if mean else 1.0,
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
