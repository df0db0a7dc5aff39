"""The exceptions by which the library says what is wrong, in one line each."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user wrote is wrong.

    The message is one line that names the file, the key and what would be right, for example
    ``config/scenarios/banking.yaml: turns[3].user is empty; every turn needs a question``.
    """


class Unsupported(RuntimeError):
    """This device, machine or library version cannot run the cell; the message says why.

    Raised inside a cell it becomes ``status: unsupported`` with the message as its reason.
    """
