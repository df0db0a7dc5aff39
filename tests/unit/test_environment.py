"""The facts of the machine: complete, plain, and with a digest over what can change a measurement."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from kvbench.errors import InputError
from kvbench.measurement import blocks, environment


@pytest.fixture
def describe(tmp_path):
    def describe() -> dict:
        return environment.describe("cpu", tmp_path)

    return describe


def test_the_facts_are_plain_json_and_have_what_records_keep(describe):
    found = describe()
    assert json.loads(json.dumps(found)) == found
    kept = blocks._environment_facts(found)
    assert kept["torch"] == torch.__version__
    assert kept["digest"] == found["digest"]


def test_cores_memory_and_processor_are_known(describe):
    found = describe()
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["cpu"]
    assert found["gpu"] is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n",
            "AMD EPYC (family 25, model 17)",
        ),
        ("model name\t: Cortex-A76\n", "Cortex-A76"),
    ],
)
def test_a_processor_is_told_by_family_where_its_name_is_half_a_name(monkeypatch, text, name):
    monkeypatch.setattr(environment, "_read", lambda _: text)
    assert environment._cpu_model() == name


def test_the_moment_and_the_commit_are_not_part_of_the_digest(describe, monkeypatch):
    before = describe()
    monkeypatch.setattr(environment, "commit", lambda root: "another")
    monkeypatch.setattr(environment.records, "now", lambda: "2030-01-01T00:00:00+00:00")
    after = describe()
    assert after["digest"] == before["digest"]
    assert after["commit"] == "another"


def test_another_version_of_a_package_changes_the_digest(describe, monkeypatch):
    before = describe()["digest"]
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "99"})
    assert describe()["digest"] != before


def test_absent_packages_are_left_out(monkeypatch):
    def version(name: str) -> str:
        if name != "torch":
            raise metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(metadata, "version", version)
    assert environment.versions() == {"torch": "1.2"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"kv\.device is cuda.*set kv\.device to cpu") as error:
        environment.describe("cuda", tmp_path)
    assert "\n" not in str(error.value)


# Commit ---------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    return tmp_path


def test_the_commit_is_twelve_digits_of_the_head(checkout):
    found = environment.commit(checkout)
    assert len(found) == 12
    assert int(found, 16) >= 0


def test_an_edited_checkout_is_dirty(checkout):
    (checkout / "file").write_text("two")
    assert environment.commit(checkout).endswith("-dirty")


def test_a_tag_does_not_hide_the_commit(checkout):
    before = environment.commit(checkout)
    git(checkout, "tag", "v1")
    assert environment.commit(checkout) == before


def test_outside_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.commit(tmp_path) == "unknown"


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit(tmp_path) == "unknown"
