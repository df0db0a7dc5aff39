"""``kvbench proxy``: a caching proxy in front of any OpenAI-compatible server."""

from __future__ import annotations

import typer

from kvbench import commands

NAME = "proxy"
SETTINGS = commands.forwarding("kvbench.caching.proxy.cli")


def run(context: typer.Context) -> None:
    """Serve cached answers in front of an OpenAI-compatible server."""
    from kvbench.caching import proxy

    raise typer.Exit(proxy.main(context.args))
