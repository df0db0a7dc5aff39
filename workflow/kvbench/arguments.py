"""Arguments of a program of its own inside the library: help on request, a mistake in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes end in one line that names the help, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """End the program with the mistake; the usage is what ``--help`` prints."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} ({self.prog} --help)\n")

    def options(self) -> dict[str, str]:
        """Every long option to what it is for."""
        return {
            name: action.help or ""
            for action in self._actions
            for name in action.option_strings
            if name.startswith("--")
        }
