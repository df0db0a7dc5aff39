"""A lock on the machine: never two measurements at once, whoever starts them."""

from __future__ import annotations

import errno
import fcntl
import getpass
import logging
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvbench.errors import InputError

logger = logging.getLogger(__name__)

#: Names another file for the lock.
VARIABLE = "KVBENCH_LOCK"
#: What the file is called in the folder that is found for it.
NAME = "kvbench-measuring.lock"
#: Folders that all users of a machine share, whatever TMPDIR they have; the first that is open to all
#: is taken. Not /dev/shm: where a user logs out, systemd removes that user's files there.
_SHARED = (Path("/run/lock"), Path("/tmp"))
#: Open to all: everybody may make files, and nobody may remove another's.
_OPEN = stat.S_IWOTH | stat.S_ISVTX
#: Seconds in which another user may make the file and open it to all.
_MAKING_S = 1.0
#: What opening must not do: follow a link, wait for a pipe, or be inherited by a program.
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def place(shared: Sequence[Path] = _SHARED) -> Path:
    """Return the lock's file: one for all users and all checkouts of this machine.

    ``KVBENCH_LOCK`` names another one. The choice looks at the folders' modes and not at who asks,
    so that everybody on a machine chooses alike.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    for folder in shared:
        with suppress(OSError):
            if folder.stat().st_mode & _OPEN == _OPEN and os.access(folder, os.W_OK | os.X_OK):
                return folder / NAME
    return Path(tempfile.gettempdir()) / NAME


@contextmanager
def machine(path: Path | None = None, poll_s: float = 0.05) -> Iterator[float]:
    """Hold the machine for one measurement; yields the seconds waited for it.

    The kernel gives the lock back when the holder ends, however it ends. Who waits says so, and for
    whom, in one line of the log and of standard error. A file that another user left needs only to
    be readable.

    Parameters
    ----------
    path:
        The lock's file; by default :func:`place`.
    poll_s:
        Seconds between two looks at it.

    Raises
    ------
    InputError
        The file cannot be made, or another user's cannot even be read, or it is no plain file.
    """
    begin = time.perf_counter()
    path = place() if path is None else path
    handle = _hold(path, poll_s)
    try:
        with suppress(OSError):
            # OSError: another user's file, which may be locked and not written.
            os.ftruncate(handle, 0)
            os.pwrite(handle, _myself().encode(), 0)
        yield time.perf_counter() - begin
    finally:
        with suppress(OSError):
            os.ftruncate(handle, 0)
        os.close(handle)


def _hold(path: Path, poll_s: float) -> int:
    """Wait for the lock and return the open file that holds it."""
    told = False
    while True:
        handle = _open(path)
        try:
            while not _locked(handle):
                if not told:
                    told = True
                    _tell(path, handle)
                time.sleep(poll_s)
            if _is_still(path, handle):
                return handle
        except BaseException:
            # The file says who holds it, and that is somebody else.
            os.close(handle)
            raise
        # Removed while we waited: whoever comes now locks another file, and so do we.
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tell(path: Path, handle: int) -> None:
    holder = os.pread(handle, 1024, 0).decode(errors="replace").strip().replace("\n", " ")
    line = f"waiting for this machine: {holder or 'another process'} measures ({path})"
    logger.info("%s", line)
    with suppress(OSError, ValueError):
        # The log alone would leave whoever looks at the terminal without a reason for the silence.
        print(line, file=sys.stderr, flush=True)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except OSError:
        return False


def _open(path: Path) -> int:
    """Open the lock's file, make it if need be, and let all users lock it."""
    deadline = time.monotonic() + _MAKING_S
    while True:
        try:
            handle = _open_once(path)
            break
        except FileExistsError:
            # Another process made it between two steps of ours.
            continue
        except PermissionError as error:
            # Another user may just have made it, and be about to open it to all.
            if path.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            raise _refusal(path, error) from None
        except OSError as error:
            raise _refusal(path, error) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode) or os.fstat(handle).st_nlink > 1:
        os.close(handle)
        raise InputError(
            f"{path}: is no plain file of its own and is not touched; remove it, or set {VARIABLE}"
        )
    with suppress(OSError):
        # Another user made the file; locking it needs no right to change its mode.
        os.fchmod(handle, 0o666)
    return handle


def _open_once(path: Path) -> int:
    try:
        # Without O_CREAT first: many systems refuse it on another user's file in a shared folder.
        return os.open(path, os.O_RDWR | _PLAIN)
    except FileNotFoundError:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | _PLAIN)


def _refusal(path: Path, error: OSError) -> InputError:
    if isinstance(error, PermissionError) and path.exists():
        return InputError(
            f"{path}: belongs to another user and cannot be read; ask for it to be removed, or set "
            f"{VARIABLE} to one file for everybody who measures on this machine"
        )
    reason = "is a link" if error.errno == errno.ELOOP else (error.strerror or str(error))
    return InputError(
        f"{path}: the lock of this machine cannot be made there ({reason}); set {VARIABLE} to a "
        "file that everybody who measures on this machine can read"
    )


def _myself() -> str:
    """How who waits is told who measures."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"process {os.getpid()} of {user} in {Path.cwd()}"
