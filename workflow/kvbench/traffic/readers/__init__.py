"""Formats of request logs, one module each, found by being there and told apart by content.

A format is one file in this folder with a subclass of :class:`~kvbench.traffic.readers.base.Format`
that has a ``name``. Nothing else lists the formats.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache

from kvbench.errors import InputError
from kvbench.traffic.readers.base import Format

#: An object that holds the requests in a list, behind plain fields.
_WRAPPING = re.compile(r'\s*\{\s*(?:"\w+"\s*:\s*[^\[{]*,\s*)?"(data|requests|items|logs)"\s*:\s*\[')


@cache
def formats() -> dict[str, type[Format]]:
    """Every format by name, the most particular first."""
    # What these files hold, and not every subclass that this process knows: one may be of another place.
    found = {
        kind
        for module in pkgutil.iter_modules(__path__)
        for kind in vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        if isinstance(kind, type) and issubclass(kind, Format) and kind.name
    }
    return {kind.name: kind for kind in sorted(found, key=lambda one: (-one.rank, one.name))}


def detect(head: str, source: str) -> type[Format]:
    """The format of a log from its first characters.

    Raises
    ------
    InputError
        Nothing but blanks, or what no format recognises.
    """
    lines = [line for line in head.splitlines()[:50] if line.strip()]
    if not lines or re.fullmatch(r"\s*\[\s*\]\s*", head):
        raise InputError(f"{source}: the log is empty; a replay needs at least two requests")
    for kind in formats().values():
        if kind.matches(lines):
            return kind
    if lines[0].lstrip().startswith("["):
        raise InputError(
            f"{source}: a JSON list of neither request bodies (messages) nor conversations; a log of"
            " other objects is not known"
        )
    if wrapped := _WRAPPING.match(head):
        raise InputError(
            f"{source}: a JSON object with a list under {wrapped[1]!r}; give the list itself, such as"
            f" with: jq .{wrapped[1]}"
        )
    if lines[0].strip() == "{":
        raise InputError(
            f"{source}: a JSON object over several lines; write one object a line, such as with:"
            " jq -c ."
        )
    known = "; ".join(kind.title for kind in formats().values())
    raise InputError(
        f"{source}: not a log of a known format (first line: {lines[0][:60]!r}); known are: {known}"
    )
