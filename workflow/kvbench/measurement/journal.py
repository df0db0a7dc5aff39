"""Rounds as they finish, kept on disk until their block is whole: a kill loses the round in flight."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvbench.errors import InputError


class Journal:
    """One line of JSON per finished piece of work, forced to the disk before the next begins.

    The first line says under which conditions the rest was measured; other conditions start anew.

    Parameters
    ----------
    path:
        Of the file.
    conditions:
        What must be equal for the kept work to stand beside new work, as plain values.

    Attributes
    ----------
    kept:
        The pieces of an earlier start under the same conditions, in order.
    differs:
        Keys of ``conditions`` in which an earlier start differed, for which it was thrown away.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self.path = path
        self.kept: list[dict[str, Any]] = []
        self.differs: list[str] = []
        lines = _whole_lines(path)
        # As they read back: a tuple has become a list.
        conditions = json.loads(json.dumps(conditions))
        if lines and lines[0] == conditions:
            self.kept = lines[1:]
        elif lines:
            keys = {*lines[0], *conditions}
            self.differs = sorted(k for k in keys if lines[0].get(k) != conditions.get(k))
        self._write([conditions, *self.kept])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        """Write the file anew, without what a kill left half-written at its end."""
        temporary = self.path.with_name(f".{self.path.name}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as stream:
                stream.writelines(_line(line) for line in lines)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self._unwritable(error) from None

    def append(self, piece: Mapping[str, Any]) -> None:
        """Keep one piece of work; it is on the disk when this returns.

        Raises
        ------
        InputError
            For example when the disk is full; what was kept before is still there.
        """
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(_line(piece))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path}: cannot be written ({error.strerror}); free space or mend the folder's "
            "rights and run again: the rounds so far are kept"
        )

    def remove(self) -> None:
        """Forget everything: the block's records are written."""
        self.path.unlink(missing_ok=True)


def _line(piece: Mapping[str, Any]) -> str:
    return json.dumps(piece, separators=(",", ":"), allow_nan=False) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that is not whole; none where there is no journal."""
    found: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        try:
            piece = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(piece, dict):
            break
        found.append(piece)
    return found
