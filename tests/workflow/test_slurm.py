"""The DAG on a Slurm cluster of one machine, through ``profiles/slurm``: retried, cancelled, resumed.

On demand (``make slurm-test``, as root): it starts munged, slurmctld and slurmd from Debian's packages
``munge slurmctld slurmd slurm-client`` in a private folder, and ends them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvbench import processes
from workflow_helpers import copy_repository

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
#: Where the commands inside a job look: the executor takes every SLURM_ variable out of its jobs.
SYSTEM_CONF = Path("/etc/slurm/slurm.conf")
TINY = ("--configfile", "tests/workflow/tiny.yaml")


def lacking() -> str | None:
    """Why no cluster can be started here."""
    if os.environ.get("KVBENCH_SLURM") != "1":
        return "on demand: make slurm-test"
    missing = [name for name in NEEDED if not shutil.which(name, path=tools())]
    if missing:
        return (
            f"not installed: {', '.join(missing)} (apt install munge slurmctld slurmd slurm-client)"
        )
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs as their users"
    if SYSTEM_CONF.exists():
        return f"{SYSTEM_CONF} is there: this machine belongs to a cluster"
    try:
        import snakemake_executor_plugin_slurm  # noqa: F401
    except ImportError:
        return "snakemake-executor-plugin-slurm is not installed"
    return None


def tools() -> str:
    """Where commands are looked for; daemons lie in folders that users do not search."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])


pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(bool(lacking()), reason=str(lacking())),
]


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """Slurm with the partitions cpu and gpu on this machine; gives the folder it lives in."""
    place = tmp_path_factory.mktemp("slurm")
    place.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    controller, node = free_ports(2)
    key, bus = place / "munge.key", place / "munge.socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for name in ("state", "spool"):
        (place / name).mkdir()
    conf = place / "slurm.conf"
    conf.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={bus}
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={place / "state"}
SlurmdSpoolDir={place / "spool"}
SlurmctldPidFile={place / "slurmctld.pid"}
SlurmdPidFile={place / "slurmd.pid"}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MinJobAge=600
KillWait=5
SchedulerParameters=sched_interval=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=70000 Gres=gpu:1 State=UNKNOWN
PartitionName=cpu Nodes=n1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=gpu Nodes=n1 MaxTime=INFINITE State=UP OverSubscribe=NO
"""
    )
    # A device that is only counted: nothing here computes on it.
    (place / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    munged = [
        *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={bus}"),
        *(f"--pid-file={place / 'munge.pid'}", f"--log-file={place / 'munged.log'}"),
        f"--seed-file={place / 'munge.seed'}",
    ]
    with contextlib.ExitStack() as stack:
        SYSTEM_CONF.parent.mkdir(exist_ok=True)
        # What a killed test left points to a folder that is gone.
        SYSTEM_CONF.unlink(missing_ok=True)
        SYSTEM_CONF.symlink_to(conf)
        stack.callback(SYSTEM_CONF.unlink)
        for command in (
            munged,
            ["slurmctld", "-D", "-c", "-f", str(conf)],
            ["slurmd", "-D", "-N", "n1", "-f", str(conf)],
        ):
            output = stack.enter_context((place / f"{command[0]}.out").open("wb"))
            found = shutil.which(command[0], path=tools())
            stack.enter_context(processes.child([found, *command[1:]], output))
            if command is munged:
                wait_until(bus.exists, "munged")
        wait_until(lambda: "idle" in slurm("sinfo", "--noheader", "--format=%T"), "slurmd", 15)
        yield place
        slurm("scancel", "--user=root")
        wait_until(lambda: not queued(), "the queue")


def wait_until(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def slurm(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": tools()}
    )
    return done.stdout + done.stderr


def queued() -> list[str]:
    """Jobs that wait or run, by number."""
    return slurm("squeue", "--noheader", "--states=PD,R,CG", "--format=%i").split()


def command(*arguments: str, configuration: tuple[str, ...] = TINY) -> list[str]:
    """Snakemake as the profile says, on two processors, without accounting and with short waits."""
    return [
        *(sys.executable, "-m", "snakemake", "--profile", "profiles/slurm", *configuration),
        *("--config", "suites=['kv']", "--cores", "2", "--slurm-status-command", "squeue"),
        *("--latency-wait", "10", "--seconds-between-status-checks", "3"),
        *("--slurm-init-seconds-before-status-checks", "3"),
        *arguments,
    ]


def start(folder: Path, *arguments: str, **more: tuple[str, ...]) -> subprocess.Popen:
    temporary = folder.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    with (folder / "run.log").open("ab") as output:
        return subprocess.Popen(
            command(*arguments, **more),
            cwd=folder,
            # With a lock of its own, what others measure on this machine is not waited for.
            env={
                **os.environ,
                "PATH": tools(),
                "TMPDIR": str(temporary),
                "KVBENCH_LOCK": str(temporary / "machine.lock"),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def test_the_profile_carries_a_run_through_failure_cancelling_and_resuming(cluster, tmp_path):
    folder = tmp_path / "clone"
    copy_repository(folder)
    # A job that fails the first time it runs, as on a node with a fault.
    script = folder / "workflow/scripts/prepare_prompts.py"
    text = script.read_text()
    fault = (
        'if "snakemake" in globals() and not Path("failed-once").exists():\n'
        '    Path("failed-once").touch()\n'
        '    raise SystemExit("a fault of the node")\n\n\nif "snakemake" in globals():'
    )
    script.write_text(text.replace('if "snakemake" in globals():', fault))
    records = folder / "results/cells"
    run = start(folder, "--", "tables")
    try:
        journals = folder / "results/journals"
        # The first block is whole, the second has begun.
        wait_until(
            lambda: run.poll() is not None or len(list(journals.rglob("*.jsonl"))) == 2,
            "the second block to begin",
            300,
        )
        assert run.poll() is None, (folder / "run.log").read_text()[-6000:]
        # Somebody cancels what runs, and what waits.
        for job in queued():
            slurm("scancel", job)
        assert run.wait(timeout=300) is not None
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert (folder / "failed-once").exists()
    before = {path: path.stat().st_mtime_ns for path in records.rglob("*.json")}
    assert before
    done = start(folder, "--", "tables")
    assert done.wait(timeout=420) == 0, (folder / "run.log").read_text()[-6000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "results/tables/kv_summary.csv").stat().st_size > 1000
    assert queued() == []


def test_many_blocks_are_handed_out_as_few_jobs(cluster, tmp_path):
    folder = tmp_path / "clone"
    copy_repository(folder)
    groups = ("--groups", "measure_kv_many=blocks", "--group-components", "blocks=2")
    configuration = ("--configfile", "tests/workflow/many.yaml")
    run = start(folder, *groups, "--", "cells", configuration=configuration)
    try:
        assert run.wait(timeout=540) == 0, (folder / "run.log").read_text()[-6000:]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    records = list((folder / "results/cells/kv").rglob("*.json"))
    # Two scenarios, two replicates; two strategies and the control.
    assert len(records) == 12
    # Two blocks a job: four blocks are two jobs of the cluster.
    told = (folder / "run.log").read_text()
    jobs = set(re.findall(r"SLURM jobid (\d+) \(log: \S+/group_blocks_measure_kv_many/", told))
    assert len(jobs) == 2, told[-6000:]


def test_a_group_with_a_failed_member_is_handed_out_again_and_measures_only_what_is_missing(
    cluster, tmp_path
):
    folder = tmp_path / "clone"
    copy_repository(folder)
    # The second block fails the first time, after the first one of its group has been measured.
    script = folder / "workflow/scripts/measure_kv_block.py"
    fault = (
        "from pathlib import Path\n\n\n"
        'if "snakemake" in globals() and not Path("failed-once").exists():\n'
        '    if list(Path("results/cells/kv").rglob("*.json")):\n'
        '        Path("failed-once").touch()\n'
        '        raise SystemExit("a fault of the node")\n\n\nif "snakemake" in globals():'
    )
    text = script.read_text()
    script.write_text(text.replace('if "snakemake" in globals():', fault))
    groups = ("--groups", "measure_kv_many=blocks", "--group-components", "blocks=4")
    configuration = ("--configfile", "tests/workflow/many.yaml")
    run = start(folder, *groups, "--", "cells", configuration=configuration)
    try:
        code = run.wait(timeout=540)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    told = (folder / "run.log").read_text()
    assert (folder / "failed-once").exists()
    assert code == 0, told[-6000:]
    assert len(list((folder / "results/cells/kv").rglob("*.json"))) == 12
    jobs = re.findall(r"SLURM jobid (\d+) \(log: \S+/group_blocks_measure_kv_many/", told)
    assert len(set(jobs)) == 2, told[-6000:]
    # Snakemake removed the records of the block that was finished; its journal wrote them again.
    assert "Removing output files of failed job measure_kv_many" in told
    logs = [path.read_text() for path in (folder / "logs/cells/kv/many").rglob("r?.log")]
    assert sum("of an earlier start" in log and "kvbench: warm:" not in log for log in logs) == 1, (
        logs
    )
