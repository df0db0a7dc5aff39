"""``kvbench compare``: two records, two runs or two machines, with intervals and verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbench.errors import InputError

NAME = "compare"

#: Exit status when the second is slower, and when nothing may be concluded at all.
SLOWER, NO_VERDICT = 1, 3
_RECORDED = Path("results/recorded")


def run(
    first: Annotated[
        str, typer.Argument(help="A record, a results folder, or a recorded machine.")
    ],
    second: Annotated[str, typer.Argument(help="What is held against it, of the same kind.")],
) -> None:
    """Compare two records, two runs or two recorded machines.

    Exit status: 0 when the second is not slower, 1 when it is, 2 when the two cannot be compared,
    3 when they can but nothing may be concluded.
    """
    from rich.table import Table
    from rich.text import Text

    from kvbench import commands
    from kvbench.analysis import comparing
    from kvbench.records.identity import CONTROL
    from kvbench.strategies import REFERENCE

    if Path(first).resolve() == Path(second).resolve():
        raise InputError(f"{first}: the same on both sides; there is nothing to compare")
    sides = [load(first), load(second)]
    if len({isinstance(side, list) for side in sides}) > 1:
        raise InputError(f"{first} and {second}: one is a record and the other a run")
    if isinstance(sides[0], list):
        results = comparing.runs(*sides)
    else:
        twice = [commands.beside(Path(first), name) for name in (REFERENCE, CONTROL)]
        results = [comparing.records(*sides, *twice)]
    console = commands.console()
    table = Table(box=None, pad_edge=False)
    table.add_column("compared", overflow="fold")
    for title in ("first (s)", "second (s)", "ratio", "95 % interval"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("the second is", overflow="fold")
    colours = {comparing.FASTER: "green", comparing.SLOWER: "red"}
    for one in results:
        low, high = one.interval.low, one.interval.high
        table.add_row(
            Text(one.what),
            *(Text(f"{seconds:.4g}") for seconds in one.seconds),
            Text(f"{one.ratio:.3f}"),
            Text("" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"),
            Text.assemble(
                (one.verdict, colours.get(one.verdict, "")), f": {one.why}" if one.why else ""
            ),
        )
    console.print(table)
    console.print(
        "\nratio: time of the second over time of the first, paired within rounds; below 1 is faster."
    )
    if comparing.slower(results):
        raise typer.Exit(SLOWER)
    if all(one.verdict == comparing.NO_VERDICT for one in results):
        raise typer.Exit(NO_VERDICT)


def load(name: str) -> dict[str, Any] | list[dict[str, Any]]:
    """One record, or the kv records of a run or machine.

    Raises
    ------
    InputError
        There is no such thing, or it holds no kv record.
    """
    from kvbench import commands, records

    path = Path(name)
    if path.is_file():
        record = commands.record(path)
        if record["schema"] != records.KV_SCHEMA:
            raise InputError(
                f"{path}: a record of the app suite; compare takes records of the kv suite"
            )
        return record
    folder = path if path.is_dir() else _RECORDED / name
    if not folder.is_dir():
        known = sorted(p.name for p in _RECORDED.glob("[!.]*") if p.is_dir())
        raise InputError(
            f"{name}: no such record, results folder or recorded machine; "
            f"recorded are: {', '.join(known) or 'none'}"
        )
    paths = sorted((folder / "cells" / "kv").rglob("*.json"))
    if not paths:
        raise InputError(f"{folder}: holds no record of the kv suite (cells/kv/**/*.json)")
    return [records.read(path) for path in paths]
