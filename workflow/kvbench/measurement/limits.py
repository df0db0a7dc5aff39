"""What a container or a batch system allows this process: processor quota, cores, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Version 1 writes this or more (a page below 2^63) where there is no limit.
_UNLIMITED = 2**60


@dataclass(frozen=True)
class Limits:
    """The limits of a process; None where there is none, or nobody knows.

    Attributes
    ----------
    quota_cores:
        Processor seconds per second, from the group's quota; 1.5 is one core and a half.
    cores:
        Numbers of the cores the process may run on, as the kernel writes them (``0-3,8``).
    memory_bytes:
        Memory of the whole group.
    cgroup:
        ``v1`` or ``v2``.
    """

    quota_cores: float | None = None
    cores: str | None = None
    memory_bytes: int | None = None
    cgroup: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The limits as plain values, for the record."""
        return asdict(self)

    def allowed_cores(self) -> frozenset[int]:
        """The cores by number; none where they are not known."""
        return numbers(self.cores or "")

    def excess(self, threads: int) -> str | None:
        """Return what is wrong with so many threads, in one sentence, or None.

        Threads beyond the quota do not fail: the kernel stops them all for a part of every tenth of a
        second, and every time measured has such a pause in it.
        """
        count = len(self.allowed_cores())
        if self.quota_cores is not None and threads > self.quota_cores:
            return (
                f"{threads} threads share a quota of {self.quota_cores:g} cores, so that times hold "
                f"forced pauses; run with --cores {max(1, int(self.quota_cores))}"
            )
        if count and threads > count:
            return f"{threads} threads share {count} cores ({self.cores}); run with --cores {count}"
        return None


def numbers(text: str) -> frozenset[int]:
    """Read a list of numbers as the kernel writes it, such as ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def written(cores: frozenset[int] | set[int]) -> str:
    """Write numbers as the kernel does; the opposite of :func:`numbers`."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and parts[-1][1] == core - 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in parts)


def of_this_process() -> Limits:
    """The limits of this process; its cores are those it may really run on, whoever said so."""
    found = read()
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        return found
    return Limits(found.quota_cores, written(affinity(0)), found.memory_bytes, found.cgroup)


def read(root: Path = Path("/")) -> Limits:
    """Read the limits of the control group a process is in.

    The narrowest limit on the way from its group to the top holds. Inside a container the path of the
    group often names the host's; then the top of what is mounted is the container's own group.

    Parameters
    ----------
    root:
        Folder that has ``proc/self/cgroup`` and ``sys/fs/cgroup``.
    """
    mount = root / "sys" / "fs" / "cgroup"
    groups: dict[str, str] = {}
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path.strip("/")
    if (mount / "cgroup.controllers").exists():
        folders = list(_upwards(mount, groups.get("", "")))
        quota = [_quota(*_text(folder / "cpu.max").split()) for folder in folders]
        cores = [_text(folder / "cpuset.cpus.effective") for folder in folders]
        memory = [_limit(_text(folder / "memory.max")) for folder in folders]
        return Limits(_least(quota), _first(cores), _least(memory), "v2")
    if not groups:
        return Limits()

    def of(controller: str, *names: str) -> list[Path]:
        bases = (mount / name for name in (*names, controller))
        base = next((base for base in bases if base.is_dir()), mount / controller)
        return list(_upwards(base, groups.get(controller, "")))

    quota = [
        _quota(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))
        for folder in of("cpu", "cpu,cpuacct")
    ]
    cores = [
        _text(folder / "cpuset.effective_cpus") or _text(folder / "cpuset.cpus")
        for folder in of("cpuset")
    ]
    memory = [_limit(_text(folder / "memory.limit_in_bytes")) for folder in of("memory")]
    return Limits(_least(quota), _first(cores), _least(memory), "v1")


def _upwards(base: Path, group: str) -> Iterator[Path]:
    """The group's folder and those above it, as far as they are mounted."""
    folder = base / group
    while folder != base:
        if folder.is_dir():
            yield folder
        folder = folder.parent
    yield base


def _quota(quota: str = "", period: str = "") -> float | None:
    """Cores of a quota and a period in microseconds; ``max`` and ``-1`` are none."""
    if not (quota.isdigit() and period.isdigit()) or not int(period):
        return None
    return int(quota) / int(period)


def _limit(text: str) -> int | None:
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _least(found: list) -> Any:
    return min((value for value in found if value is not None), default=None)


def _first(found: list[str]) -> str | None:
    return next((text for text in found if text), None)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
