"""Arms that are compared in time take turns: in rounds, in an order drawn anew for each.

The speed of a machine wanders by more than what is looked for. Within a round every arm is measured
once, seconds apart, so the ratio of two arms in one round is free of that (Abedi and Brecht, 2017).
A fixed order would not do, because what disturbs a machine may come back regularly. Two things are
beyond this: other programs that take the processor during one turn, which is marked, and a
difference that the place of an arm makes, which a control shows (:func:`kvbench.studies.control_of`).
"""

from __future__ import annotations

import os
import resource
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from kvbench.measurement import noise
from kvbench.studies import control_of

#: Where a round may be taken again, one more for every so many stands in for a disturbed one.
SPARE = 2


def turns(
    arms: Iterable[str], rounds: int, seed: int, seldom: Mapping[str, int] | None = None
) -> Iterator[tuple[int, str]]:
    """Yield round and arm, every arm once a round; the order is a function of the seed.

    ``seldom`` names arms that take part in so many rounds only, evenly spread.
    """
    rng, names = np.random.default_rng([seed, 20]), list(arms)
    shares = {arm: min(count, rounds) for arm, count in (seldom or {}).items()}
    for number in range(rounds):
        for place in rng.permutation(len(names)):
            count = shares.get(names[place], rounds)
            if number * count // rounds != (number - 1) * count // rounds:
                yield number, names[place]


def with_controls(arms: Iterable[str], *references: str) -> dict[str, str]:
    """Return the arms, and a control of each of these references that is among them.

    Returns
    -------
    dict
        Name of an arm to the name of what it does: its own, or its reference's.
    """
    doing = {name: name for name in arms}
    return doing | {control_of(name): name for name in references if name in doing}


class Own:
    """The processes that work for a cell besides its own: what they use is no disturbance.

    Parameters
    ----------
    known:
        Ids of programs that the cell asks although it did not start them.
    """

    #: Switches of other processes are told by nobody, and used for no mark.
    involuntary = 0

    def __init__(self, known: Collection[int] = ()) -> None:
        self._known = frozenset(known)

    @property
    def cpu_s(self) -> float:
        """Processor seconds of all descendants, also of those that have ended, and of the known."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        running = noise.descendants(os.getpid()).union(
            self._known, *map(noise.descendants, self._known)
        )
        return ended.ru_utime + ended.ru_stime + noise.processor_s(running)


class Log:
    """The turns of a cell in the order in which they were taken.

    What a record keeps of them is one mapping per arm to lists of equal length: ``round``,
    ``slot`` (running position in the cell), ``disturbed`` and whatever was measured.

    Parameters
    ----------
    known:
        Ids of programs that the cell asks although it did not start them; None if one of them
        cannot be found: its time would look like another's, so that no turn is marked at all.
    """

    def __init__(self, known: Collection[int] | None = None) -> None:
        self._arms: dict[str, dict[str, list]] = {}
        self._marks: dict[str, list[dict[str, int]]] = {}
        self._slot = 0
        self._watch = None if known is None else noise.Watch([Own(known)])

    def turns(
        self,
        arms: Collection[str],
        rounds: int,
        seed: int,
        seldom: Mapping[str, int] | None = None,
        spare: int = 0,
    ) -> Iterator[tuple[int, str]]:
        """Yield what :func:`turns` does and watch meanwhile who else uses the processor.

        A turn has to be added before the next one begins. Up to ``spare`` rounds more stand in for
        those that were disturbed.
        """
        if self._watch:
            self._watch.begin()
        current = -1
        try:
            for number, arm in turns(arms, rounds + spare, seed, seldom):
                if number != current and number >= rounds and self._clean(arms) >= rounds:
                    return
                current = number
                yield number, arm
        finally:
            # Also when the caller breaks off: what comes until the next run of turns is nobody's.
            if self._watch:
                self._watch.close()

    def _clean(self, arms: Collection[str]) -> int:
        """Count the rounds in which nothing disturbed any of the arms."""
        if self._watch:
            self._watch.close()
        had = {number for arm in arms for number in self.of(arm, "round")}
        disturbed = {
            number
            for arm in arms
            for number, mark in zip(self.of(arm, "round"), self._marks.get(arm, ()), strict=False)
            if mark["disturbed"]
        }
        return len(had - disturbed)

    def add(self, arm: str, number: int, **measured: Any) -> None:
        """Write down a turn of an arm in round ``number``, as soon as it has ended."""
        held = self._arms.setdefault(arm, {})
        for name, value in {"round": number, "slot": self._slot, **measured}.items():
            held.setdefault(name, []).append(value)
        if self._watch:
            mark = {"slot": self._slot}
            self._marks.setdefault(arm, []).append(mark)
            self._watch.add(mark)
        self._slot += 1

    def of(self, arm: str, name: str) -> list:
        """Return what was measured of an arm, turn by turn; empty if it never had one."""
        return self._arms.get(arm, {}).get(name, [])

    def arms(self) -> dict[str, dict[str, list]]:
        """Return all turns, by arm."""
        if self._watch:
            self._watch.close()
        return {
            arm: held
            | (
                {"disturbed": [mark["disturbed"] for mark in self._marks[arm]]}
                if arm in self._marks
                else {}
            )
            for arm, held in self._arms.items()
        }
