"""The commands, one module each: ``NAME``, and ``run`` with the arguments as typer reads them.

A command imports what it works with inside ``run``: ``kvbench --help`` stays fast. It may set
``SETTINGS``, the arguments of ``typer.Typer.command``.
"""
