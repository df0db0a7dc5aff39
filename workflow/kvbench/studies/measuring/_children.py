"""Child processes of a study: started, awaited, and always stopped."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import kvbench
from kvbench import processes
from kvbench.errors import Unsupported


def environment(offline: bool = True) -> dict[str, str]:
    """Return the environment for a Python child that can import this library."""
    paths = [str(Path(kvbench.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    changes["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if offline:
        changes["HF_HUB_OFFLINE"] = "1"
    return os.environ | changes


@contextmanager
def child(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """Run a process while the block runs, with its output in a log; see :func:`processes.child`."""
    with log.open("wb") as output, processes.child(command, output, env) as process:
        yield process


def await_ready(
    process: subprocess.Popen, log: Path, ready: Callable[[], bool], timeout_s: float, name: str
) -> None:
    """Wait until ``ready()``.

    Raises
    ------
    Unsupported
        If the process ends or the time is over; the reason carries the last line of its log.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None:
            raise Unsupported(f"{name} ended with status {process.returncode}: {last_line(log)}")
        if time.monotonic() > deadline:
            raise Unsupported(f"{name} was not ready after {timeout_s:g} s: {last_line(log)}")
        time.sleep(0.1)


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        spoken = [line for line in lines if line]
        if spoken:
            return spoken[-1][:300]
    return "nothing in its log"
