"""A process that has imported the libraries waits for the jobs of a run, which work in forks of it.

Every job of Snakemake is a fresh interpreter, and to import torch and transformers takes it longer than
a small block measures. So the first job that wants to starts a process that imports them and waits. It
belongs to one Snakemake and ends with it, however that ends; until then it sleeps in the kernel. A job
connects, hands over its standard streams and its log, and waits; its work is done in a process forked
for it, which imports the library itself (``kvbench``) from what lies on the disk then. That process
watches the job and ends when the job does. What measures models and what measures caches have a waiting
process each (:func:`kvbench.measurement.startup.import_libraries`): no cache is measured beside torch.

Nothing of a record may depend on it: only such libraries are imported beforehand as the work imports
before it measures in any case, and a job whose circumstances are not those of the waiting process
(variables, processors, limits, rights) works alone, as does every job where something about this fails.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import pickle
import pkgutil
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from io import UnsupportedOperation
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from kvbench import processes
from kvbench.measurement import startup

logger = logging.getLogger(__name__)

#: Set to 0, every job works alone.
VARIABLE = "KVBENCH_WARM"
#: The longest wait for the answer of the waiting process, which may be importing still, in seconds.
_READY_S = 300.0
#: Seconds in which the waiting process says how a forked one ended.
_LAST_WORD_S = 5.0
#: The longest that work whose job has ended may take to stop its servers and remove its files, in seconds.
_CLEANING_S = 4 * processes.STOP_S

_WORKFLOW = Path(__file__).resolve().parents[2]
#: What the waiting process has run of the library: an edit of it needs another one.
_OWN_CODE = (Path(__file__), Path(startup.__file__))
_PROGRAM = "from kvbench.measurement import warm; warm.main()"
#: Fields of ``/proc/self/status`` that a forked process has of its parent and that can matter.
_INHERITED = (
    "Umask",
    "Uid",
    "Gid",
    "Groups",
    "CapEff",
    "NoNewPrivs",
    "Seccomp",
    "SigBlk",
    "SigIgn",
)
#: What the kernel says of the other end of a connection: process, user and group.
_CREDENTIALS = struct.Struct("3i")


def call(
    module: str,
    function: str,
    *arguments: Any,
    libraries: str = "models",
    alone: bool = False,
) -> Any:
    """Call a function of the library where the libraries are imported already, or else here.

    Parameters
    ----------
    module, function:
        The full name of a module of the library, and of a function in it.
    arguments:
        Values that can be pickled, and read again by a process that has imported nothing of the library.
    libraries:
        What is imported already, see :func:`kvbench.measurement.startup.import_libraries`.
    alone:
        Whether to call it here in any case.

    Returns
    -------
    Any
        What the function returns. What it raises is raised here, with its traceback as a note; a process
        that a signal ended ends this one alike.
    """
    with nullcontext() if alone else _served(libraries) as served:
        if served is None:
            return pkgutil.resolve_name(f"{module}:{function}")(*arguments)
        return _outcome(*served, (module, function, arguments))


# -------------------------------------------------------------------------------------- the job


@contextmanager
def _served(libraries: str) -> Iterator[tuple[Connection, int] | None]:
    """A process forked for this job, ready to work; None where there is none to be had."""
    served = None
    try:
        served = _connected(libraries)
    except Exception as error:
        # Whatever it was, the job can do without.
        logger.info("working alone: %s: %s", type(error).__name__, error)
    try:
        yield served
    finally:
        if served is not None:
            served[0].close()
            os.close(served[1])


def _connected(libraries: str) -> tuple[Connection, int] | None:
    """A connection to a process forked for this job, and an open file that tells of its end."""
    owner = _owner()
    if owner is None:
        return None
    name = _address(*owner, libraries)
    way = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        way.connect(name)
    except OSError:
        way.close()
        way = _start(*owner, libraries)
    with way:
        if _other_user(way):
            raise PermissionError("another user's process waits in its place")
        streams, log = _streams()
        socket.send_fds(way, [b"-"], streams)
        job = Connection(os.dup(way.fileno()))
    try:
        job.send((_circumstances(), str(Path.cwd()), sys.path, log))
        if not job.poll(_READY_S):
            raise TimeoutError(f"no answer within {_READY_S:g} s")
        process, differs = job.recv()
        if differs:
            raise RuntimeError(f"the process that waits has other {', '.join(differs)}")
        worker = os.pidfd_open(process)
    except BaseException:
        job.close()
        raise
    logger.info("forked from the process that waits with the libraries")
    return job, worker


def _owner() -> tuple[int, str] | None:
    """The Snakemake above this process, and when it began; None where nothing may wait for it."""
    if os.environ.get(VARIABLE) == "0" or sys.platform != "linux":
        return None
    owner = processes.run_of_this()
    if owner is None or not hasattr(os, "pidfd_open"):
        return None
    return owner, _began(owner)


def _began(process: int) -> str:
    """When a process began, in ticks since the machine did: its number alone is used again (proc(5))."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]


def _address(owner: int, began: str, libraries: str) -> bytes:
    """An address that needs no file: of one user, checkout, Snakemake, interpreter, code and libraries."""
    state = hashlib.sha256()
    for part in (os.getuid(), _WORKFLOW, owner, began, sys.executable, sys.version, libraries):
        state.update(f"{part}\0".encode())
    for path in _OWN_CODE:
        state.update(path.read_bytes())
    return b"\0kvbench-" + state.hexdigest()[:32].encode()


def _start(owner: int, began: str, libraries: str) -> socket.socket:
    """Start the waiting process and return a connection to it: this job is the first it serves."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(owner), began, libraries],
            # Where it finds the library; it has the variables of the job, and nothing more.
            cwd=_WORKFLOW,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            check=True,
        )
    return ours


def _other_user(way: socket.socket) -> bool:
    found = way.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(found)[1] != os.getuid()


def _streams() -> tuple[list[int], list[tuple[int, Any]]]:
    """Open files that the work writes to as the job would, and what the log's files need to be told.

    Returns
    -------
    tuple
        Standard input, output and error, then the files of the log; and of each of these the level and
        the format of its handler.
    """
    files, log = [0, 1, 2], []
    for handler in logging.getLogger().handlers:
        with suppress(AttributeError, UnsupportedOperation, ValueError):
            files.append(handler.stream.fileno())  # type: ignore[attr-defined]
            log.append((handler.level, handler.formatter))
    return files, [(logging.getLogger().level, logging.raiseExceptions), *log]


def _outcome(job: Connection, worker: int, work: tuple[str, str, tuple[Any, ...]]) -> Any:
    """Have the work done and wait for what comes of it."""
    try:
        with processes.sigterm_as_exit():
            found = _answer(job, worker, work)
    except (SystemExit, KeyboardInterrupt):
        # Whoever ends this job shall find nothing of it at work: the end of the connection says so.
        job.close()
        select.select([worker], [], [], _CLEANING_S)
        raise
    if found is None:
        raise RuntimeError("the process that did the work is gone, and nobody says how it ended")
    kind, value = found
    if kind == "returned":
        return value
    if kind == "raised":
        raise value
    if value < 0:
        # As if it had been this process: whoever waits for it is told of the signal.
        with suppress(OSError):
            # SIGKILL has no other.
            signal.signal(-value, signal.SIG_DFL)
        os.kill(os.getpid(), -value)
    raise RuntimeError(f"the process that did the work ended with exit code {value}")


def _answer(
    job: Connection, worker: int, work: tuple[str, str, tuple[Any, ...]]
) -> tuple[str, Any] | None:
    """What came of the work: ``returned``, ``raised`` or ``ended``, and with what; None if nobody says."""
    found: tuple[str, Any] | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        job.send(work)
        while True:
            # Processes that the work left behind may keep the connection open: its own end counts.
            ready, _, _ = select.select([job, worker], [], [])
            if job not in ready and (found or not job.poll(_LAST_WORD_S)):
                break
            kind, value = job.recv()
            if kind == "ended":
                return found or (kind, value)
            found = kind, value
    return found


# ------------------------------------------------------------------------- the waiting process


def main() -> None:
    """Be the waiting process; its arguments: first connection, Snakemake, when it began, libraries."""
    first, owner, began, libraries = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    if os.fork():
        # Nobody's child: the job that started it does not have to wait for it.
        os._exit(0)
    os.set_inheritable(first, False)
    mine = _circumstances()
    # No folder is kept in use; what was found from the one it was started in still is.
    sys.path[:] = map(os.path.abspath, sys.path)
    os.chdir("/")
    watched = os.pidfd_open(owner)
    if _began(owner) != began:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # Refused where another one waits already: its job then works alone, this once.
        listener.bind(_address(owner, began, libraries))
        listener.listen()
        startup.import_libraries(libraries)
        _serve(listener, socket.socket(fileno=first), watched, mine)
    # To take all the modules down in order would take a while of the processor.
    os._exit(0)


def _serve(
    listener: socket.socket, first: socket.socket, owner: int, mine: Mapping[str, Any]
) -> None:
    """Fork for every job that comes, until the owner ends."""
    running: dict[int, tuple[int, socket.socket]] = {}

    def fork(way: socket.socket) -> None:
        # Looked at in the fork: a job that says nothing keeps nobody waiting.
        with warnings.catch_warnings():
            # Python warns where there are threads at all; those of the libraries here are idle ones.
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
        if process:
            running[os.pidfd_open(process)] = process, way
            return
        try:
            listener.close()
            for handle, (_, other) in running.items():
                os.close(handle)
                other.close()
            _work(way, owner, mine)
        finally:
            os._exit(1)

    fork(first)
    while True:
        ready, _, _ = select.select([owner, listener, *running], [], [])
        if owner in ready:
            return
        for handle in set(ready) & set(running):
            process, way = running.pop(handle)
            os.close(handle)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with way, suppress(OSError):
                way.setblocking(False)
                job = Connection(os.dup(way.fileno()))
                job.send(("ended", status))
                job.close()
        if listener in ready:
            way, _ = listener.accept()
            if _other_user(way):
                way.close()
            else:
                fork(way)


# ---------------------------------------------------------------------------- the forked process


def _work(way: socket.socket, owner: int, mine: Mapping[str, Any]) -> NoReturn:
    """Do what a job asks for, in its place; never returns."""
    _, files, _, _ = socket.recv_fds(way, 1, 16)
    job = Connection(way.detach())
    theirs, folder, path, (log, *handlers) = job.recv()
    differs = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
    job.send((os.getpid(), differs))
    if differs:
        os._exit(0)
    module, function, arguments = _take_over(job, owner, files, folder, path, log, handlers)
    answer: tuple[str, Any]
    try:
        answer = "returned", pkgutil.resolve_name(f"{module}:{function}")(*arguments)
    except BaseException as error:
        error.add_note(f"in a process forked for this job:\n{traceback.format_exc()}")
        answer = "raised", error
    for stream in (sys.stdout, sys.stderr, *logging.getLogger().handlers):
        with suppress(OSError, ValueError):
            stream.flush()
    try:
        told = pickle.dumps(answer)
    except Exception:
        # Some exceptions of libraries cannot be: their words are.
        told = pickle.dumps(
            ("raised", RuntimeError("".join(traceback.format_exception(answer[1]))))
        )
    job.send_bytes(told)
    os._exit(0)


def _take_over(
    job: Connection,
    owner: int,
    files: list[int],
    folder: str,
    path: list[str],
    log: tuple[int, bool],
    handlers: list[tuple[int, Any]],
) -> tuple[str, str, tuple[Any, ...]]:
    """Take the job's place: its folder, streams, log and paths; returns the work that it asks for."""
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
        os.close(file)
    root = logging.getLogger()
    level, logging.raiseExceptions = log
    root.setLevel(level)
    root.handlers.clear()
    for file, (level, form) in zip(files[3:], handlers, strict=True):
        # The open file is the job's own, so that both write one after the other.
        os.set_inheritable(file, False)
        handler = logging.StreamHandler(os.fdopen(file, "w"))
        handler.setLevel(level)
        handler.setFormatter(form)
        root.addHandler(handler)
    os.chdir(folder)
    sys.path[:] = path
    # From here on the library is what lies on the disk.
    for name in [name for name in sys.modules if name.partition(".")[0] == "kvbench"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    work = job.recv()
    threading.Thread(target=_end_with, args=(job.fileno(), owner), daemon=True).start()
    return work


def _end_with(job: int, owner: int) -> None:
    """End this process, and with it the cells that it has forked, when the job or its Snakemake does.

    It is asked to, as the job would be: what has servers to stop and files to remove does so
    (:func:`kvbench.processes.sigterm_as_exit`), and everything else ends at once.
    """
    watched = select.poll()
    # Hanging up is told without being asked for.
    watched.register(job, 0)
    watched.register(owner, select.POLLIN)
    watched.poll()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    time.sleep(_CLEANING_S)
    os._exit(1)


def _circumstances() -> dict[str, Any]:
    """What a forked process has of its parent, and what libraries read when they are imported."""
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    limits = sorted(name for name in dir(resource) if name.startswith("RLIMIT_"))
    return {
        "variables": dict(os.environ),
        "interpreter": (sys.executable, sys.version, tuple(sys.flags), tuple(sys.warnoptions)),
        "rights": [status.get(name) for name in _INHERITED],
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
        "processors": sorted(os.sched_getaffinity(0)),
        "priority": (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)),
        "control group": Path("/proc/self/cgroup").read_text(),
        "namespaces": {path.name: str(path.readlink()) for path in Path("/proc/self/ns").iterdir()},
    }
