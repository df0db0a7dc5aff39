"""One checkout, one run: what a killed run left, what is left alone, and jobs whose Snakemake is gone."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kvbench import checkout, processes
from kvbench.errors import InputError


@pytest.fixture(autouse=True)
def given_back(monkeypatch):
    """Give the locks back that a test takes, and keep its environment."""
    monkeypatch.setenv(processes.RUN, "")
    yield
    while checkout._held:
        os.close(checkout._held.pop())


@pytest.fixture
def left(tmp_path) -> Path:
    """A folder as a killed run leaves it."""
    for name in (
        ".snakemake/locks/0.output.lock",
        ".snakemake/scripts/tmpabc.draw.py",
        "results/cells/kv/.r1.json.x.part",
        "results/journals/.block.jsonl.new",
        "results/cells/kv/r1.json",
        "results/recorded/machine/.kept.part",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "results/inputs/.paper.part").mkdir(parents=True)
    return tmp_path


def signature(folder: Path) -> Path:
    """The file in which this process says that it works in a folder."""
    return folder / checkout._RUNS / f"{checkout._machine()}.{os.getpid()}"


def sign(folder: Path, machine: str, number: int = 12) -> Path:
    path = folder / checkout._RUNS / f"{machine}.{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"process {number} of ana on {machine} since 2030-01-02 10:00\n")
    return path


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_what_a_killed_run_left_is_cleared_and_its_lock_released(left):
    (told,) = checkout.enter(left)
    assert "its lock is released" in told
    assert files(left) == {
        ".snakemake/presence",
        str(signature(left).relative_to(left)),
        "results/cells/kv/r1.json",
        "results/recorded/machine/.kept.part",
    }
    assert not (left / "results/inputs/.paper.part").exists()


def test_the_temporary_folders_of_killed_snakemakes_are_removed_and_no_others(left):
    for name in ("snakemakeabc", "somebody"):
        (left / name).mkdir()
        checkout.note(left / name, left)
    checkout.enter(left)
    assert not (left / "snakemakeabc").exists()
    assert (left / "somebody").exists()


def test_a_run_signs_for_those_who_share_the_checkout_and_follows_no_link(left):
    (left / ".snakemake").chmod(0o750)
    (left / "kept").write_text("somebody's")
    signs = left / ".snakemake/runs"
    signs.mkdir(mode=0o777)
    (signs / f"{checkout._machine()}.{os.getpid()}").symlink_to(left / "kept")
    checkout._sign(left)
    assert signs.stat().st_mode & 0o777 == 0o750
    assert (left / "kept").read_text() == "somebody's"
    assert f"process {os.getpid()}" in (signs / f"{checkout._machine()}.{os.getpid()}").read_text()


@pytest.fixture
def strays(tmp_path, monkeypatch) -> Path:
    """A place for temporary files with what Snakemakes leave there, and what only looks like it."""
    place = tmp_path / "temporary"
    for name in ("snakemakeabcdefg1", "snakemakefull_one/source-cache", "snakemakemineown1"):
        (place / name).mkdir(parents=True)
    (place / "snakemake-tutorial").mkdir()
    (place / "snakemakefilename").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def test_the_folder_of_a_snakemake_killed_before_it_could_note_it_is_removed_if_empty(left, strays):
    checkout.enter(left, strays / "snakemakemineown1")
    assert {path.name for path in strays.iterdir()} == {
        "snakemakefull_one",
        "snakemakemineown1",
        "snakemake-tutorial",
        "snakemakefilename",
    }


def test_no_such_folder_is_removed_while_another_snakemake_lives_that_makes_them_there(strays):
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "snakemake"],
        env=os.environ | {"TMPDIR": str(strays)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        checkout._remove_strays(None)
        kept = (strays / "snakemakeabcdefg1").exists()
        other.communicate(b"\n")
    assert kept
    checkout._remove_strays(None)
    assert not (strays / "snakemakeabcdefg1").exists()


def test_a_private_folder_of_a_killed_job_is_removed_and_one_in_use_is_its_owner_s(
    left, monkeypatch
):
    monkeypatch.chdir(left)
    kept = checkout.scratch(left)
    assert kept.stat().st_mode & 0o777 == 0o700
    assert kept in checkout.leftovers(left)
    checkout.enter(left)
    assert not kept.exists()


def test_a_private_folder_needs_no_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkout.scratch(tmp_path).is_dir()
    assert not (tmp_path / ".snakemake").exists()


def test_beside_another_snakemake_nothing_is_touched_and_it_is_named(left):
    other = os.open(left / ".snakemake/presence", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_SH)
    sign(left, checkout._machine(), os.getppid())
    sign(left, checkout._machine(), 2**22 + 1)
    before = files(left)
    (told,) = checkout.enter(left)
    assert told.startswith(f"This checkout is in use by process {os.getppid()} of ana on ")
    assert str(2**22 + 1) not in told
    assert files(left) == before | {str(signature(left).relative_to(left))}
    os.close(other)


def test_the_lock_of_another_host_stays_and_the_remedy_is_said(left):
    theirs = sign(left, "elsewhere")
    (told,) = checkout.enter(left)
    assert "held by process 12 of ana on elsewhere since 2030-01-02 10:00; wait until" in told
    assert told.endswith("snakemake --unlock")
    assert (left / ".snakemake/locks/0.output.lock").exists()
    assert (left / "results/cells/kv/.r1.json.x.part").exists()
    assert theirs.exists()


def test_a_run_of_this_host_beside_one_of_another_does_not_hide_it(left):
    """Both ran jobs, ours was killed: a lock may still be theirs."""
    sign(left, "elsewhere")
    sign(left, checkout._machine(), 2**22 + 1)
    (told,) = checkout.enter(left)
    assert "ana on elsewhere" in told
    assert (left / ".snakemake/locks/0.output.lock").exists()


def test_after_unlocking_by_hand_the_run_of_another_host_is_forgotten(left):
    theirs = sign(left, "elsewhere")
    (left / ".snakemake/locks/0.output.lock").unlink()
    assert checkout.enter(left) == []
    assert not theirs.exists()
    assert not (left / "results/cells/kv/.r1.json.x.part").exists()


def test_temporary_folders_of_another_machine_stay_noted_for_it(left, monkeypatch):
    (left / "snakemakeabc").mkdir()
    with monkeypatch.context() as there:
        there.setattr(socket, "gethostname", lambda: "elsewhere")
        checkout.note(left / "snakemakeabc", left)
    checkout.enter(left)
    assert (left / "snakemakeabc").exists()
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert left / "snakemakeabc" in checkout.leftovers(left)


_RUN = """
import sys
from pathlib import Path
from kvbench import checkout, processes
checkout.enter(Path(sys.argv[1]))
print(len(list((Path(sys.argv[1]) / ".snakemake/runs").iterdir())))
"""


def test_a_run_says_that_it_is_here_as_long_as_it_is(tmp_path):
    library = str(Path(checkout.__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": library},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"
    assert list((tmp_path / ".snakemake/runs").iterdir()) == []


def test_a_run_that_ended_in_order_leaves_nothing_to_tell(tmp_path):
    assert checkout.enter(tmp_path) == []


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / ".snakemake").touch()
    assert checkout.enter(tmp_path) == []


_JOB = """
import subprocess, sys
from kvbench import checkout, processes
from kvbench.errors import InputError
checkout.follow()
job = subprocess.Popen([sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"])
print(job.pid, flush=True)
job.wait()
"""


@pytest.mark.parametrize("closed", [".snakemake", ".snakemake/locks"])
def test_the_folder_of_another_user_is_one_line_with_the_remedy(left, monkeypatch, closed):
    # A test may run as root, whom no folder keeps out.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != left / closed)
    with pytest.raises(
        InputError, match=f"{closed}: belongs to .*; work in a checkout of your own"
    ):
        checkout.enter(left)
    assert (left / ".snakemake/locks/0.output.lock").exists()


def test_another_user_can_take_part_in_the_lock_of_a_checkout(tmp_path, monkeypatch):
    before = os.umask(0o077)
    try:
        checkout.enter(tmp_path)
    finally:
        os.umask(before)
    presence = tmp_path / checkout._PRESENCE
    assert presence.stat().st_mode & 0o777 == 0o666
    # An older file may be read only; it is locked all the same, so that nobody clears under us.
    opened = os.open

    def refuses_writing(path, flags, *rest):
        if flags & os.O_RDWR:
            raise PermissionError
        return opened(path, flags, *rest)

    while checkout._held:
        os.close(checkout._held.pop())
    monkeypatch.setattr(os, "open", refuses_writing)
    checkout.enter(tmp_path)
    monkeypatch.undo()
    with presence.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="the kernel does not say when a process ends"
)
def test_a_job_and_what_it_started_end_with_their_snakemake():
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    library = str(Path(checkout.__file__).resolve().parents[1])
    job = subprocess.Popen(
        [sys.executable, "-c", _JOB],
        env={
            **os.environ,
            processes.RUN: f"{socket.gethostname()}:{owner.pid}",
            "PYTHONPATH": library,
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = {job.stdout.readline().strip() for _ in range(2)}
    below = int(next(line for line in lines if line.isdigit()))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    job.wait(timeout=30)
    deadline = time.monotonic() + 30
    while checkout._lives(below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not checkout._lives(below)
    job.stdout.close()
