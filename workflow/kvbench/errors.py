"""The exceptions by which the library says what is wrong, in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Characters of a list of names in a message.
_LONGEST_LIST = 600


class InputError(ValueError):
    """Something the user wrote is wrong.

    The message is one line that names the file, the key and what would be right, for example
    ``config/scenarios/banking.yaml: turns[3].user is empty; every turn needs a question``.
    """


class Unsupported(RuntimeError):
    """This device, machine or library version cannot run the cell; the message says why.

    Raised inside a cell it becomes ``status: unsupported`` with the message as its reason.
    """


def one_of(
    kind: str, given: object, known: Iterable[object], where: str = "", remedy: str = ""
) -> None:
    """Refuse a name that is not known, with the nearest that is, and with all others.

    Parameters
    ----------
    kind:
        What the name should be, such as ``strategy``.
    given, known:
        The name, and those that there are, in the order in which they are to be read.
    where:
        What the message begins with: the file and the key.
    remedy:
        What else would be right, such as adding a file.

    Raises
    ------
    InputError
        ``unknown strategy 'dynmic' (did you mean 'dynamic'?); known: none, dynamic``
    """
    names = [str(name) for name in known]
    if given in names:
        return
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    listed = ", ".join(names) or "none"
    listed = listed if len(listed) <= _LONGEST_LIST else f"{listed[:_LONGEST_LIST]} ..."
    text = f"unknown {kind} {given!r}{hint}; known: {listed}"
    raise InputError("; ".join(filter(None, [f"{where}: {text}" if where else text, remedy])))
