"""Which processors the threads of a cell's process run on: the same for every cell of a block.

The processors of a virtual machine are not equally fast all the time: what a neighbour does to the
host's core under one of them does not show under the other. The kernel leaves a thread where it ran
last, so the main thread of one cell may stay on the slower processor for a minute while those of the
others stay on the faster one. Turns of equal cells then differ by a tenth, round after round, and no
order of the rounds averages that out (``tests/benchmarks/placement.py`` shows it). So all main threads
share one processor, and all helping threads share the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def processors() -> list[int]:
    """The processors that this process may run on, in order; empty where the system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else []


class Places:
    """Binds the calling process's main thread to the first processor, and its other threads to the rest.

    A thread begins on the processors of the one that started it: a helping thread that came after the
    binding would share the main thread's. So this is called when the threads that work exist; and where
    :meth:`check` finds that another one has come, nothing is bound any more.

    Parameters
    ----------
    threads:
        Threads that work at once; where they are more than there are processors, none is bound.
    allowed:
        Processors to share out; by default those that the process may run on.

    Attributes
    ----------
    main:
        The main thread's processor; None where nothing is bound.
    """

    def __init__(self, threads: int, allowed: list[int] | None = None) -> None:
        self._allowed = processors() if allowed is None else allowed
        self._known = _threads()
        self.main: int | None = None
        if len(self._allowed) < max(2, threads) or len(self._known) < threads:
            return
        # Linux numbers the main thread like its process. Python's own `native_id` of it is, in a process
        # that was forked, still its parent's.
        main = os.getpid()
        try:
            _bind([main], self._allowed[:1])
            _bind(self._known - {main}, self._allowed[1:])
        except OSError:
            self._undo()
        else:
            self.main = self._allowed[0]

    def check(self) -> None:
        """Undo the binding if a thread has come that was not there when it was made."""
        if self.main is not None and not _threads() <= self._known:
            self._undo()

    def _undo(self) -> None:
        self.main = None
        with suppress(OSError):
            _bind(_threads(), self._allowed)


def _threads() -> set[int]:
    """The threads of this process by their numbers; empty off Linux."""
    with suppress(OSError):
        return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}
    return set()


def _bind(threads: Iterable[int], to: list[int]) -> None:
    for thread in threads:
        # A thread that has just ended needs no place.
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, to)
