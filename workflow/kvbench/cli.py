"""The command ``kvbench``: one command a module of :mod:`kvbench.commands`, found by being there.

``python -m kvbench`` does the same without an installation. Mistakes of the user end in one line
and exit status 2; nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import typer

from kvbench import __version__, commands
from kvbench.errors import InputError

#: Exit status when what was asked for cannot be done as it was asked.
MISTAKE = 2

app = typer.Typer(
    name="kvbench",
    help="Which cache should a language-model application use, what does it cost, and can the "
    "number be trusted?",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvbench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and end."
    ),
) -> None:
    """Options that stand before a command."""


def _register() -> None:
    """Add every command: the function ``run`` of its module, under the module's ``NAME``."""
    for found in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"{commands.__name__}.{found.name}")
        settings = getattr(module, "SETTINGS", {})
        app.command(module.NAME, **settings)(module.run)


_register()


def main() -> None:
    """Run the command line; the exit status is 2 after a user's mistake, told in one line."""
    try:
        # Without a word the help is what was asked for. The library tells mistakes in a box of five lines.
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.exit(status or 0)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        asked = context.command_path if context else app.info.name
        message = " ".join(error.format_message().split())
        print(f"kvbench: {message} ({asked} --help)", file=sys.stderr)
        sys.exit(MISTAKE)
    except InputError as error:
        print(f"kvbench: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
