"""A lock on the machine: never two measurements at once, whoever starts them."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: One file for all users and all checkouts on this machine.
LOCK_FILE = Path(tempfile.gettempdir()) / "kvbench-measuring.lock"


@contextmanager
def machine(path: Path = LOCK_FILE, poll_s: float = 0.05) -> Iterator[float]:
    """Hold the machine for one measurement; yields the seconds waited for it.

    The kernel gives the lock back when the holder ends, however it ends.
    """
    begin = time.perf_counter()
    try:
        # Without O_CREAT first: many systems refuse it on another user's file in a shared folder.
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(PermissionError):
        # Another user made the file; locking it needs no right to change its mode.
        os.fchmod(handle, 0o666)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(poll_s)
        yield time.perf_counter() - begin
    finally:
        os.close(handle)
