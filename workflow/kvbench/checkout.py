"""One checkout, one run: what a killed run left is cleared, and no job outlives its Snakemake."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import getpass
import os
import re
import secrets
import select
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kvbench import processes
from kvbench.errors import InputError

#: Seconds between asking a job to end and ending it.
_GRACE_S = 8.0
#: Where every Snakemake in a checkout holds a shared lock as long as it lives.
_PRESENCE = Path(".snakemake", "presence")
#: One file for each Snakemake that lives in a checkout, on whatever machine: who it is. Locks may not
#: be seen from machine to machine, files are.
_RUNS = Path(".snakemake", "runs")
#: The temporary folders of the runs of a checkout on one machine, one a line.
_TEMPORARY = Path(".snakemake", "temporary")
#: What the name of a folder made here begins with.
_SCRATCH = "kvbench-"
#: What the names of such folders begin with; nothing else is ever removed.
_TEMPORARY_NAMES = ("snakemake", _SCRATCH)

#: A temporary folder of Snakemake's: its prefix and eight characters of Python's.
_STRAY = re.compile(r"snakemake[a-z0-9_]{8}")

#: Folders of Snakemake's that every run writes in.
_WRITTEN = ("incomplete", "locks", "log", "metadata", "scripts")

#: Open until this process ends, however it ends: the kernel then gives the lock back.
_held: list[int] = []


def enter(folder: Path = Path(), temporary: Path | None = None) -> list[str]:
    """Take part in a checkout; if nobody else does, clear what a killed run left.

    Every Snakemake holds a shared lock on one file. Whoever gets it alone knows that no other
    lives here, so that Snakemake's own locks are stale, and half-made files nobody's. On a network
    folder the lock may not reach other machines: what a run of theirs may have locked is left alone.

    Parameters
    ----------
    folder:
        The working directory of the run.
    temporary:
        The temporary folder that this Snakemake has made already.

    Returns
    -------
    list of str
        What is to be told, one line each: who else works here, or what was cleared.

    Raises
    ------
    InputError
        Another user's folder, in which this one may not write: Snakemake would show a traceback.
    """
    _check_rights(folder)
    try:
        (folder / _PRESENCE).parent.mkdir(exist_ok=True)
        handle = _open_presence(folder / _PRESENCE)
        _held.append(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        told = _clear(folder) if alone else _others(folder)
        if alone:
            _remove_strays(temporary)
        _sign(folder)
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError:
        # A folder that cannot be written, or has no locks: Snakemake says what it needs itself.
        return []
    os.environ[processes.RUN] = f"{socket.gethostname()}:{os.getpid()}"
    return told


def _machine() -> str:
    """This machine's name, and what tells it from another one of the same name."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}-{Path('/etc/machine-id').read_text()[:8].strip()}"
    return socket.gethostname()


def _sign(folder: Path) -> None:
    """Say in a file that this process works here, as long as it does."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"user {os.getuid()}"
    path, me = (folder / _RUNS / f"{_machine()}.{os.getpid()}").absolute(), os.getpid()
    path.parent.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):
        # Whoever may write in the folder above works here too, and nobody else.
        path.parent.chmod(stat.S_IMODE(path.parent.parent.stat().st_mode))
    since = time.strftime("%Y-%m-%d %H:%M")
    # A file of an earlier process of this number is nobody's; a link that somebody laid is not followed.
    path.unlink(missing_ok=True)
    with path.open("x") as stream:
        stream.write(f"process {me} of {user} on {socket.gethostname()} since {since}\n")

    def leave() -> None:
        # A forked process ends before this one does.
        if os.getpid() == me:
            path.unlink(missing_ok=True)

    atexit.register(leave)


def _signed(folder: Path) -> Iterator[tuple[Path, bool, int]]:
    """The files of all runs: which, whether of this machine, and the process."""
    for path in sorted((folder / _RUNS).glob("*.*")):
        machine, _, number = path.name.rpartition(".")
        if number.isdigit():
            yield path, machine == _machine(), int(number)


def _who(path: Path) -> str:
    """What a run says of itself, in one line."""
    try:
        return path.read_text(errors="replace").strip().splitlines()[0][:200]
    except (OSError, IndexError):
        return f"a run ({path.name})"


def _others(folder: Path) -> list[str]:
    """Who works here beside this process, which Snakemake lets write other files only."""
    found = [_who(path) for path, ours, number in _signed(folder) if not ours or _lives(number)]
    who = " and ".join(found) or "another Snakemake"
    return [
        f"This checkout is in use by {who}: what both would write is refused until that run has ended."
    ]


def _check_rights(folder: Path) -> None:
    own = folder / ".snakemake"
    needed = [own, *(own / name for name in _WRITTEN)] if own.is_dir() else [folder]
    for path in needed:
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise InputError(
                f"{path.absolute()}: belongs to {_owner(path)}, and you may not write in it; work in a "
                "checkout of your own, or let its owner run: chmod -R g+rwX . (and umask 002 before runs)"
            )


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:
        return f"user {path.stat().st_uid}"


def _open_presence(path: Path) -> int:
    """Open the file of the shared lock, which other users of the checkout must be able to lock too."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        # Another user's file: it can be locked, which is what counts.
        return os.open(path, os.O_RDONLY)
    with contextlib.suppress(PermissionError):
        os.fchmod(handle, 0o666)
    return handle


def note(temporary: Path, folder: Path = Path()) -> None:
    """Note a temporary folder of this run, which a kill would leave behind."""
    with contextlib.suppress(OSError), _temporary(folder).open("a") as stream:
        stream.write(f"{temporary}\n")


def _temporary(folder: Path) -> Path:
    """The list of this machine: another one's folders are not here to be removed."""
    return folder / _TEMPORARY.with_name(f"{_TEMPORARY.name}-{_machine()}")


def scratch(parent: Path | None = None) -> Path:
    """Make a private folder among the temporary files, which the next run removes if a kill leaves it.

    Parameters
    ----------
    parent:
        Where to make it; by default where temporary files go.

    Returns
    -------
    pathlib.Path
        The folder; whoever asked for it removes it.
    """
    while True:
        path = (parent or Path(tempfile.gettempdir())) / f"{_SCRATCH}{secrets.token_hex(4)}"
        # Noted first: a kill may come at any moment, and a folder that was never made does no harm.
        note(path)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
            return path


def _clear(folder: Path) -> list[str]:
    """Remove stale locks and half-made files; nobody else on this machine works in the folder."""
    locks = sorted((folder / ".snakemake" / "locks").glob("*.lock"))
    signed = list(_signed(folder))
    foreign = [path for path, ours, _ in signed if not ours]
    if locks and foreign:
        who = " and ".join(map(_who, foreign))
        return [
            f"{folder / '.snakemake' / 'locks'}: held by {who}; wait until that run has ended, or, "
            "if it is gone, run: snakemake --unlock"
        ]
    # Who runs jobs holds a lock of Snakemake's, so that without any these files are left over.
    for path, _, _ in signed:
        path.unlink(missing_ok=True)
    for path in locks:
        path.unlink(missing_ok=True)
    for path in leftovers(folder):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    _temporary(folder).unlink(missing_ok=True)
    return ["Going on after a run that was cut short: its lock is released."] if locks else []


def _remove_strays(own: Path | None) -> None:
    """Remove the folders of Snakemakes that were killed before they could note them; all are empty.

    Whose they are cannot be known. So nothing is done while another Snakemake that makes its folders
    in the same place lives on this machine, and nothing but an empty folder of this user is removed.
    """
    place = Path(tempfile.gettempdir())
    strays = [path for path in place.glob("snakemake*") if _STRAY.fullmatch(path.name)]
    if len(strays) == (own in strays) or any(
        _makes_folders_in(place, n) for n in _other_snakemakes()
    ):
        return
    for path in strays:
        with contextlib.suppress(OSError):
            if path != own and path.is_dir() and path.stat().st_uid == os.getuid():
                path.rmdir()


def _other_snakemakes() -> Iterator[int]:
    """Living processes whose command speaks of Snakemake, but for this one and those above it."""
    own = {os.getpid(), *_above(os.getpid())}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            number = int(path.name)
            if number not in own and b"snakemake" in (path / "cmdline").read_bytes():
                yield number


def _makes_folders_in(place: Path, process: int) -> bool:
    try:
        told = Path("/proc", str(process), "environ").read_bytes().split(b"\0")
    except FileNotFoundError:
        return False
    except OSError:
        # Another user's: it may.
        return True
    given = dict(line.partition(b"=")[::2] for line in told)
    found = next((given[name] for name in (b"TMPDIR", b"TEMP", b"TMP") if given.get(name)), b"/tmp")
    return os.path.realpath(found) == os.path.realpath(os.fsencode(place))


def leftovers(folder: Path) -> Iterator[Path]:
    """Files and folders that a killed run was still making, and the temporary ones of its jobs."""
    own = folder / ".snakemake"
    with contextlib.suppress(OSError):
        for line in _temporary(folder).read_text().splitlines():
            if Path(line).name.startswith(_TEMPORARY_NAMES) and Path(line).is_dir():
                yield Path(line)
    yield from [*own.glob("scripts/tmp*"), *own.glob("tmp.*")]
    for path in [*(folder / "results").rglob(".*.part"), *(folder / "results").rglob(".*.new")]:
        if "recorded" not in path.relative_to(folder).parts:
            yield path


def lead() -> None:
    """Let the jobs below this process belong to it: on a cluster's node it stands alone."""
    os.environ[processes.RUN] = f"{socket.gethostname()}:{os.getpid()}"


def follow() -> None:
    """End this process and everything below it when the Snakemake that it belongs to is gone.

    A job that outlives its Snakemake would measure on beside the next run. Nothing wakes up until
    then: a thread waits for the kernel to say so. Without such a facility jobs end by themselves.
    """
    host, _, number = os.environ.get(processes.RUN, "").rpartition(":")
    if host != socket.gethostname() or not hasattr(os, "pidfd_open"):
        return
    try:
        owner = os.pidfd_open(int(number))
    except (OSError, ValueError):
        return

    def wait() -> None:
        select.select([owner], [], [])
        end_below(os.getpid())
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_below(process: int) -> None:
    """End all processes below one, first by asking, and wait until they are gone."""
    processes = list(_below(process))
    for number, ask in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        for found in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(found, number)
        deadline = time.monotonic() + ask
        while time.monotonic() < deadline:
            processes = [found for found in processes if _lives(found)]
            if not processes:
                return
            time.sleep(0.05)


def _parents() -> dict[int, int]:
    """Every living process and the one that began it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may hold blanks.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return parents


def _above(process: int) -> Iterator[int]:
    parents = _parents()
    while process in parents:
        process = parents[process]
        yield process


def _below(process: int) -> Iterator[int]:
    parents = _parents()
    for found in parents:
        above = found
        while above in parents and above != process:
            above = parents[above]
        if above == process and found != process:
            yield found


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
