"""The exceptions by which the library says what is wrong, in one line each."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

#: Likeness, from 0 to 1, from which a name may be meant; `gpu` is not meant to be `cpu`.
_NEAR = 0.7
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


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """The nearest of some names in brackets, or nothing where none is near.

    Case, marks that look alike and the folder and suffix of a file are looked through.
    """
    names = {_plain(name): name for name in known}
    near = difflib.get_close_matches(_plain(str(given)), names, n=1, cutoff=_NEAR)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


def _plain(name: str) -> str:
    """A name without what the eye passes over."""
    spelled = unicodedata.normalize("NFKC", name).casefold().strip()
    return spelled.rpartition("/")[2].removesuffix(".yaml").replace("-", "_").replace(" ", "_")


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
    names = list(dict.fromkeys(str(name) for name in known))
    if given in names:
        return
    listed = ", ".join(names) or "none"
    listed = listed if len(listed) <= _LONGEST_LIST else f"{listed[:_LONGEST_LIST]} ..."
    text = f"unknown {kind} {given!r}{did_you_mean(given, names)}; known: {listed}"
    raise InputError("; ".join(filter(None, [f"{where}: {text}" if where else text, remedy])))
