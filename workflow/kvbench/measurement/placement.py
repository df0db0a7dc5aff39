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
from contextlib import suppress
from pathlib import Path


def processors() -> list[int]:
    """The processors that this process may run on, in order; empty where the system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else []


def settle(threads: int, allowed: list[int] | None = None) -> int | None:
    """Bind the calling process's main thread to the first processor, and its other threads to the rest.

    Threads that start later, and processes, inherit the place of whoever starts them: this is called
    when the threads of torch's operations exist.

    Parameters
    ----------
    threads:
        Threads that work at once; where they are more than there are processors, none is bound.
    allowed:
        Processors to share out; by default those that the process may run on.

    Returns
    -------
    int or None
        The main thread's processor; None where nothing is bound.
    """
    allowed = processors() if allowed is None else allowed
    if len(allowed) < max(2, threads):
        return None
    # Linux numbers the main thread like its process. Python's own `native_id` of it is, in a process that
    # was forked, still its parent's.
    main = os.getpid()
    try:
        for entry in Path("/proc/self/task").iterdir():
            thread = int(entry.name)
            # A thread that has just ended needs no place.
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, allowed[:1] if thread == main else allowed[1:])
    except OSError:
        return None
    return allowed[0]
