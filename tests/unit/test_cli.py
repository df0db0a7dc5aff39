"""The command line: what it lists, what it refuses, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kvbench():
    """Run the command in a process of its own; its standard output is a pipe."""

    def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "kvbench", *arguments],
            cwd=cwd,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "workflow"),
                "NO_COLOR": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_help_names_every_command(kvbench):
    done = kvbench("--help")
    assert done.returncode == 0
    for name in ("list", "capacity", "proxy"):
        assert f" {name} " in done.stdout


def test_a_list_has_one_line_for_each_entry(kvbench):
    done = kvbench("list", "models")
    names = sorted(path.stem for path in (ROOT / "config" / "models").glob("*.yaml"))
    lines = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert lines == ["models", *names]


def test_everything_can_be_listed(kvbench):
    done = kvbench("list")
    assert done.returncode == 0, done.stderr
    for kind in ("scenarios", "models", "strategies", "studies", "figures", "claims", "machines"):
        assert f"\n{kind}" in f"\n{done.stdout}"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["shwo"], "'show'"),
        (["show"], "'record'"),
        (["doctor", "--strickt"], "--strict"),
        (["list", "colours"], "scenarios"),
        (["capacity", "--modl", "embedded"], "--memory"),
        (["proxy", "--ttl", "soon"], "--ttl"),
    ],
    ids=[
        "a misspelt command",
        "a missing argument",
        "a misspelt option",
        "an unknown value",
        "the planner's",
        "the proxy's",
    ],
)
def test_a_wrong_word_ends_in_one_line_that_names_the_right_one(kvbench, words, named):
    done = kvbench(*words)
    assert done.returncode == 2
    assert named in done.stderr
    assert "--help" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "",
        "advise",
        "capacity",
        "compare",
        "doctor",
        "import-scenarios",
        "list",
        "proxy",
        "show",
    ],
)
def test_the_help_of_a_command_fits_a_terminal_and_names_it(kvbench, command):
    done = kvbench(*command.split(), "--help", COLUMNS="80")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert f"kvbench {command}".strip() in done.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("kvbench ca", ["capacity"]),
        ("kvbench list m", ["models", "machines"]),
        ("kvbench advise --la", ["--language"]),
        ("kvbench capacity --m", ["--model", "--memory"]),
        ("kvbench proxy --second", ["--second-opinion", "--second-opinion-threshold"]),
        ("kvbench proxy x", []),
    ],
)
def test_a_shell_completes_commands_values_and_options(typed, offered):
    # What the lines that `--install-completion` writes for bash run at a press of the key.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'kvbench'; from kvbench.cli import main; main()",
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "workflow"),
            "_KVBENCH_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(typed.split()) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == offered, done.stderr


def test_without_a_word_the_help_is_shown(kvbench):
    done = kvbench()
    assert done.returncode == 0
    assert " doctor " in done.stdout


def test_the_commands_start_without_torch():
    program = "import sys, kvbench.cli; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT / "workflow")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False"]


def test_arguments_of_the_planner_reach_it(kvbench):
    done = kvbench("capacity", "--model", "nowhere", "--memory", "1GiB", "--tokens", "10")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_planners_help_says_what_the_check_does_and_what_it_answers(kvbench):
    done = kvbench("capacity", "--help", COLUMNS="200")
    assert done.returncode == 0
    said = " ".join(done.stdout.split())
    assert (
        "--check instead of planning, and without other options, hold the planner against" in said
    )
    assert "Exit status 0: each prediction is within one of what ran" in said
    assert all(name in said for name in ("--host-memory", "--workspace", "--bandwidth"))


def test_the_planners_check_stands_alone(kvbench):
    done = kvbench("capacity", "--check", "--memory", "80GiB")
    assert done.returncode == 2
    assert "leave other options out" in done.stderr and done.stderr.count("\n") == 1


def test_doctor_finds_this_machine_fit(kvbench):
    done = kvbench("doctor", COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pinned packages" in done.stdout


def test_doctor_says_how_to_get_latex_where_there_is_none(kvbench, tmp_path):
    done = kvbench("doctor", COLUMNS="400", PATH=str(tmp_path))
    line = next(line for line in done.stdout.splitlines() if " LaTeX " in line)
    assert line.startswith("missing")
    assert "apt install latexmk" in line
    assert done.returncode == 0


def test_doctor_notes_an_engine_that_is_not_installed_without_calling_it_missing(kvbench, tmp_path):
    done = kvbench("doctor", COLUMNS="400", KVBENCH_VLLM_PYTHON=str(tmp_path / "python"))
    line = next(line for line in done.stdout.splitlines() if " vLLM " in line)
    assert line.startswith("note")
    assert "make install-vllm" in line


def test_doctor_says_what_a_container_allows(monkeypatch):
    from kvbench.commands import doctor
    from kvbench.measurement import limits

    allowed = limits.Limits(quota_cores=1.5, cores="0-3", memory_bytes=2**29)
    monkeypatch.setattr(limits, "of_this_process", lambda: allowed)
    found = {one.subject: one for one in doctor._machine()}
    assert found["processors"].state == "note"
    assert "quota of 1.5 cores" in found["processors"].detail
    assert found["memory"].detail.endswith("this process may use 0.5")


def test_doctor_is_strict_when_asked(kvbench, tmp_path):
    assert kvbench("doctor", "--strict", PATH=str(tmp_path)).returncode == 1


def test_a_lock_file_is_read_as_far_as_its_markers_fit(tmp_path):
    from kvbench.commands import doctor

    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# words\na==1.0\nb==2.0 ; sys_platform == 'nowhere'\nc==3 ; python_version > '3'\n"
    )
    assert doctor.pinned(lock) == {"a": "1.0", "c": "3"}
    assert doctor.pinned(tmp_path / "absent") == {}


@pytest.fixture
def stored(tmp_path, make_record):
    """Write a kv record where a run would have it."""
    from kvbench import records

    def store(strategy: str, *arguments: object, **fields: object) -> Path:
        path = tmp_path / "results/cells/kv/cpu/tiny/talk" / strategy / "r1.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write(path, make_record(strategy, *arguments, **fields))
        return path

    return store


def test_a_record_is_shown_with_every_turn(kvbench, stored):
    done = kvbench("show", str(stored("dynamic", [[1.0, 2.0], [3.0, 4.0]])))
    assert done.returncode == 0, done.stderr
    assert "dynamic in" in done.stdout
    turns = done.stdout.split("turns (medians")[1].splitlines()
    numbers = [line.split()[0] for line in turns if line[:4].strip().isdigit()]
    assert numbers == ["1", "2"]


def test_beside_a_ratio_stands_what_it_would_have_found_and_whether_it_may_be_judged(
    kvbench, stored
):
    turns = [[1.0, 1.1] * 10]
    stored("dynamic", turns, block="b")
    path = stored("static", [[1.2, 1.3] * 10], block="b")
    assert "in 20 rounds; would have found" in kvbench("show", str(path)).stdout
    assert "no verdict" not in kvbench("show", str(path)).stdout
    stored("control", [[1.5, 1.6] * 10], block="b")
    assert "no verdict: the reference differs from itself" in kvbench("show", str(path)).stdout


def test_what_is_no_record_is_refused_in_one_line(kvbench, tmp_path):
    (tmp_path / "r1.json").write_text("{}")
    for path in (tmp_path / "r1.json", tmp_path / "absent.json", tmp_path):
        done = kvbench("show", str(path))
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert path.name in done.stderr


def test_a_file_that_never_was_a_record_is_not_to_be_deleted(kvbench, tmp_path):
    (tmp_path / "claims.yaml").write_text("claims: []")
    (tmp_path / "values.json").write_text('{"schema": "else/1"}')
    for name in ("claims.yaml", "values.json"):
        for command in (("show", name), ("compare", name, "other")):
            done = kvbench(*command, cwd=tmp_path)
            assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
            assert "no record" in done.stderr
            assert "delete" not in done.stderr


def test_a_record_is_not_compared_with_itself(kvbench, stored):
    one = str(stored("dynamic", [[1.0, 2.0], [3.0, 4.0]]))
    done = kvbench("compare", one, one)
    assert done.returncode == 2
    assert "the same on both sides" in done.stderr


def test_sizes_have_three_digits_and_a_unit():
    from kvbench.commands import show

    assert [show.size(n) for n in (None, 0, 1023, 1536, 1_232_896)] == [
        "-",
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.18 MiB",
    ]
