"""``kvbench import-scenarios``: conversations of a notebook into scenario files."""

from __future__ import annotations

from pathlib import Path

import typer

NAME = "import-scenarios"


_NOTEBOOK = typer.Argument(help="The notebook (.ipynb), or its export as .py or text.")
_FOLDER = typer.Option(Path("config/scenarios"), help="Where the files are written.")


def run(
    notebook: Path = _NOTEBOOK,
    folder: Path = _FOLDER,
    prefix: str = typer.Option("imported", help="What the ids begin with."),
    language: str = typer.Option("en", help="Language of the conversations, as ISO 639-1 code."),
) -> None:
    """Read system prompts and turns out of a notebook; nothing of it is executed."""
    from kvbench.inputs import import_scenarios

    found = import_scenarios.read(notebook)
    for path in import_scenarios.write(found, folder, prefix, language):
        typer.echo(f"wrote {path}")
    typer.echo("name them under kv.experiments[].scenarios to measure them")
