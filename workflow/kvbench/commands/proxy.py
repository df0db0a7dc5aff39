"""``kvbench proxy``: a caching proxy in front of any OpenAI-compatible server."""

from __future__ import annotations

import typer

NAME = "proxy"
# The proxy reads its own arguments: they are described once, there.
SETTINGS = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}


def run(context: typer.Context) -> None:
    """Serve cached answers in front of an OpenAI-compatible server."""
    from kvbench.caching import proxy

    raise typer.Exit(proxy.main(context.args))
