"""What stands around every script: one line for the user, the rest in the log, wherever it runs."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from kvbench import processes

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow" / "scripts"
PROGRAM = """
import sys
from types import SimpleNamespace
sys.path.insert(0, {scripts!r})
from _job import job
from kvbench.errors import InputError
with job(SimpleNamespace(log=[{log!r}])):
    {body}
"""


@pytest.fixture
def job(tmp_path):
    """Run a few lines inside a job, in a process of its own, and return it when it has ended."""

    def job(body: str, log: str = "logs/rule.log") -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM.format(scripts=str(SCRIPTS), log=log, body=body)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return job


def test_a_users_mistake_is_one_line_here_and_in_the_log(job, tmp_path):
    done = job('raise InputError("config/x.yaml: wrong")')
    assert done.returncode == 1
    assert done.stderr == "error: config/x.yaml: wrong\n"
    assert "Traceback" not in (tmp_path / "logs/rule.log").read_text()


def test_what_the_system_refuses_is_one_line_and_its_place_is_in_the_log(job, tmp_path):
    done = job(f'raise OSError({errno.EIO}, "Input/output error", "/dev/gpu")')
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "/dev/gpu" in line
    assert "logs/rule.log" in line
    assert "Traceback" in (tmp_path / "logs/rule.log").read_text()


def test_a_defect_of_the_program_keeps_its_traceback(job):
    done = job("1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_log_that_cannot_be_made_is_one_line(job, tmp_path):
    (tmp_path / "logs").write_text("a file where a folder should be")
    done = job("pass")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_adds_no_noise(job):
    done = job(
        'import logging; logging.getLogger("kvbench").info("x"); raise InputError("a: b")',
        log="/dev/full",
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: a: b"]


# Where it runs --------------------------------------------------------------------------------


def unset(monkeypatch, name):
    """Take a variable away; whatever the test puts there is gone afterwards, even where none was."""
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)


def test_a_user_without_a_name_gets_one(monkeypatch, tmp_path):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        unset(monkeypatch, name)

    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    processes.settle_in(tmp_path)
    assert os.environ["USER"] == f"user-{os.getuid()}"


@pytest.mark.parametrize("home", [None, "/nowhere/at/all"])
def test_without_a_home_folder_caches_go_into_the_checkout(monkeypatch, tmp_path, home):
    unset(monkeypatch, "HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME"):
        unset(monkeypatch, name)
    processes.settle_in(tmp_path)
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "cache")


def test_a_cache_that_the_user_chose_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/nowhere/at/all")
    monkeypatch.setenv("XDG_CACHE_HOME", "/chosen")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/chosen")
    monkeypatch.setenv("TRITON_HOME", "/chosen")
    processes.settle_in(tmp_path)
    assert os.environ["XDG_CACHE_HOME"] == "/chosen"
