"""Child processes of a study: started, awaited, and always stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import kvbench
from kvbench.errors import Unsupported

_STOP_S = 5.0

#: Ends the child when the process that started it is killed without a chance to clean up.
_WATCHDOG = 'cat >/dev/null; kill -TERM "$1" 2>/dev/null'


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
    """Run a process while the block runs; stop it however the block ends.

    SIGTERM to this process ends the block as SystemExit, so that the child goes with it.
    """
    process = watchdog = None
    with log.open("wb") as output, _terminate_as_exit():
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
            watchdog = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHDOG, "watchdog", str(process.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            yield process
        finally:
            # The watchdog first: it must not signal a process number that is free for reuse.
            if watchdog is not None:
                watchdog.kill()
                watchdog.communicate()
            if process is not None:
                _stop(process)


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


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        # Its helpers share its session, and nothing else does.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, unless somebody else already handles it."""
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
