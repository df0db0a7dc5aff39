"""A lock on the machine: never two measurements at once, whoever starts them."""

from __future__ import annotations

import fcntl
import getpass
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvbench.errors import InputError

logger = logging.getLogger(__name__)

#: One file for all users and all checkouts on this machine.
LOCK_FILE = Path(tempfile.gettempdir()) / "kvbench-measuring.lock"


@contextmanager
def machine(path: Path = LOCK_FILE, poll_s: float = 0.05) -> Iterator[float]:
    """Hold the machine for one measurement; yields the seconds waited for it.

    The kernel gives the lock back when the holder ends, however it ends. Who waits says so in the log,
    and for whom. A file that another user left needs only to be readable.

    Raises
    ------
    InputError
        Another user's file cannot even be read.
    """
    begin = time.perf_counter()
    handle = _open(path)
    try:
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    holder = os.pread(handle, 1024, 0).decode(errors="replace").strip()
                    logger.info(
                        "waiting for this machine: %s measures", holder or "another process"
                    )
                    told = True
                time.sleep(poll_s)
        with suppress(OSError):
            # OSError: another user's file, which may be locked and not written.
            os.ftruncate(handle, 0)
            os.pwrite(handle, _myself().encode(), 0)
        yield time.perf_counter() - begin
    finally:
        with suppress(OSError):
            os.ftruncate(handle, 0)
        os.close(handle)


def _open(path: Path) -> int:
    try:
        # Without O_CREAT first: many systems refuse it on another user's file in a shared folder.
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        try:
            handle = os.open(path, os.O_RDONLY)
        except PermissionError:
            raise InputError(
                f"{path}: belongs to another user and cannot be read; ask for it to be removed, or set "
                "TMPDIR for everybody who measures on this machine"
            ) from None
    with suppress(PermissionError):
        # Another user made the file; locking it needs no right to change its mode.
        os.fchmod(handle, 0o666)
    return handle


def _myself() -> str:
    """How who waits is told who measures."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"process {os.getpid()} of {user} in {Path.cwd()}"
