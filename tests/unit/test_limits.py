"""Limits of containers, read from folders laid out as the kernel lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvbench.measurement import limits
from kvbench.measurement.limits import Limits


def laid_out(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A root with the process's groups and the files of the control groups."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_version_2_names_quota_cores_and_memory(tmp_path):
    root = laid_out(
        tmp_path,
        "0::/jobs/one\n",
        {
            "cgroup.controllers": "cpu memory cpuset",
            "jobs/one/cpu.max": "100000 100000",
            "jobs/one/memory.max": "2147483648",
            "jobs/one/cpuset.cpus.effective": "0-1,4",
        },
    )
    assert limits.read(root) == Limits(1.0, "0-1,4", 2**31, "v2")


def test_the_narrowest_limit_on_the_way_up_holds(tmp_path):
    root = laid_out(
        tmp_path,
        "0::/a/b\n",
        {
            "cgroup.controllers": "",
            "a/b/cpu.max": "max 100000",
            "a/cpu.max": "150000 100000",
            "a/b/memory.max": "4096",
            "a/memory.max": "8192",
        },
    )
    found = limits.read(root)
    assert (found.quota_cores, found.memory_bytes) == (1.5, 4096)


def test_a_container_whose_path_is_the_hosts_has_its_own_group_at_the_top(tmp_path):
    root = laid_out(
        tmp_path,
        "0::/../../system.slice/docker-1.scope\n",
        {"cgroup.controllers": "", "cpu.max": "50000 100000", "memory.max": "max"},
    )
    assert limits.read(root) == Limits(0.5, None, None, "v2")


def test_version_1_names_them_too(tmp_path):
    root = laid_out(
        tmp_path,
        "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n2:cpuset:/docker/1\n",
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/docker/1/memory.limit_in_bytes": "1073741824",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "cpuset/cpuset.cpus": "2-3",
        },
    )
    assert limits.read(root) == Limits(2.0, "2-3", 2**30, "v1")


def test_no_limits_are_none(tmp_path):
    root = laid_out(
        tmp_path,
        "1:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
    )
    assert limits.read(root) == Limits(None, None, None, "v1")


def test_a_system_without_control_groups_has_no_limits(tmp_path):
    assert limits.read(tmp_path) == Limits()


@pytest.mark.parametrize("text", ["0", "0-3,8", "1,3,5-7", ""])
def test_lists_of_cores_are_read_and_written_alike(text):
    assert limits.written(limits.numbers(text)) == text


@pytest.mark.parametrize(
    ("found", "threads", "words"),
    [
        (Limits(quota_cores=1.0), 2, "--cores 1"),
        (Limits(quota_cores=1.5), 2, "quota of 1.5 cores"),
        (Limits(cores="0-1"), 4, "4 threads share 2 cores (0-1)"),
    ],
)
def test_threads_beyond_a_limit_are_said(found, threads, words):
    assert words in found.excess(threads)


@pytest.mark.parametrize("found", [Limits(), Limits(2.0, "0-1"), Limits(quota_cores=2.5)])
def test_threads_within_the_limits_are_not(found):
    assert found.excess(2) is None


def test_this_process_runs_on_at_least_one_core():
    assert limits.of_this_process().allowed_cores()
