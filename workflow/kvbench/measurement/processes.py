"""The process of a cell: forked from a warm parent or started afresh, and how to talk to it."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvbench.errors import InputError
from kvbench.inputs.models import LoadedModel
from kvbench.measurement import noise, startup
from kvbench.measurement.cell import Cell, Failure, Job, failure

logger = logging.getLogger(__name__)

#: What a cell answers that rests within a turn until it is told to go on.
RESTING = "resting"
#: How a cell's process comes about, as the record says it.
FORKED, FRESH = "forked", "fresh"

_WORKFLOW = Path(__file__).resolve().parents[2]
#: Linux: the signal that a process gets when its parent ends, however that ends (prctl(2)).
_PR_SET_PDEATHSIG = 1


class Ended(Exception):
    """A cell came to its end without a result; ``failure`` says how."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class Worker:
    """A cell's process, seen from its block.

    Parameters
    ----------
    pid:
        Of the process.
    connection:
        Our end of the way to it.
    kind:
        :data:`FORKED` or :data:`FRESH`.
    """

    def __init__(self, pid: int, connection: Connection, kind: str) -> None:
        self.pid = pid
        self.kind = kind
        #: Switches it did not ask for, as of its last answer.
        self.involuntary = 0
        self._own_s = self._started_s = 0.0
        self._connection = connection
        self._kills = _out_of_memory_kills()
        self._status: int | None = None

    def fileno(self) -> int:
        """Of our end of the connection; a process forked later closes it."""
        return self._connection.fileno()

    @property
    def cpu_s(self) -> float:
        """Processor seconds of the process until now, and of those that it started.

        Its threads spin for some milliseconds after an answer. Read from its answers alone, what
        they take would look like somebody else's until it answers again, a round later.
        """
        # A process that has been waited for has left its number to others.
        own = _cpu_s(self.pid) if self._status is None else None
        self._own_s = max(self._own_s, own or 0.0)
        return self._own_s + self._started_s

    def send(self, command: str, *arguments: Any) -> None:
        """Ask for a method of :class:`kvbench.measurement.cell.Cell`; :meth:`receive` waits for it."""
        # Where nobody listens any more, receiving says why.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((command, arguments))

    def receive(self) -> Any:
        """Wait for what the last :meth:`send` asked for, or for :data:`RESTING`.

        Raises
        ------
        Ended
            The cell failed, or its process is gone.
        InputError
            The inputs are wrong.
        """
        try:
            kind, value, usage = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise Ended(self._gone()) from None
        self._own_s, self._started_s, self.involuntary = usage
        if kind == RESTING:
            return RESTING
        if kind == "input":
            raise InputError(value)
        if kind == "ended":
            found, trace = value
            logger.error("%s", trace)
            raise Ended(found)
        return value

    def ask(self, command: str, *arguments: Any) -> Any:
        """Send and receive."""
        self.send(command, *arguments)
        return self.receive()

    def _gone(self) -> Failure:
        """Why a process that does not answer is gone."""
        code = self._wait()
        if code >= 0:
            return Failure("failed", f"the cell's process ended with exit code {code}")
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL and _out_of_memory_kills() > self._kills:
            return Failure("out_of_memory", f"the kernel ended the cell's process ({name})")
        return Failure("failed", f"the cell's process was ended from outside ({name})")

    def _wait(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def end(self) -> None:
        """End the process, whatever it does, and wait until it is gone."""
        if self._status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._wait()
        self._connection.close()


class Inside:
    """A cell in this very process, asked like one in another."""

    #: What the cell uses is this process's own.
    cpu_s, involuntary = 0.0, 0

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    def ask(self, command: str, *arguments: Any) -> Any:
        """Call a method of the cell."""
        return getattr(self._cell, command)(*arguments)


def _out_of_memory_kills() -> int:
    """Processes that the kernel has ended for want of memory since it started; 0 off Linux."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0


def fork(job: Job, model: LoadedModel, others: Sequence[Worker]) -> Worker:
    """Fork a cell's process; it shares the libraries and, until one writes, the weights.

    The calling process must have run no parallel region of OpenMP with more than one thread, and
    must not have initialised CUDA: neither survives a fork.

    Parameters
    ----------
    job, model:
        What to measure.
    others:
        Processes of the same block, whose connections the new one must not keep open.
    """
    ours, theirs = _connected()
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python warns where there are threads at all; those of the libraries here are idle ones.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        theirs.close()
        return Worker(pid, ours, FORKED)
    # What follows runs in the child, which never returns to its caller.
    try:
        ours.close()
        for other in others:
            os.close(other.fileno())
        _end_with(parent)
        _serve(theirs, Cell(job, model))
    finally:
        os._exit(0)


def start(job: Job) -> Worker:
    """Start a cell's process afresh; it imports and loads everything by itself."""
    ours, theirs = _connected()
    code = "from kvbench.measurement import processes; processes.main()"
    path = os.pathsep.join(filter(None, [str(_WORKFLOW), os.environ.get("PYTHONPATH")]))
    os.set_inheritable(theirs.fileno(), True)
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", code, str(theirs.fileno()), str(os.getpid())],
        {**os.environ, "PYTHONPATH": path},
    )
    theirs.close()
    ours.send(job)
    return Worker(pid, ours, FRESH)


def main() -> None:
    """What a fresh process runs: its arguments are the connection's number and its parent."""
    theirs = Connection(int(sys.argv[1]))
    _end_with(int(sys.argv[2]))
    _serve(theirs, Cell(theirs.recv()))


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the block the way an interrupt does, so that its processes end with it.

    Does nothing where somebody else handles the signal, or outside of the main thread.
    """
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


def _connected() -> tuple[Connection, Connection]:
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), Connection(theirs.detach())


def _end_with(parent: int) -> None:
    """End when the parent does, and only then: an interrupt is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _serve(connection: Connection, cell: Cell) -> None:
    """Answer until the other side hangs up."""
    with startup.collector_paused():
        import torch

    def rest() -> None:
        connection.send((RESTING, None, _usage()))
        try:
            connection.recv()
        except EOFError:
            os._exit(0)

    cell.rest = rest
    with torch.inference_mode():
        while True:
            try:
                command, arguments = connection.recv()
            except EOFError:
                return
            answer: tuple[str, Any]
            try:
                answer = "ok", getattr(cell, command)(*arguments)
            except InputError as error:
                answer = "input", str(error)
            except Exception as error:
                answer = "ended", (failure(error), traceback.format_exc())
            connection.send((*answer, _usage()))


def _usage() -> tuple[float, float, int]:
    """Processor seconds of this process and of those it started, and its involuntary switches."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    started_s = noise.processor_s(noise.descendants(os.getpid()))
    return usage.ru_utime + usage.ru_stime, started_s, usage.ru_nivcsw


def _cpu_s(pid: int) -> float | None:
    """Processor seconds of all threads of another process; None off Linux, or when it is gone."""
    if sys.platform != "linux":
        return None
    # What clock_getcpuclockid(3) gives: the process's clock by its pid.
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    return None
