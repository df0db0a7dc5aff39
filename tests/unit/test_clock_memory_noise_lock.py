"""The instruments: stamps, bytes of caches, peaks of memory, other processes, and the lock."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kvbench.errors import InputError
from kvbench.measurement import lock, noise, processes, rounds
from kvbench.measurement.clock import Clock, clock_for
from kvbench.measurement.memory import CpuMemory, cache_bytes, meter_for
from kvbench.measurement.noise import Reading

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
MB = 10**6


@pytest.fixture
def child():
    """Start Python programs; those still running are ended with the test."""
    started = []

    def child(program: str, *arguments: str) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(WORKFLOW)},
            )
        )
        return started[-1]

    yield child
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


# Clock ----------------------------------------------------------------------------------------


def ticking(monkeypatch, *moments: float) -> None:
    left = iter(moments)
    monkeypatch.setattr(time, "perf_counter", lambda: next(left))


def test_a_turn_is_stamped_at_its_start_each_token_and_its_end(monkeypatch):
    ticking(monkeypatch, 10.0, 12.0, 12.5, 13.5, 14.0)
    clock = Clock()
    clock.start()
    for _ in range(3):
        clock.on_token()
    timing = clock.finish()
    assert (timing.e2e_s, timing.ttft_s, timing.itl_s) == (4.0, 2.0, [0.5, 1.0])


def test_stamps_of_an_engine_replace_the_clocks_own(monkeypatch):
    ticking(monkeypatch, 10.0, 14.0)
    clock = Clock()
    clock.start()
    timing = clock.finish([11.0, 11.25, 13.0])
    assert (timing.e2e_s, timing.ttft_s, timing.itl_s) == (4.0, 1.0, [0.25, 1.75])


def test_a_clock_starts_every_turn_anew(monkeypatch):
    ticking(monkeypatch, 0.0, 1.0, 2.0, 10.0, 13.0, 14.0)
    clock = Clock()
    for expected in (1.0, 3.0):
        clock.start()
        clock.on_token()
        timing = clock.finish()
        assert (timing.ttft_s, timing.itl_s) == (expected, [])


def test_a_clock_stands_while_a_turn_rests(monkeypatch):
    # Tokens at 0.6, 1.2 (rests until 11.2), 11.9 and 12.3 (rests until 40.3); done at 40.8.
    ticking(monkeypatch, 0.0, 0.6, 1.2, 11.2, 11.9, 12.3, 40.3, 40.8)
    rests: list[int] = []
    clock = Clock(lambda: rests.append(1))
    clock.start()
    for _ in range(4):
        clock.on_token()
    timing = clock.finish()
    assert len(rests) == 2
    assert timing.ttft_s == pytest.approx(0.6)
    assert timing.itl_s == pytest.approx([0.6, 0.7, 0.4])
    assert timing.e2e_s == pytest.approx(0.6 + 0.6 + 0.7 + 0.4 + 0.5)


def test_a_cpu_is_timed_by_the_hosts_clock():
    assert type(clock_for("cpu")) is Clock


# Bytes of a cache -----------------------------------------------------------------------------


def layer(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(**fields)


def test_nothing_kept_is_nothing():
    assert cache_bytes(None) == 0
    assert cache_bytes(layer(layers=[layer(keys=torch.empty(0), values=None)])) == 0


def test_shared_storage_is_counted_once():
    shared = torch.zeros(100)
    cache = layer(layers=[layer(keys=shared[:50], values=shared[50:]), layer(keys=shared)])
    assert cache_bytes(cache) == 400


def test_a_view_counts_the_whole_storage_behind_it():
    cache = layer(layers=[layer(keys=torch.zeros(100)[:3], values=torch.zeros(10))])
    assert cache_bytes(cache) == 400 + 40


def test_tensors_in_lists_tuples_and_mappings_are_found():
    packed = (torch.zeros(4, dtype=torch.uint8), {"scale": torch.zeros(2), "axis": 0})
    cache = layer(layers=[layer(_quantized_keys=packed, values=[torch.zeros(1)])])
    assert cache_bytes(cache) == 4 + 8 + 4


def test_what_is_neither_key_nor_value_is_not_counted():
    cache = layer(layers=[layer(keys=torch.zeros(1), cumulative_length=torch.zeros(50))])
    assert cache_bytes(cache) == 4


# Peak memory ----------------------------------------------------------------------------------


@pytest.fixture
def meter() -> CpuMemory:
    meter = meter_for("cpu")
    if not meter.supported:
        pytest.skip("this system has no high-water mark that can be reset")
    meter.settle()
    return meter


def test_the_peak_sees_what_was_allocated_and_given_back(meter):
    meter.start()
    block = b"\1" * (50 * MB)
    del block
    peak, reserved = meter.peak()
    assert 49 * MB < peak < 100 * MB
    assert reserved is None


def test_the_peak_does_not_see_what_was_freed_before_it_started(meter):
    block = b"\1" * (50 * MB)
    del block
    meter.start()
    assert meter.peak()[0] < 25 * MB


def test_the_baseline_is_what_was_there_when_it_settled(meter):
    block = b"\1" * (50 * MB)
    meter.settle()
    meter.start()
    assert len(block) == 50 * MB
    assert meter.peak()[0] < 25 * MB


# Noise ----------------------------------------------------------------------------------------


def reading(wall: float = 0.0, busy: float = 0.0, own: float = 0.0, steal: float = 0.0) -> Reading:
    return Reading(wall, busy, steal, own, 0)


class Rests:
    """Takes one turn in some slices."""

    cpu_s, involuntary = 0.0, 0

    def __init__(self, slices: int) -> None:
        self._left = slices

    def ask(self, command: str, *_: object) -> object:
        if command == "begin":
            return None
        self._left -= 1
        return processes.RESTING if self._left else {"e2e_s": 1.0, "disturbed": False}


@pytest.mark.parametrize(("slices", "disturbed"), [(1, True), (4, False)])
def test_a_slot_in_slices_is_judged_by_all_of_its_windows_together(monkeypatch, slices, disturbed):
    monkeypatch.setattr(noise, "SHORTEST_WINDOW_S", 0)
    # A window of a second per slice, and others take 0.3 s of the first: too much of one, not of four.
    readings = iter([reading(), reading(), *(reading(n, 0.3) for n in range(1, 9))])
    monkeypatch.setattr(rounds.Watch, "read", lambda _: next(readings))
    takers = {"a": Rests(slices)}
    (slot,) = rounds.play(takers, ["a"], 1, rounds.Watch([]))
    assert (slot.get("slices", 1), slot["disturbed"]) == (slices, disturbed)


@pytest.mark.parametrize(
    ("later", "disturbed"),
    [
        (reading(10, busy=20, own=20), False),
        (reading(10, busy=10.5, own=10), False),
        (reading(10, busy=11.5, own=10), True),
        (reading(10, busy=10, own=10, steal=1.5), True),
        (reading(10, busy=9, own=10), False),
        (reading(0.1, busy=0.03), False),
    ],
)
def test_a_window_is_disturbed_when_others_took_a_tenth_of_a_core(later, disturbed):
    assert noise.disturbed(reading(), later) is disturbed


def test_a_busy_neighbour_is_noticed(child):
    neighbour = child("print(1, flush=True)\nwhile True: pass")
    neighbour.stdout.readline()
    before = noise.read()
    time.sleep(0.5)
    assert noise.disturbed(before, noise.read())


def test_own_work_is_not_counted_as_a_neighbours():
    before = noise.read()
    while noise.read().own_s - before.own_s < 0.3:
        sum(range(10_000))
    after = noise.read()
    total = after.busy_s - before.busy_s
    assert before.others_s(after) <= total - 0.25


def test_waiting_for_quiet_is_bounded(monkeypatch):
    monkeypatch.setattr(noise, "disturbed", lambda before, after: True)
    assert 0.1 <= noise.wait_for_quiet(0.1, window_s=0.01) < 5.0


def test_waiting_ends_with_the_first_quiet_window(monkeypatch):
    marks = iter([True, True, False, True])
    monkeypatch.setattr(noise, "disturbed", lambda before, after: next(marks))
    noise.wait_for_quiet(60.0, window_s=0.01)
    assert next(marks) is True


def test_no_wait_is_no_wait(monkeypatch):
    monkeypatch.setattr(noise, "read", None)
    noise.wait_for_quiet(0.0)


# Lock -----------------------------------------------------------------------------------------

_HOLDER = """
import sys
from pathlib import Path
from kvbench.measurement import lock
with lock.machine(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1] + ".left").touch()
"""


# Another user may not be able to read this interpreter: it becomes one when all is imported.
_WAITER = """
import getpass, os, sys
from pathlib import Path
from kvbench.errors import InputError
from kvbench.measurement import lock
os.setgroups([])
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)
os.chdir("/")
try:
    with lock.machine(Path(sys.argv[1])):
        print("held", flush=True)
except InputError as error:
    print(error, file=sys.stderr)
"""


@pytest.fixture
def let_go(monkeypatch):
    """Return a function: whoever waits for the lock tells this holder, at the first pause, to leave."""

    def let_go(holder: subprocess.Popen) -> list[float]:
        pauses: list[float] = []
        pause = time.sleep

        def sleep(seconds: float) -> None:
            if not pauses:
                holder.stdin.write("go\n")
                holder.stdin.flush()
            pauses.append(seconds)
            pause(seconds)

        monkeypatch.setattr(lock.time, "sleep", sleep)
        return pauses

    return let_go


def test_a_second_process_waits_until_the_first_has_finished(child, let_go, tmp_path):
    path = tmp_path / "lock"
    holder = child(_HOLDER, str(path))
    assert holder.stdout.readline() == "held\n"
    pauses = let_go(holder)
    with lock.machine(path, poll_s=0.01) as waited:
        assert Path(f"{path}.left").exists()
    assert waited >= sum(pauses) >= 0.01


def test_a_holder_that_is_killed_gives_the_machine_back(child, tmp_path):
    path = tmp_path / "lock"
    holder = child(_HOLDER, str(path))
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    with lock.machine(path, poll_s=0.01):
        assert not Path(f"{path}.left").exists()


def test_a_free_machine_is_held_without_waiting_and_given_back(tmp_path):
    for _ in range(2):
        with lock.machine(tmp_path / "lock", poll_s=60.0) as waited:
            assert waited < 30.0


def test_an_error_while_holding_gives_the_machine_back(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.machine(tmp_path / "lock"):
        _ = 1 / 0
    with lock.machine(tmp_path / "lock", poll_s=60.0) as waited:
        assert waited < 30.0


def test_a_lock_file_that_another_user_made_is_opened_without_creating(monkeypatch, tmp_path):
    """With fs.protected_regular, O_CREAT on another's file in a sticky folder is refused."""
    path = tmp_path / "lock"
    path.touch()
    real = os.open

    def protected(name: object, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT and Path(str(name)).exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "open", protected)
    with lock.machine(path) as waited:
        assert waited < 30.0


def test_who_waits_is_told_who_measures(child, let_go, tmp_path, caplog, capsys):
    path = tmp_path / "lock"
    holder = child(_HOLDER, str(path))
    assert holder.stdout.readline() == "held\n"
    let_go(holder)
    with caplog.at_level("INFO"), lock.machine(path, poll_s=0.01):
        pass
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("waiting for this machine: process ")
    assert str(Path.cwd()) in told
    assert capsys.readouterr().err == f"{told}\n"


def test_who_stops_waiting_leaves_the_name_of_who_measures(child, tmp_path, monkeypatch):
    path = tmp_path / "lock"
    holder = child(_HOLDER, str(path))
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(lock.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), lock.machine(path):
        pass
    assert path.read_text().startswith(f"process {holder.pid} of ")


def test_who_waited_for_a_file_that_was_removed_takes_the_new_one(child, tmp_path, monkeypatch):
    path, other = tmp_path / "lock", tmp_path / "new"
    holder = child(_HOLDER, str(path))
    assert holder.stdout.readline() == "held\n"
    other.touch()

    def replaced(_seconds: float) -> None:
        other.replace(path)
        holder.kill()
        holder.wait()

    monkeypatch.setattr(lock.time, "sleep", replaced)
    with lock.machine(path):
        assert path.read_text().startswith(f"process {os.getpid()} of ")


@pytest.mark.parametrize("kind", ["link", "second name", "pipe"])
def test_a_file_that_is_no_lock_is_refused_and_not_written(tmp_path, kind):
    kept, path = tmp_path / "kept", tmp_path / "lock"
    kept.write_text("worth keeping")
    if kind == "link":
        path.symlink_to(kept)
    elif kind == "second name":
        path.hardlink_to(kept)
    else:
        os.mkfifo(path)
    with pytest.raises(InputError, match=lock.VARIABLE) as refused, lock.machine(path):
        pass
    assert str(path) in str(refused.value)
    assert kept.read_text() == "worth keeping"


def test_a_lock_that_cannot_be_made_is_one_line_with_the_remedy(tmp_path):
    with (
        pytest.raises(InputError, match=f"nowhere/lock: .*set {lock.VARIABLE}"),
        lock.machine(tmp_path / "nowhere" / "lock"),
    ):
        pass


def test_all_users_of_a_machine_have_one_lock_whatever_their_temporary_folder(
    tmp_path, monkeypatch
):
    monkeypatch.delenv(lock.VARIABLE, raising=False)
    closed, shared = tmp_path / "closed", tmp_path / "shared"
    closed.mkdir(mode=0o755)
    shared.mkdir()
    shared.chmod(0o1777)
    for name in ("ana", "rui"):
        monkeypatch.setattr(lock.tempfile, "gettempdir", lambda name=name: str(tmp_path / name))
        assert lock.place([tmp_path / "missing", closed, shared]) == shared / lock.NAME
        assert lock.place([closed]) == tmp_path / name / lock.NAME


def test_a_variable_names_another_lock(tmp_path, monkeypatch):
    monkeypatch.setenv(lock.VARIABLE, str(tmp_path / "mine"))
    with lock.machine():
        assert (tmp_path / "mine").read_text().startswith(f"process {os.getpid()} of ")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user (root only)")
@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_a_lock_of_another_user_is_waited_for_and_what_it_leaves_does_no_harm(mode):
    """Who may not write another's file locks it; who may not read it is told what to do."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o1777)
        path = folder / lock.NAME
        with lock.machine(path):
            path.chmod(mode)
            waiter = subprocess.Popen(
                [sys.executable, "-c", _WAITER, str(path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(WORKFLOW)},
            )
            said = waiter.stderr.readline()
            if mode == 0o666:
                assert said.startswith(f"waiting for this machine: process {os.getpid()} of ")
                assert waiter.poll() is None
        out, rest = waiter.communicate(timeout=60)
        if mode == 0o666:
            assert (out, rest) == ("held\n", "")
        else:
            assert "belongs to another user and cannot be read" in said + rest


@pytest.mark.parametrize("readable", [True, False])
def test_a_lock_file_that_another_user_left_does_no_harm(monkeypatch, tmp_path, readable):
    path = tmp_path / "lock"
    path.touch()
    real = os.open
    monkeypatch.setattr(lock, "_MAKING_S", 0.0)

    def of_another(name: object, flags: int, *mode: int) -> int:
        if not readable or flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "open", of_another)
    if readable:
        with lock.machine(path) as waited:
            assert waited < 30.0
    else:
        with pytest.raises(InputError, match="cannot be read; ask for it"), lock.machine(path):
            pass


STAT = """cpu  400 0 0 900 0 0 0 50
cpu0 100 0 0 200 0 0 0 0
cpu1 300 0 0 700 0 0 0 50
intr 12
"""


@pytest.mark.parametrize(
    ("cores", "ticks"),
    [(None, (400, 50)), (frozenset({0}), (100, 0)), (frozenset({0, 1}), (400, 50))],
)
def test_only_the_cores_of_this_process_count_as_noise(cores, ticks):
    per_second = os.sysconf("SC_CLK_TCK")
    assert noise._busy(STAT, cores) == tuple(number / per_second for number in ticks)


# Neighbours on a GPU --------------------------------------------------------------------------


# In a container the driver gives the host's numbers, so that only how many there are means anything.
@pytest.mark.parametrize(
    ("pids", "count"), [([os.getpid()], 1), ([4_000_001], 1), ([4_000_001, 4_000_002], 2), ([], 0)]
)
def test_the_processes_on_a_gpu_are_counted_whatever_their_numbers(pids, count):
    neighbours = noise.GpuNeighbours.__new__(noise.GpuNeighbours)
    running = [SimpleNamespace(pid=pid) for pid in pids]
    neighbours._handle = object()
    neighbours._nvml = SimpleNamespace(nvmlDeviceGetComputeRunningProcesses=lambda _: running)
    assert neighbours.count() == count


def test_without_a_driver_to_ask_nothing_is_claimed(monkeypatch):
    neighbours = noise.GpuNeighbours.__new__(noise.GpuNeighbours)
    neighbours._handle = None
    assert neighbours.count() is None
