"""One round of a block: every cell takes its turns, in an order drawn anew, with the others between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kvbench.measurement.noise import Watch
from kvbench.measurement.processes import RESTING, Ended

#: Idle time before every slot: what the last cell's threads spin away while they wait for more work.
REST_S = 0.005
#: Bytes that the probe goes through, more than a core's own caches hold, and how often it does.
_PROBE_BYTES, _PROBE_PASSES = 32 * 2**20, 2


class Taker(Protocol):
    """Whoever takes turns: :class:`kvbench.measurement.processes.Worker`, or a stand-in for one."""

    cpu_s: float
    involuntary: int

    def ask(self, command: str, *arguments: Any) -> Any:
        """Have a method of :class:`kvbench.measurement.cell.Cell` called."""


class Probe:
    """A tiny fixed computation, timed in every round: how fast the machine is just then.

    It adds up an array that does not fit into a core's caches, so that both a slower clock and a
    busier memory show. It is NumPy on one core: a parallel region of OpenMP in the parent would not
    survive the next fork, and a cell's process would have to be disturbed for it.
    """

    def __init__(self) -> None:
        self._numbers = np.ones(_PROBE_BYTES // 4, dtype=np.float32)
        self.seconds()

    def seconds(self) -> float:
        """Seconds that the computation takes now."""
        begin = time.perf_counter()
        for _ in range(_PROBE_PASSES):
            self._numbers.sum()
        return time.perf_counter() - begin


def drawn(members: Sequence[str], *seed: Any) -> list[str]:
    """Draw the order of one round; the same seed gives the same order."""
    return random.Random("/".join(map(str, seed))).sample(sorted(members), len(members))


def play(
    takers: Mapping[str, Taker],
    order: Sequence[str],
    turns: int,
    watch: Watch,
    first_slot: int = 0,
    lost: Callable[[str, Ended, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Play one round: turn 1 of every cell in the given order, then turn 2, and so on.

    A cell that rests within its turn goes on when the others have had their slice.

    Parameters
    ----------
    takers:
        Cell to whoever takes its turns.
    order:
        The cells that take part, in the order drawn for this round.
    turns:
        Turns of the conversation.
    watch:
        Marks what was disturbed.
    first_slot:
        Number of the first slot.
    lost:
        Told of a cell that ended, with the turn, counted from 0. Without it the error goes on.

    Returns
    -------
    list
        One entry per slot in the order they were taken: ``strategy``, ``turn`` (from 0), ``slot``,
        ``e2e_s``, ``ttft_s``, ``itl_s`` and ``disturbed``; ``slices`` where there was more than one.
    """
    left = list(order)
    taken: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
    number = first_slot

    def ask(name: str, turn: int, command: str, argument: int) -> Any:
        try:
            return takers[name].ask(command, argument)
        except Ended as ended:
            if lost is None:
                raise
            left.remove(name)
            lost(name, ended, turn)
            return None

    for name in order:
        ask(name, 0, "begin", len(takers))
    watch.begin()
    for turn in range(turns):
        begun: dict[str, dict[str, Any]] = {}
        waiting = list(left)
        while waiting:
            for name in waiting:
                time.sleep(REST_S)
                answer = ask(name, turn, "go_on" if name in begun else "turn", turn)
                if answer is None:
                    continue
                if name not in begun:
                    begun[name] = {"strategy": name, "turn": turn, "slot": number, "slices": 0}
                    number += 1
                slot = begun[name]
                slot["slices"] += 1
                watch.add(slot)
                if answer is not RESTING:
                    taken.append((slot, answer))
            ended = {slot["strategy"] for slot, _ in taken if slot["turn"] == turn}
            waiting = [name for name in left if name not in ended]
    watch.close()
    slots = []
    for slot, sample in sorted(taken, key=lambda pair: pair[0]["slot"]):
        if slot["slices"] == 1:
            del slot["slices"]
        slots.append({**slot, **sample, "disturbed": slot["disturbed"] or sample["disturbed"]})
    return slots
