"""A configuration that cannot be read at all is one line before Snakemake sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvbench.inputs import readable


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("suites: [kv]\n".encode("utf-16"), "not UTF-8 text"),
        ("# não\nsuites: [kv]\n".encode("latin-1"), "not UTF-8 text"),
        (b"a: " + b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
        (b"", "holds no keys"),
        (b"7", "holds no keys"),
        (None, "no such file"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, content, told):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    found = readable.problem(path)
    assert found.startswith(f"{path}: ")
    assert told in found
    assert "\n" not in found


def test_a_folder_is_no_configuration(tmp_path):
    assert "a folder; name a file" in readable.problem(tmp_path)


def test_the_shipped_configurations_can_be_read():
    folder = Path(__file__).resolve().parents[2] / "config"
    assert [readable.problem(path) for path in folder.glob("*.yaml")] == [None] * len(
        list(folder.glob("*.yaml"))
    )
