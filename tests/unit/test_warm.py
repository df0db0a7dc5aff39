"""The process that waits with the libraries: it serves the jobs of its run, and changes nothing of them.

Most tests use a copy of the few modules that take part, with libraries that are empty, and work that
says where it was done; the last ones use the real ones.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvbench.inputs import configuration
from kvbench.measurement import warm
from talk import TALK, write_prompts

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "pidfd_open"),
    reason="forks where Linux can tell of ends",
)

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
#: The modules that take part.
COPIED = (
    *("kvbench/__init__.py", "kvbench/errors.py", "kvbench/processes.py", "scripts/_job.py"),
    *("kvbench/measurement/__init__.py", "kvbench/measurement/warm.py"),
)
#: In place of the module that knows how to import the real libraries.
STARTUP = """
def import_libraries(name):
    import torch
"""
WORK = """
import ctypes, logging, os, signal, sys, time
from pathlib import Path
from kvbench import processes
from kvbench.errors import InputError

def where():
    return {"process": os.getpid(), "parent": os.getppid(), "folder": os.getcwd(), "path": sys.path}

def say():
    logging.getLogger("kvbench").info("in the log")
    print("on standard output")
    os.write(2, b"on standard error")

def mistake():
    raise InputError("config/x.yaml: wrong")

def defect():
    return 1 / 0

class Stubborn(Exception):
    def __reduce__(self):
        raise TypeError("cannot be pickled")

def stubborn():
    raise Stubborn("hard to tell")

def leave():
    sys.exit(7)

def die(number):
    os.kill(os.getpid(), number)

def alone_on_the_processor():
    waiting = os.getppid()
    while Path(f"/proc/{waiting}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)
    clock = (~waiting << 3) | 2
    before, end = time.clock_gettime(clock), time.process_time() + 0.05
    while time.process_time() < end:
        pass
    return time.clock_gettime(clock) - before

def study(ready, folder):
    with processes.sigterm_as_exit():
        try:
            with open(ready, "w") as stream:
                stream.write(str(os.getpid()))
            while True:
                signal.pause()
        finally:
            time.sleep(0.2)
            os.rmdir(folder)

def block(ready, go_on):
    block = os.getpid()
    cell = os.fork()
    if not cell:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        while os.getppid() == block:
            signal.pause()
        os._exit(0)
    with open(ready, "w") as stream:
        stream.write(f"{block} {os.getppid()} {cell}")
    with open(go_on) as stream:
        stream.read()
    os.kill(cell, signal.SIGKILL)
    return "whole"
"""
JOB = """
import json, os, resource, sys
from types import SimpleNamespace
sys.path.insert(0, "scripts")
from _job import job
from kvbench.measurement import warm
with job(SimpleNamespace(log=["job.log"])):
    {before}
    print(json.dumps(warm.call("kvbench.measurement.work", {function!r}, *{arguments!r}, **{how!r})))
"""
#: In place of Snakemake: starts a job for every line, and says how it ended.
OWNER = """
import json, signal, subprocess, sys
# Where the tests run in the background, an interrupt would be ignored.
signal.signal(signal.SIGINT, signal.SIG_DFL)
for line in sys.stdin:
    told = json.loads(line)
    job = subprocess.Popen(**told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    print(job.pid, flush=True)
    said = job.communicate()
    print(json.dumps([job.returncode, *said]), flush=True)
"""
#: Seconds after which a process that should be gone is called alive.
PATIENCE_S = 30


class Run:
    """A run with its own copy of the library, whose jobs are children of a process that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner = subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def log(self) -> str:
        return (self.folder / "job.log").read_text()

    def begin(self, command: list[str], **variables: str) -> int:
        """Start a job and return its number."""
        run = f"{socket.gethostname()}:{self.owner.pid}"
        env = {**os.environ, "KVBENCH_RUN": run, **variables}
        told = {"args": command, "cwd": str(self.folder), "env": env}
        self.owner.stdin.write(f"{json.dumps(told)}\n")
        self.owner.stdin.flush()
        return int(self.owner.stdout.readline())

    def end(self) -> subprocess.CompletedProcess:
        """Wait for the job that was started last."""
        return subprocess.CompletedProcess("job", *json.loads(self.owner.stdout.readline()))

    def start(
        self,
        function: str,
        *arguments: object,
        before: str = "",
        alone: bool = False,
        libraries: str = "models",
        **variables: str,
    ) -> int:
        """Start a job that calls a function of the work."""
        how = {"alone": alone, "libraries": libraries}
        program = JOB.format(before=before, function=function, arguments=arguments, how=how)
        return self.begin([sys.executable, "-c", program], **variables)

    def job(
        self, function: str, *arguments: object, **options: object
    ) -> subprocess.CompletedProcess:
        """Run a job to its end."""
        self.start(function, *arguments, **options)
        return self.end()

    def where(self, **options: object) -> dict:
        """Who did the work of a job."""
        done = self.job("where", **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def block(self) -> tuple[int, dict[str, int], Path]:
        """Start a job whose work waits with a process of its own; their numbers, and what lets it go on."""
        ready, go_on = self.folder / "ready", self.folder / "go_on"
        for path in (ready, go_on):
            path.unlink(missing_ok=True)
            os.mkfifo(path)
        job = self.start("block", str(ready), str(go_on))
        numbers = map(int, ready.read_text().split())
        return job, dict(zip(("block", "waiting", "cell"), numbers, strict=True)), go_on

    def study(self) -> tuple[int, int, Path]:
        """Start a job whose work has a folder to remove; the job's number, the work's, and the folder."""
        ready, scratch = self.folder / "ready", self.folder / "scratch"
        os.mkfifo(ready)
        scratch.mkdir()
        job = self.start("study", str(ready), str(scratch), libraries="caches")
        return job, int(ready.read_text()), scratch

    def close(self) -> None:
        self.owner.kill()
        self.owner.wait()
        self.owner.stdin.close()
        self.owner.stdout.close()


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    folder = tmp_path / "workflow"
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(WORKFLOW / name, folder / name)
    (folder / "kvbench/measurement/startup.py").write_text(STARTUP)
    (folder / "kvbench/measurement/work.py").write_text(WORK)
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").touch()
    run = Run(folder)
    yield run
    run.close()


def gone(process: int) -> bool:
    """Whether a process ends soon, or has."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], PATIENCE_S)[0])
    finally:
        os.close(handle)


# Serving ---------------------------------------------------------------------------------------


def test_all_jobs_of_a_run_work_in_forks_of_one_process(run):
    first, second = run.where(), run.where()
    assert first["parent"] == second["parent"] != run.owner.pid
    assert first["process"] != second["process"]
    assert "alone" not in run.log


def test_caches_and_models_have_a_waiting_process_each(run):
    models, caches = run.where(), run.where(libraries="caches")
    assert run.owner.pid not in {models["parent"], caches["parent"]}
    assert models["parent"] != caches["parent"] == run.where(libraries="caches")["parent"]


def test_the_work_is_done_where_the_job_is_and_finds_what_the_job_finds(run):
    served, alone = run.where(), run.where(alone=True)
    assert served["folder"] == str(run.folder)
    assert served["path"] == alone["path"]


def test_what_the_work_says_goes_where_the_job_says_it(run):
    done = run.job("say")
    assert done.stdout == "on standard output\nnull\n"
    assert done.stderr == "on standard error"
    assert run.log.endswith("INFO kvbench: in the log\n")


def test_code_that_was_edited_between_two_jobs_is_used(run):
    run.where()
    (run.folder / "kvbench/measurement/work.py").write_text("def where(): return 'edited'")
    assert run.where() == "edited"


def test_an_edit_of_what_the_waiting_process_runs_itself_needs_another_one(run):
    first = run.where()["parent"]
    (run.folder / "kvbench/measurement/startup.py").write_text(f"{STARTUP}\n# edited")
    second = run.where()["parent"]
    assert second not in {first, run.owner.pid}


def test_it_takes_no_processor_while_a_job_works(run):
    assert json.loads(run.job("alone_on_the_processor").stdout) == 0


def test_it_holds_nothing_of_the_job_that_started_it(run):
    waiting = Path("/proc", str(run.where()["parent"]))
    held = {str(path.readlink()).partition(":")[0] for path in (waiting / "fd").iterdir()}
    assert held <= {"/dev/null", "socket", "anon_inode"}
    assert (waiting / "cwd").readlink() == Path("/")
    assert os.getsid(int(waiting.name)) not in {os.getsid(0), os.getsid(run.owner.pid)}


# How work ends ---------------------------------------------------------------------------------


def test_a_users_mistake_is_one_line(run):
    done = run.job("mistake")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: config/x.yaml: wrong\n"
    assert "Traceback" not in run.log


def test_a_defect_shows_where_in_the_work_it_is(run):
    done = run.job("defect")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "return 1 / 0" in done.stderr


def test_an_error_that_cannot_be_sent_is_told_in_words(run):
    done = run.job("stubborn")
    assert done.returncode == 1
    assert "hard to tell" in done.stderr


def test_an_exit_status_is_the_jobs(run):
    assert run.job("leave").returncode == 7


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_that_ends_the_work_ends_the_job(run, number):
    assert run.job("die", int(number)).returncode == -number


# Ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_ended_leaves_no_process_at_work(run, number):
    job, numbers, _ = run.block()
    os.kill(job, number)
    assert run.end().returncode != 0
    assert gone(numbers["block"])
    assert gone(numbers["cell"])
    assert run.where()["parent"] == numbers["waiting"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_asked_to_end_ends_after_its_work_has_cleaned_up(run, number):
    job, _, scratch = run.study()
    os.kill(job, number)
    assert run.end().returncode != 0
    assert not scratch.exists()


def test_work_cleans_up_after_a_job_that_was_killed(run):
    job, work, scratch = run.study()
    os.kill(job, signal.SIGKILL)
    assert run.end().returncode == -signal.SIGKILL
    assert gone(work)
    assert not scratch.exists()


def test_work_cleans_up_after_a_snakemake_that_was_killed(run):
    _, work, scratch = run.study()
    run.owner.kill()
    assert gone(work)
    assert not scratch.exists()


def test_nothing_outlives_the_snakemake_that_was_killed(run):
    _, numbers, _ = run.block()
    run.owner.kill()
    assert all(map(gone, numbers.values()))


def test_a_waiting_process_ends_with_its_snakemake(run):
    waiting = run.where()["parent"]
    run.owner.stdin.close()
    assert gone(waiting)


def test_work_goes_on_when_the_waiting_process_is_killed(run):
    _, numbers, go_on = run.block()
    os.kill(numbers["waiting"], signal.SIGKILL)
    assert gone(numbers["waiting"])
    go_on.write_text("now")
    assert run.end().stdout == '"whole"\n'


def test_work_that_ends_unseen_is_an_error_of_the_job(run):
    _, numbers, _ = run.block()
    os.kill(numbers["waiting"], signal.SIGKILL)
    assert gone(numbers["waiting"])
    os.kill(numbers["block"], signal.SIGKILL)
    done = run.end()
    assert done.returncode == 1
    assert "nobody says how it ended" in done.stderr


def test_after_it_was_killed_the_next_job_starts_another(run):
    first = run.where()["parent"]
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    assert run.where()["parent"] not in {first, run.owner.pid}


# Alone -----------------------------------------------------------------------------------------


def test_libraries_that_cannot_be_imported_leave_the_job_alone(run):
    (run.folder / "torch/__init__.py").write_text("1 / 0")
    assert run.where()["parent"] == run.owner.pid
    assert "working alone: " in run.log


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ("os.environ['OMP_NUM_THREADS'] = '7'", "variables"),
        ("os.umask(0o077)", "rights"),
        ("os.nice(3)", "priority"),
        ("resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", "limits"),
        ("os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})", "processors"),
    ],
)
def test_a_job_in_other_circumstances_works_alone_and_says_in_which(run, before, told):
    if told == "processors" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs a second processor")
    run.where(before="resource.setrlimit(resource.RLIMIT_CORE, (1, 1))")
    assert run.where(before=before)["parent"] == run.owner.pid
    assert f"other {told}" in run.log or f", {told}" in run.log


@pytest.mark.parametrize(
    "variables",
    [
        {"KVBENCH_WARM": "0"},
        {"KVBENCH_RUN": ""},
        {"KVBENCH_RUN": f"another-machine:{os.getpid()}"},
    ],
    ids=["switched off", "no run", "another machine"],
)
def test_without_a_snakemake_of_its_own_a_job_works_alone(run, variables):
    assert run.where(**variables)["parent"] == run.owner.pid


def test_a_job_takes_no_process_for_its_snakemake_that_is_not_above_it(run):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        found = run.where(KVBENCH_RUN=f"{socket.gethostname()}:{other.pid}")
    assert found["parent"] == run.owner.pid


def test_a_job_that_asks_for_it_works_alone(run):
    assert run.where(alone=True)["parent"] == run.owner.pid


def test_the_other_end_of_another_user_is_known(monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not warm._other_user(ours)
        monkeypatch.setattr(os, "getuid", lambda: 54321)
        assert warm._other_user(ours)


def test_other_libraries_have_another_address():
    assert warm._address(1, "2", "models") != warm._address(1, "2", "caches")


@pytest.mark.parametrize("name", ["executable", "version"])
def test_another_interpreter_has_another_address(monkeypatch, name):
    before = warm._address(1, "2", "models")
    monkeypatch.setattr(sys, name, "another")
    assert warm._address(1, "2", "models") != before


def test_a_later_snakemake_of_the_same_number_has_another_address():
    assert warm._address(1, "2", "models") != warm._address(1, "3", "models")


# A block ---------------------------------------------------------------------------------------

BLOCK = """
import json, logging, os, sys
sys.path.insert(0, {workflow!r})
logging.basicConfig(filename="block.log", level=logging.INFO, force=True)
from kvbench.measurement import warm
warm.call("kvbench.measurement.job", "measure", *json.loads({work!r}))
"""
IMPORTED = """
import json, sys
sys.path.insert(0, {workflow!r})
{work}
print(*(name for name in sys.modules if not name.startswith("kvbench")))
"""
WARM = "from kvbench.measurement import startup, warm; startup.import_libraries('models')"
ALONE = """
from kvbench.measurement import job, processes
def fork(*_): raise SystemExit
processes.fork = fork
try: job.measure(*json.loads({work!r}))
except SystemExit: pass
"""
#: What two measurements of one cell differ in.
TIMES = {
    "e2e_s",
    "ttft_s",
    "itl_s",
    "disturbed",
    "started_at",
    "wall_s",
    "probe_s",
    "half_width",
} | {*("control_ratio", "peak_memory_bytes", "noise", "main_cpu", "seconds")}


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return list(map(without_times, value)) if isinstance(value, list) else value


class Work:
    """What the job of a small block is given."""

    def __init__(self, folder: Path, model: Path, facts: dict) -> None:
        self.folder = folder
        write_prompts(folder / "prompts.json", model)
        (folder / "cpu.json").write_text(json.dumps(facts))
        experiment = {
            "name": "test",
            "models": ["tiny"],
            "scenarios": ["talk"],
            "strategies": ["none", "dynamic"],
            "turns": 2,
            "max_new_tokens": 4,
            "max_rounds": 2,
            "budget_s": 600,
        }
        config = configuration.fill(
            {"kv": {"experiments": [experiment], "quiet_wait_s": 0}}, "test"
        )
        planned = configuration.plan_kv(config, {"talk": TALK}, {"tiny": {}}, "test")
        self.plan = next(iter(planned.values())).as_dict()
        self.files = {
            "model": str(model),
            "prompts": str(folder / "prompts.json"),
            "environment": str(folder / "cpu.json"),
        }

    def given(self, name: str) -> str:
        """The arguments of a job whose records and journal have a folder of their own."""
        files = self.files | {"journal": str(self.folder / name / "journal.jsonl")}
        outputs = [str(self.folder / name / f"{cell}.json") for cell in self.plan["cells"]]
        code = dict.fromkeys(self.plan["cells"], "0" * 16)
        return json.dumps([self.plan, files, code, 1, outputs])

    def records(self, name: str) -> dict[str, dict]:
        return {
            cell: json.loads((self.folder / name / f"{cell}.json").read_text())
            for cell in self.plan["cells"]
        }


@pytest.fixture
def work(tmp_path, tiny_folder, facts) -> Work:
    return Work(tmp_path, tiny_folder, facts)


def test_a_record_differs_in_nothing_but_times(tmp_path, work):
    run, lock = Run(tmp_path), str(tmp_path / "machine.lock")
    try:
        for name, switch in (("alone", "0"), ("first", "1"), ("second", "1")):
            program = BLOCK.format(workflow=str(WORKFLOW), work=work.given(name))
            run.begin([sys.executable, "-c", program], KVBENCH_WARM=switch, KVBENCH_LOCK=lock)
            done = run.end()
            assert done.returncode == 0, done.stderr
    finally:
        run.close()
    expected = without_times(work.records("alone"))
    assert without_times(work.records("first")) == expected
    assert without_times(work.records("second")) == expected
    log = (tmp_path / "block.log").read_text()
    assert log.count("forked from the process that waits with the libraries") == 2


def imported(work: str, lock: Path) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(workflow=str(WORKFLOW), work=work)],
        env={**os.environ, "KVBENCH_LOCK": str(lock)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].split())


def test_what_is_imported_beforehand_is_what_a_block_has_imported_when_it_forks(tmp_path, work):
    lock = tmp_path / "machine.lock"
    beforehand = imported(WARM, lock)
    by_the_block = imported(ALONE.format(work=work.given("alone")), lock)
    assert beforehand <= by_the_block
    assert {name.partition(".")[0] for name in by_the_block - beforehand} <= {"encodings"}


# A cell of a study -----------------------------------------------------------------------------

STUDY = """
import json, sys
sys.path[:0] = [{workflow!r}, {scripts!r}]
from types import SimpleNamespace
from _job import job
from kvbench.measurement import warm
with job(SimpleNamespace(log=["study.log"])):
    found = warm.call({module!r}, {function!r}, *{arguments!r}, libraries={libraries!r})
    print(json.dumps(found))
"""
#: What a study finds when it begins to measure.
FOUND = """
import gc, random, sys
from kvbench.studies.measuring import _cell
#: Of Python, and of what only starts the work.
LEFT_OUT = {*sys.stdlib_module_names, "__mp_main__", "_job"}
STARTING = "kvbench.measurement.warm"

def found(study, libraries):
    _cell._import(study, libraries)
    return {
        "modules": sorted(
            name
            for name in sys.modules
            if name.partition(".")[0] not in LEFT_OUT and name != STARTING
        ),
        "frozen": gc.get_freeze_count() > len(gc.get_objects()),
        "collects": [gc.isenabled(), *gc.get_threshold()],
        "draw": random.random(),
    }
"""


def of_a_study(
    run: Run, module: str, function: str, *arguments: object, libraries: str, **variables: str
) -> object:
    """What a job of a study says, and that its log says where the work was done."""
    places = {"workflow": str(WORKFLOW), "scripts": str(WORKFLOW / "scripts")}
    asked = {"module": module, "function": function, "arguments": arguments, "libraries": libraries}
    variables = {
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2"),
        "PYTHONPATH": str(run.folder),
        **variables,
    }
    run.begin([sys.executable, "-c", STUDY.format(**places, **asked)], **variables)
    done = run.end()
    assert done.returncode == 0, done.stderr
    forked = "forked from the process" in (run.folder / "study.log").read_text()
    assert forked == (variables[warm.VARIABLE] == "1")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def real(tmp_path) -> Iterator[Run]:
    """A run with the library itself."""
    run = Run(tmp_path)
    yield run
    run.close()


@pytest.mark.parametrize(("study", "libraries"), [("expiry", "caches"), ("semantic", "models")])
def test_a_study_begins_to_measure_with_the_same_around_it(real, study, libraries):
    (real.folder / "asked.py").write_text(FOUND)
    alone, forked, again = (
        of_a_study(real, "asked", "found", study, libraries, libraries=libraries, KVBENCH_WARM=warm)
        for warm in ("0", "1", "1")
    )
    # Random numbers that nobody seeded are others in every process.
    assert len({found.pop("draw") for found in (alone, forked, again)}) == 3
    assert forked["modules"] == alone["modules"]
    assert forked["frozen"] and alone["frozen"]
    assert forked["collects"] == alone["collects"]


@pytest.mark.parametrize(
    ("study", "name"),
    [("eviction", "anomaly"), ("response_cache", "key"), ("resilience", "errors")],
)
def test_a_record_of_a_study_differs_in_nothing_but_times(real, facts, study, name):
    (real.folder / "cpu.json").write_text(json.dumps(facts))
    planned = configuration.plan_app(configuration.fill({}, "test"), {"embedded": {}}, "test")
    planned = planned[study][name]
    cell = {
        **{"study": study, "cell": name, "factors": dict(planned.factors), "timed": True},
        **{"seed": 7, "server_url": None, "code_digest": "0" * 16, "threads": 2},
        **{"quiet_wait_s": 0, "libraries": planned.libraries},
    }
    found = {}
    for switch in ("0", "1"):
        path = real.folder / f"{switch}.json"
        of_a_study(
            *(real, "kvbench.studies.measuring._cell", "measure", str(path)),
            *({"environment_file": str(real.folder / "cpu.json")}, cell),
            libraries=planned.libraries,
            KVBENCH_WARM=switch,
            KVBENCH_LOCK=str(real.folder / "machine.lock"),
        )
        found[switch] = json.loads(path.read_text())
    assert found["0"]["status"] == "ok"
    assert without_times(found["1"]) == without_times(found["0"])
