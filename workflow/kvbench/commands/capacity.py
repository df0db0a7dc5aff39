"""``kvbench capacity``: how many conversations fit a machine."""

from __future__ import annotations

import typer

NAME = "capacity"
# The planner reads its own arguments: they are described once, there.
SETTINGS = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}


def run(context: typer.Context) -> None:
    """Plan how many conversations fit a machine, and how many machines a fleet takes."""
    from kvbench.analysis import capacity

    raise typer.Exit(capacity.main(context.args))
