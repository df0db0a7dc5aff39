"""Processes that this program starts, and itself: always ended in order, wherever it runs."""

from __future__ import annotations

import ctypes
import getpass
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

#: Names the Snakemake that a job belongs to, as ``<host>:<process>``.
RUN = "KVBENCH_RUN"
#: Seconds that a process is given to end by itself.
STOP_S = 5.0

_PR_SET_PDEATHSIG = 1

#: Ends a child, and removes its folder, when its parent is killed without a chance to do so.
_WATCHDOG = 'cat >/dev/null; kill -TERM "$1" 2>/dev/null; [ -z "$2" ] || rm -rf "$2"'
#: Where libraries keep what they compile or fetch when the home folder cannot be written.
_CACHES = {"XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "TRITON_HOME": "triton"}


def settle_in(folder: Path) -> None:
    """Let libraries run where the user has no name, or no home folder that can be written.

    Parameters
    ----------
    folder:
        Takes the place of the home folder's caches; made when something is written there.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user-{os.getuid()}"
    home = os.environ.get("HOME")
    if not home or not os.access(home, os.W_OK):
        for variable, name in _CACHES.items():
            os.environ.setdefault(variable, str((folder / name).absolute()))


def end_with_parent() -> None:
    """Ask the kernel to end this process, by SIGTERM, when its parent is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_of_this() -> int | None:
    """The Snakemake on this machine that began this process, or one above it; None where there is none."""
    host, _, number = os.environ.get(RUN, "").rpartition(":")
    if host != socket.gethostname() or not number.isdigit():
        return None
    above = os.getpid()
    with suppress(OSError, ValueError):
        while above > 1:
            # The name, in brackets, may hold blanks.
            stat = Path(f"/proc/{above}/stat").read_text()
            above = int(stat.rpartition(")")[2].split()[1])
            if above == int(number):
                return above
    return None


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into :class:`SystemExit` while the block runs, so that ``finally`` blocks run.

    Ctrl-C already is an exception. A handler that somebody else installed is left alone, and
    signals can only be handled in the main thread.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not ours:
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def child(
    command: Sequence[str],
    output: IO[bytes] | int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[subprocess.Popen]:
    """Run a process while the block runs; it ends however the block ends, also by SIGKILL.

    Parameters
    ----------
    command:
        Program and arguments.
    output:
        Where both of its streams go.
    env:
        Its environment; this process's by default.
    folder:
        Removed with the process when this one is killed; otherwise the caller's to remove.
    """
    process = watchdog = None
    with sigterm_as_exit():
        try:
            # A session of its own keeps the terminal's Ctrl-C away from the child: it is stopped
            # below, after the block has had its own chance to clean up.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL if output == subprocess.DEVNULL else subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
            watched = [str(process.pid), "" if folder is None else str(folder)]
            watchdog = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHDOG, "watchdog", *watched],
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
                stop(process)


def stop(process: subprocess.Popen) -> None:
    """End a process that leads a session of its own, and with force what is left of the session."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        # Its helpers share its session, and nothing else does.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
