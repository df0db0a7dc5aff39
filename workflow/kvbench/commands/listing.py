"""``kvbench list``: what there is, one line each."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

NAME = "list"


class Kind(StrEnum):
    """What can be listed."""

    scenarios = "scenarios"
    models = "models"
    strategies = "strategies"
    studies = "studies"
    figures = "figures"
    claims = "claims"
    machines = "machines"


def run(
    kinds: Annotated[
        list[Kind] | None, typer.Argument(help="What to list; everything when left out.")
    ] = None,
) -> None:
    """List scenarios, models, strategies, studies, figures, claims and recorded machines."""
    from rich.table import Table
    from rich.text import Text

    from kvbench import commands

    console = commands.console()
    for kind in kinds or list(Kind):
        table = Table(title=kind.value, title_justify="left", box=None, show_header=False)
        entries = list(_ENTRIES[kind]())
        # A name is never cut: it is what the reader came for.
        widest = max((len(name) for name, _ in entries), default=0)
        table.add_column(no_wrap=True, style="bold", min_width=widest)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, line in entries or [("none", "")]:
            table.add_row(Text(name), Text(" ".join(line.split())))
        console.print(table)
        console.print()


def _scenarios() -> Iterator[tuple[str, str]]:
    from kvbench import layout
    from kvbench.inputs import scenarios

    for name, scenario in sorted(
        scenarios.load_all(layout.shipped("config") / "scenarios").items()
    ):
        unit = "turns" if scenario.turns else "steps"
        yield name, f"{scenario.title} ({scenario.length} {unit})"


def _models() -> Iterator[tuple[str, str]]:
    from kvbench import layout
    from kvbench.inputs import configuration

    documents = configuration.read_models(layout.shipped("config") / "models")
    for name, document in sorted(documents.items()):
        yield name, f"{document.get('title', name)} (source: {document['source']})"


def _strategies() -> Iterator[tuple[str, str]]:
    from kvbench import strategies

    for name in strategies.names():
        strategy = strategies.get(name)
        exact = "exact" if strategy.exact else "lossy"
        devices = ", ".join(sorted(strategy.devices))
        yield name, f"{first_sentence(strategies.description(name))} ({exact}; {devices})"


def _studies() -> Iterator[tuple[str, str]]:
    from kvbench import studies

    for name in studies.names():
        yield name, studies.get(name).question


def _figures() -> Iterator[tuple[str, str]]:
    from kvbench import figures

    for name in figures.names():
        yield name, figures.question(name)


def _claims() -> Iterator[tuple[str, str]]:
    from kvbench import documents, layout

    for claim in documents.read_yaml(layout.shipped("config") / "claims.yaml")["claims"]:
        yield claim["id"], claim["statement"]["en"]


def _machines() -> Iterator[tuple[str, str]]:
    folder = Path("results/recorded")
    for machine in sorted(path for path in folder.glob("[!.]*") if path.is_dir()):
        from kvbench.records import gathering

        facts = gathering.environments([], {machine.name: machine})[machine.name]
        gpu = facts.get("gpu") or {}
        count = sum(1 for _ in machine.glob("cells/**/*.json"))
        yield (
            machine.name,
            f"{gpu.get('name') or facts['cpu']}, {facts['cores']} cores, {count} records",
        )


_ENTRIES = {
    Kind.scenarios: _scenarios,
    Kind.models: _models,
    Kind.strategies: _strategies,
    Kind.studies: _studies,
    Kind.figures: _figures,
    Kind.claims: _claims,
    Kind.machines: _machines,
}


def first_sentence(text: str | None) -> str:
    """First sentence of a docstring, on one line."""
    first = " ".join((text or "").split("\n\n")[0].split())
    return first.rstrip(".").replace("``", "")
