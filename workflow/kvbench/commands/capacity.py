"""``kvbench capacity``: how many conversations fit a machine."""

from __future__ import annotations

import typer

from kvbench import commands
from kvbench.errors import InputError

NAME = "capacity"
SETTINGS = commands.forwarding("kvbench.analysis.capacity")


def run(context: typer.Context) -> None:
    """Plan how many conversations fit a machine; --check fills limited memory and compares."""
    from kvbench.analysis import capacity

    if capacity.CHECK in context.args:
        if len(context.args) > 1:
            raise InputError(capacity.NOT_ALONE)
        raise typer.Exit(check())
    raise typer.Exit(capacity.main(context.args))


def check() -> int:
    """Hold the planner against processes that are filled with conversations; 1 where it is off."""
    from kvbench.measurement import crowd

    try:
        outcomes = [one for name in ("static", "dynamic") for one in crowd.check(name)]
    except InputError as error:
        commands.console().print(str(error))
        return 2
    for one in outcomes:
        print(
            f"{one.strategy} in {one.memory_bytes / 2**20:.0f} MiB, work space "
            f"{one.workspace_bytes / 2**20:.1f} MiB: {one.predicted} predicted, {one.ran} ran"
        )
    return 0 if all(one.right for one in outcomes) else 1
