"""The commands, one module each: ``NAME``, and ``run`` with the arguments as typer reads them.

A command imports what it works with inside ``run``: ``kvbench --help`` stays fast. It may set
``SETTINGS``, the arguments of ``typer.Typer.command``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer._click.shell_completion import CompletionItem
from typer.core import TyperCommand

from kvbench.errors import InputError


def forwarding(module: str) -> dict[str, Any]:
    """Settings of a command that hands its arguments on to a module's own parser.

    Parameters
    ----------
    module:
        Where the function ``parser`` gives a :class:`kvbench.arguments.Parser`. It describes the
        options, prints the help, refuses mistakes, and names what a shell completes.
    """

    class Forwarding(TyperCommand):
        def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
            # The module is imported when a shell asks: it may be slow.
            options = importlib.import_module(module).parser().options()
            return [
                CompletionItem(name, help=told)
                for name, told in options.items()
                if incomplete.startswith("-") and name.startswith(incomplete)
            ]

    return {
        "cls": Forwarding,
        "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
        "add_help_option": False,
    }


def console() -> Any:
    """Where a command prints. A pipe or a file has no width: one line stays one line, whole."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=1000)


def beside(path: Path, name: str) -> dict[str, Any] | None:
    """The record of another strategy that ran where one did, if it succeeded; None without one.

    Parameters
    ----------
    path:
        Of a record of the kv suite: ``.../<strategy>/r<replicate>.json``.
    name:
        The other strategy.
    """
    from kvbench import records

    other = path.parent.parent / name / path.name
    found = records.read(other) if other.is_file() else None
    return found if found is not None and found["status"] == "ok" else None


def record(path: Path) -> dict[str, Any]:
    """A record that somebody named.

    Raises
    ------
    InputError
        It is no record; unlike a broken record of a run it is not to be deleted.
    """
    from kvbench import documents, records

    remedy = "name one record (results/cells/**/*.json, or a recorded one)"
    if path.is_dir():
        raise InputError(f"{path}: a folder; {remedy}")
    if path.exists() and path.suffix != ".json":
        raise InputError(f"{path}: no record; {remedy}")
    found = documents.read_json(path)
    if not isinstance(found, Mapping) or not str(found.get("schema")).startswith("kvbench/"):
        raise InputError(f"{path}: no record of this program; {remedy}")
    return records.read(path)
