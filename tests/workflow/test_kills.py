"""A run that is killed again and again ends as if nothing had happened.

``make kill-test`` kills fifty times, which takes some ten minutes on a quiet machine; ``KVBENCH_KILLS`` and
``KVBENCH_KILL_SEED`` choose how often and when.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kvbench import checkout
from workflow_helpers import copy_repository, environment, unbooked

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc (Linux)"),
]

KILLS = int(os.environ.get("KVBENCH_KILLS", "3"))
SEED = int(os.environ.get("KVBENCH_KILL_SEED", "11"))
TINY = ("--configfile", "tests/workflow/tiny.yaml")
TARGETS = ("--", "tables", "results/figures/kv_memory.en.svg")
#: What is killed, and how. A killed group is a machine that lost its power.
WAYS = ("group", "snakemake", "cell", "interrupt", "terminate")
#: Seconds of work between two kills: from the first import on, and long enough that the run gets on.
SHORTEST_S, LONGEST_S = 1.0, 13.0
#: Seconds that a run goes on at most after one of its cells was killed; the first goes on to its end.
AFTER_CELL_S = 3.0


def command() -> list[str]:
    return [sys.executable, "-m", "snakemake", "--cores", "2", *TINY, *TARGETS]


def start(folder: Path) -> subprocess.Popen:
    with (folder / "run.log").open("ab") as output:
        return subprocess.Popen(
            command(),
            cwd=folder,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Where the tests run in the background, an interrupt would be ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def finish(folder: Path) -> subprocess.CompletedProcess:
    """Run to the end, with the machine's lock in the folder of the test as before."""
    return subprocess.run(
        command(),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )


def processes_in(folder: Path) -> dict[int, str]:
    """Every living process that works in the folder, or elsewhere for a run in it, with its command."""
    # No other run has this variable; it is set before a run's first process begins.
    lock = f"KVBENCH_LOCK={environment(folder)['KVBENCH_LOCK']}".encode()
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            here = (path / "cwd").readlink() == folder
            here = here or lock in (path / "environ").read_bytes().split(b"\0")
            if here and checkout._lives(int(path.name)):
                found[int(path.name)] = (
                    (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                )
    return found


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def kill(way: str, run: subprocess.Popen, folder: Path, after_cell_s: float) -> None:
    """Stop a run in one of the ways, and wait until nothing of it is left."""
    if way == "cell":
        scripts = [n for n, text in processes_in(folder).items() if ".snakemake/scripts/" in text]
        for number in scripts[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        # The others go on, as after a cell that the kernel ended.
        try:
            run.wait(timeout=after_cell_s)
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGTERM)
    elif way == "group":
        os.killpg(run.pid, signal.SIGKILL)
    elif way == "snakemake":
        os.kill(run.pid, signal.SIGKILL)
    elif way == "interrupt":
        os.killpg(run.pid, signal.SIGINT)
    else:
        os.kill(run.pid, signal.SIGTERM)
    run.wait(timeout=240)


def measured(folder: Path) -> dict[str, int]:
    """Every record that is there, with the moment at which it was written."""
    cells = (folder / "results" / "cells").rglob("*.json")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in cells}


def turns(folder: Path) -> dict[str, list]:
    """What every record of a block that is there has measured."""
    cells = (folder / "results/cells/kv").rglob("*.json")
    found = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in cells}
    return {name: record["turns"] for name, record in found.items() if record["status"] == "ok"}


def settled(folder: Path) -> dict[str, int]:
    """The records whose job Snakemake has booked as finished: whole, and not to be measured again."""
    begun = unbooked(folder)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", "--summary", *TINY, *TARGETS],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    # The summary calls a file without a booking up to date, too.
    booked = {row[0] for row in rows if row[-1] == "no update"} - begun
    return {name: moment for name, moment in measured(folder).items() if name in booked}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, list[str]]:
    """A checkout after a run that was killed many times and then ended; with what went wrong."""
    folder = (tmp_path_factory.mktemp("kills") / "clone").resolve()
    copy_repository(folder)
    draw, wrong, finished, before, written = random.Random(SEED), [], {}, {}, {}
    for number in range(KILLS):
        way = WAYS[number % len(WAYS)]
        run = start(folder)
        moment = draw.uniform(SHORTEST_S, LONGEST_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(timeout=moment)
        said = f"kill {number} ({way} after {moment:.1f} s)"
        if run.poll() is None:
            kill(way, run, folder, 240 if number < len(WAYS) else AFTER_CELL_S)
        if not wait_until(lambda: not processes_in(folder), 30):
            wrong.append(f"{said}: left {processes_in(folder)}")
        now = measured(folder)
        wrong += [
            f"{said}: {n} lost or measured twice" for n, t in finished.items() if now.get(n) != t
        ]
        # A record that was not booked is written once more: from the journal, with the same turns.
        have = turns(folder)
        wrong += [f"{said}: {n} measured twice" for n, t in written.items() if have.get(n, t) != t]
        written |= have
        if now != before:
            finished, before = settled(folder), now
        if run.returncode == 0:
            # Over before its kill: begin again, so that there is something to stop.
            for path in ("results", ".snakemake", "logs"):
                subprocess.run(["rm", "-rf", str(folder / path)], check=True)
            finished, before, written = {}, {}, {}
    done = finish(folder)
    assert done.returncode == 0, done.stdout[-6000:]
    now, have = measured(folder), turns(folder)
    wrong += [f"end: {n} lost or measured twice" for n, t in finished.items() if now.get(n) != t]
    wrong += [f"end: {n} lost or measured twice" for n, t in written.items() if have.get(n) != t]
    return folder, wrong


def test_nothing_finished_is_lost_or_measured_again_and_no_process_stays(killed):
    assert killed[1] == []


def test_no_half_made_file_lock_or_temporary_folder_stays(killed):
    folder, _ = killed
    assert list(checkout.leftovers(folder)) == []
    assert not list((folder / ".snakemake" / "locks").glob("*"))
    assert not [path for path in (folder / "results/journals").rglob("*") if path.is_file()]
    # The machine's lock is the kernel's, on a file that stays; the compiler keeps a cache per user.
    kept = {path.name for path in (folder.parent / "tmp").iterdir()}
    assert {name for name in kept if not name.startswith("torchinductor_")} <= {"machine.lock"}


def test_what_is_not_timed_is_as_in_a_run_that_nobody_stopped(killed, tmp_path):
    import pandas as pd

    folder, _ = killed
    whole = tmp_path / "whole"
    copy_repository(whole)
    done = finish(whole)
    assert done.returncode == 0, done.stdout[-6000:]
    name = "results/tables/README.md"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    keys = ["model", "scenario", "strategy", "replicate"]
    said = {}
    for run in (folder, whole):
        table = pd.read_csv(run / "results/tables/kv_summary.csv", keep_default_na=False)
        fixed = [c for c in ("status", "reason", "kv_bytes", "token_digest") if c in table]
        said[run] = table[[k for k in keys if k in table] + fixed].to_dict("records")
    assert said[folder] == said[whole]
    replies = "results/tables/kv_replies.csv"
    assert (folder / replies).read_bytes() == (whole / replies).read_bytes()
