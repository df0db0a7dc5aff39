"""Whatever is wrong in an input is one line that names the file and what would be right.

Run ``python tests/workflow/test_mutations.py`` to write the reviewed list of messages anew.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import pytest
from kvbench.errors import InputError
from mutations import mutations

SEED, COUNT = 11, 300
REVIEWED = Path(__file__).resolve().parents[1] / "data" / "messages.txt"
LONGEST = 900


def outcomes(folder: Path) -> list[tuple[str, str, str | None, Exception | None]]:
    """For every spoilt input: what was done, its file, and the message or the other exception."""
    found = []
    for case in mutations(folder, SEED, COUNT):
        said, fault = None, None
        try:
            case.input.read(case.file)
        except InputError as error:
            said = str(error)
        except Exception as error:
            fault = error
        what = f"{case.number:03d} {case.input.name}: {case.what}"
        found.append((what, str(case.file), said, fault))
    return found


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("spoilt")
    return folder, outcomes(folder)


def test_no_spoilt_input_is_a_traceback(spoilt):
    _, found = spoilt
    assert len(found) == COUNT
    assert [(what, repr(fault)) for what, _, _, fault in found if fault] == []


def test_every_message_is_one_line_that_begins_with_the_file(spoilt):
    _, found = spoilt
    wrong = [
        (what, said)
        for what, file, said, _ in found
        if said
        and (
            "\n" in said
            or len(said) > LONGEST
            or not said.startswith((file, str(Path(file).parent), "config/models/mine.yaml"))
        )
    ]
    assert wrong == []


def test_the_messages_are_the_reviewed_ones(spoilt):
    folder, found = spoilt
    assert listed(folder, found) == REVIEWED.read_text(encoding="utf-8")


def listed(folder: Path, found: list) -> str:
    """What was done and what is said, without the folders of this machine."""
    lines = []
    for what, _, said, fault in found:
        told = said if said is not None else repr(fault) if fault else "accepted"
        told = re.sub(re.escape(str(folder)) + r"/[\w-]+/recorded/machine", "...", told)
        lines.append(f"{what}\n    {told}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.stdout.write(listed(Path(temporary), outcomes(Path(temporary))))
