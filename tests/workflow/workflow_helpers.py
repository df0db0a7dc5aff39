"""What the tests of the workflow share: a fresh copy of the repository, and running Snakemake."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def listed_files() -> list[str]:
    """Every file that a commit of the present state would hold."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def copy_repository(target: Path) -> None:
    """Copy the repository as a fresh clone would have it; all files are new."""
    for name in listed_files():
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, destination)


def environment(folder: Path) -> dict[str, str]:
    """Variables of a run of its own: its cache, its temporary files and its lock of the machine.

    With the lock that all checkouts share, a run would wait for whoever else measures on this machine.
    """
    temporary = folder.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(temporary),
        "KVBENCH_LOCK": str(temporary / "machine.lock"),
        "XDG_CACHE_HOME": str(folder / ".cache"),
    }


def run_snakemake(
    folder: Path, *arguments: str, timeout: float = 420
) -> subprocess.CompletedProcess:
    """Run Snakemake in a folder; standard error is part of the output."""
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def unbooked(folder: Path) -> set[str]:
    """Files whose job Snakemake had begun, and not booked: its next start deletes them."""
    marks = (folder / ".snakemake" / "incomplete").rglob("*")
    return {base64.urlsafe_b64decode(path.name).decode() for path in marks if path.is_file()}
