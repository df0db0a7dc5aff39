"""Arms that are compared in time take turns: in rounds, in an order drawn anew for each.

The speed of a machine wanders by more than what is looked for. Within a round every arm is measured
once, seconds apart, so the ratio of two arms in one round is free of that (Abedi and Brecht, 2017).
A fixed order would not do, because what disturbs a machine may come back regularly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def turns(arms: Sequence[str], rounds: int, seed: int) -> Iterator[tuple[int, str]]:
    """Yield round and arm, every arm once a round; the order is a function of the seed."""
    rng = np.random.default_rng([seed, 20])
    for number in range(rounds):
        for place in rng.permutation(len(arms)):
            yield number, arms[place]


class Log:
    """The turns of a cell in the order in which they were taken.

    What a record keeps of them is one mapping per arm to lists of equal length: ``round``,
    ``slot`` (running position in the cell) and whatever was measured.
    """

    def __init__(self) -> None:
        self._arms: dict[str, dict[str, list]] = {}
        self._slot = 0

    def add(self, arm: str, number: int, **measured: Any) -> None:
        """Write down a turn of an arm in round ``number``."""
        held = self._arms.setdefault(arm, {})
        for name, value in {"round": number, "slot": self._slot, **measured}.items():
            held.setdefault(name, []).append(value)
        self._slot += 1

    def of(self, arm: str, name: str) -> list:
        """Return what was measured of an arm, turn by turn; empty if it never had one."""
        return self._arms.get(arm, {}).get(name, [])

    def arms(self) -> dict[str, dict[str, list]]:
        """Return all turns, by arm."""
        return self._arms
