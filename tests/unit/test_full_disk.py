"""Results on a full disk, a read-only one, one without inodes, another one: one line, no half files."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from kvbench import documents
from kvbench.errors import InputError
from kvbench.figures import style
from kvbench.measurement.journal import Journal
from kvbench.records import gathering

BIG = [[number, "x" * 200] for number in range(1000)]


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system in memory, with options of mount; only root may."""
    mounted = []

    def disk(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    yield disk
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def write_record(path: Path) -> None:
    documents.write_json(path, BIG)


def write_table(path: Path) -> None:
    gathering.write_csv(pd.DataFrame(BIG), path)


def write_journal(path: Path) -> None:
    Journal(path, {"conditions": BIG})


def draw(path: Path) -> None:
    figure = plt.figure(figsize=(20, 20))
    style.save(figure, path)


WRITERS = [write_record, write_table, write_journal, draw]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "filler"}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("free", [0, 4096])
def test_a_full_disk_is_one_line_and_what_was_there_stays(disk, write, free):
    place = disk("size=64k")
    (place / "there").write_text("whole")
    fill = 65536 - 4096 - free
    (place / "filler").write_bytes(b"\0" * fill)
    with pytest.raises(InputError, match=r"No space left on device.*free space") as error:
        write(place / "new")
    assert "\n" not in str(error.value)
    assert str(place / "new") in str(error.value)
    # Of a figure's three files the first may be there, whole.
    assert set(files(place)) <= {"there", "new.pdf"}
    assert files(place)["there"] == b"whole"
    assert files(place).get("new.pdf", b"%%EOF\n").endswith(b"%%EOF\n")


def test_a_record_is_replaced_whole_or_not_at_all_when_the_disk_fills(disk):
    place = disk("size=64k")
    documents.write_json(place / "record.json", [1])
    before = files(place)
    with pytest.raises(InputError):
        write_record(place / "record.json")
    assert files(place) == before


@pytest.mark.parametrize("write", WRITERS)
def test_a_read_only_folder_is_one_line(disk, write):
    place = disk("size=64k,ro")
    with pytest.raises(InputError, match=f"{os.strerror(errno.EROFS)}.*mend the folder's rights"):
        write(place / "new")


@pytest.mark.parametrize("write", WRITERS)
def test_a_disk_without_inodes_is_one_line(disk, write):
    place = disk("size=1m,nr_inodes=2")
    (place / "there").touch()
    with pytest.raises(InputError, match="No space left on device"):
        write(place / "new")
    assert files(place) == {"there": b""}


@pytest.mark.parametrize("write", WRITERS)
def test_results_may_lie_on_another_file_system_than_the_checkout(disk, write, tmp_path):
    (tmp_path / "results").symlink_to(disk("size=2m"))
    write(tmp_path / "results" / "new")
    assert [n for n in files(tmp_path / "results") if n.startswith("new")]
    assert not [n for n in files(tmp_path / "results") if n.startswith(".")]
