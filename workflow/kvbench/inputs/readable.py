"""Whether a configuration can be read at all: Snakemake parses it before any rule and shows a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

from kvbench import documents
from kvbench.errors import InputError


def problem(path: Path) -> str | None:
    """One line that says why a configuration cannot be read, or None."""
    try:
        document = documents.read_yaml(path)
    except InputError as error:
        return str(error)
    if not isinstance(document, dict):
        return f"{path}: holds no keys; begin with one such as suites: [kv]"
    return None


if __name__ == "__main__":
    found = [told for told in map(problem, map(Path, sys.argv[1:])) if told]
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    sys.exit(bool(found))
