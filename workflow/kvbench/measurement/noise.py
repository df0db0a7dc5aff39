"""Noise: what other processes did to the processor (and the GPU) while something was timed."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

#: A sample during which others used more than this share of one core is disturbed.
DISTURBED_CORES = 0.10
#: Windows shorter than this are joined: the kernel counts processor time in ticks of 10 ms.
SHORTEST_WINDOW_S = 0.5
#: Ticks by which two readings can be wrong.
_TICKS_OF_DOUBT = 2


@dataclass(frozen=True)
class Reading:
    """Counters of one moment, in seconds; others = everything that is not the measurement."""

    wall_s: float
    busy_s: float
    steal_s: float
    own_s: float
    involuntary: int

    def others_s(self, later: Reading) -> float:
        """Processor seconds of other programs, virtual machines' stolen time included."""
        total = (later.busy_s - self.busy_s) + (later.steal_s - self.steal_s)
        return max(0.0, total - (later.own_s - self.own_s))


def read(children_s: float = 0.0, children_involuntary: int = 0) -> Reading:
    """Take a reading. Off Linux only the measurement's own counters are known.

    Parameters
    ----------
    children_s, children_involuntary:
        Processor seconds and involuntary switches of other processes that belong to the measurement.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    own = usage.ru_utime + usage.ru_stime + children_s
    busy = steal = 0.0
    try:
        busy, steal = _busy(Path("/proc/stat").read_text(), _own_cores())
    except OSError:
        busy = own
    involuntary = usage.ru_nivcsw + children_involuntary
    return Reading(time.perf_counter(), busy, steal, own, involuntary)


def _own_cores() -> frozenset[int] | None:
    """Cores this process may run on, or None for all: what others do elsewhere disturbs nothing."""
    affinity = getattr(os, "sched_getaffinity", None)
    own = frozenset(affinity(0)) if affinity else None
    return None if own is None or len(own) == os.cpu_count() else own


def _busy(stat: str, cores: frozenset[int] | None) -> tuple[float, float]:
    """Seconds that these cores were busy, and that a virtual machine's host took (proc(5))."""
    wanted = {"cpu"} if cores is None else {f"cpu{core}" for core in cores}
    busy = steal = 0.0
    for line in stat.splitlines():
        name, *fields = line.split() or [""]
        if name in wanted:
            ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
            user, nice, system, _idle, _iowait, irq, softirq, stolen = ticks[:8]
            busy += user + nice + system + irq + softirq
            steal += stolen
    return busy, steal


def disturbed(before: Reading, after: Reading) -> bool:
    """Whether others took more than :data:`DISTURBED_CORES` of a core between two readings."""
    return busy(before.others_s(after), after.wall_s - before.wall_s)


def busy(others_s: float, wall_s: float) -> bool:
    """Whether what others took of some wall time, in processor seconds, is too much."""
    doubt = _TICKS_OF_DOUBT / os.sysconf("SC_CLK_TCK")
    return others_s > DISTURBED_CORES * wall_s + doubt


def descendants(pid: int) -> set[int]:
    """Ids of the processes that one has started, and of those that these have; empty off Linux."""
    found: set[int] = set()
    # A child is listed with the thread that started it.
    for thread in _listed(Path(f"/proc/{pid}/task")):
        with suppress(OSError):
            for child in map(int, (thread / "children").read_text().split()):
                found |= {child} | descendants(child)
    return found


def _listed(folder: Path) -> list[Path]:
    with suppress(OSError):
        return list(folder.iterdir())
    return []


def processor_s(pids: Iterable[int]) -> float:
    """Processor seconds of processes and of the children that they have waited for, by proc(5)."""
    found = 0.0
    for pid in pids:
        with suppress(OSError):
            # What follows the name, which may hold anything: proc(5) counts from field 3 there.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return found


class Taker(Protocol):
    """Another process, or several, that belong to the measurement."""

    cpu_s: float
    involuntary: int


class Watch:
    """Marks the slots during which other programs used the processor.

    The kernel counts in ticks, so short slots are judged together: a window goes on until it is
    :data:`SHORTEST_WINDOW_S` long, and its mark falls on every slot in it. A slot that is taken in
    slices is judged by the windows of all of them together.

    Parameters
    ----------
    takers:
        All other processes of the measurement; what they use is its own.
    """

    def __init__(self, takers: Sequence[Taker]) -> None:
        self._takers = takers
        self._pending: list[dict[str, Any]] = []
        #: Slot to what others took in its windows, and how long those were (s).
        self._seen: dict[int, tuple[float, float]] = {}
        self._window = self.first = self.read()

    def read(self) -> Reading:
        """A reading to which all processes of the measurement are one program."""
        return read(
            sum(taker.cpu_s for taker in self._takers),
            sum(taker.involuntary for taker in self._takers),
        )

    def begin(self) -> None:
        """Begin a window; what happened since the last one is nobody's."""
        self._window = self.read()
        self._seen.clear()

    def add(self, slot: dict[str, Any]) -> None:
        """Take in a slot, by its number ``slot``, or a slice of it, that has just ended."""
        self._pending.append(slot)
        if time.perf_counter() - self._window.wall_s >= SHORTEST_WINDOW_S:
            self.close()

    def close(self) -> None:
        """End the window, write ``disturbed`` into its slots and begin the next."""
        now = self.read()
        others_s, wall_s = self._window.others_s(now), now.wall_s - self._window.wall_s
        for slot in self._pending:
            before = self._seen.get(slot["slot"], (0.0, 0.0))
            self._seen[slot["slot"]] = before[0] + others_s, before[1] + wall_s
            slot["disturbed"] = busy(*self._seen[slot["slot"]])
        self._pending.clear()
        self._window = now


def wait_for_quiet(limit_s: float, window_s: float = 0.3) -> float:
    """Wait until others leave the processor alone for a window, at most ``limit_s``.

    Returns
    -------
    float
        Seconds waited.
    """
    begin = time.perf_counter()
    while time.perf_counter() - begin < limit_s:
        before = read()
        time.sleep(window_s)
        if not disturbed(before, read()):
            break
    return time.perf_counter() - begin


class GpuNeighbours:
    """Processes on the GPU, by NVML; without NVML nothing is known and nothing claimed.

    Only their number is used: NVML counts in the host's process ids, which are not those of a
    container, so that one's own process cannot be told from another's there.
    """

    def __init__(self) -> None:
        self._handle = None
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            # PyTorch's numbering follows CUDA_VISIBLE_DEVICES, NVML's does not; the UUID is common.
            uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml
        except Exception:
            # Any failure means the same: there is no NVML to ask.
            return

    def count(self) -> int | None:
        """Compute processes, this one included, or None when that cannot be known."""
        if self._handle is None:
            return None
        return len(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
