"""One round of a block: every cell takes its turns, in an order drawn anew, with the others between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kvbench.measurement import noise
from kvbench.measurement.processes import Ended

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


class Watch:
    """Marks the slots during which other programs used the processor.

    The kernel counts in ticks, so short slots are judged together: a window goes on until it is
    :data:`kvbench.measurement.noise.SHORTEST_WINDOW_S` long, and its mark falls on every slot in it.

    Parameters
    ----------
    takers:
        All processes of the block; what they use is its own.
    """

    def __init__(self, takers: Sequence[Taker]) -> None:
        self._takers = takers
        self._pending: list[dict[str, Any]] = []
        self._window = self.first = self.read()

    def read(self) -> noise.Reading:
        """A reading to which parent and children are one program."""
        return noise.read(
            sum(taker.cpu_s for taker in self._takers),
            sum(taker.involuntary for taker in self._takers),
        )

    def begin(self) -> None:
        """Begin a window; what happened since the last one is nobody's."""
        self._window = self.read()

    def add(self, slot: dict[str, Any]) -> None:
        """Take in a slot that has just ended."""
        self._pending.append(slot)
        if time.perf_counter() - self._window.wall_s >= noise.SHORTEST_WINDOW_S:
            self.close()

    def close(self) -> None:
        """End the window and begin the next."""
        now = self.read()
        mark = noise.disturbed(self._window, now)
        for slot in self._pending:
            slot["disturbed"] = slot["disturbed"] or mark
        self._pending.clear()
        self._window = now


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
        ``e2e_s``, ``ttft_s``, ``itl_s`` and ``disturbed``.
    """
    slots: list[dict[str, Any]] = []
    left = list(order)

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
        for name in list(left):
            time.sleep(REST_S)
            sample = ask(name, turn, "turn", turn)
            if sample is not None:
                number = first_slot + len(slots)
                slots.append({"strategy": name, "turn": turn, "slot": number, **sample})
                watch.add(slots[-1])
    watch.close()
    return slots
