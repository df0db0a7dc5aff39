"""``kvbench import-scenarios``: conversations of a notebook into scenario files."""

from __future__ import annotations

from pathlib import Path

import typer

NAME = "import-scenarios"


def run(
    notebook: Path = typer.Argument(help="The notebook (.ipynb), or its export as .py or text."),
    folder: Path = typer.Option(Path("config/scenarios"), help="Where the files are written."),
    prefix: str = typer.Option("imported", help="What the ids begin with."),
    language: str = typer.Option("en", help="Language of the conversations, as ISO 639-1 code."),
) -> None:
    """Read system prompts and turns out of a notebook; nothing of it is executed."""
    from kvbench.inputs import import_scenarios

    found = import_scenarios.read(notebook)
    for path in import_scenarios.write(found, folder, prefix, language):
        typer.echo(f"wrote {path}")
    typer.echo("name them under kv.experiments[].scenarios to measure them")
