"""One job's figures, drawn from the tables that they share; what has not changed is not drawn again.

Importing matplotlib and seaborn takes as long as drawing a figure, so figures of the same tables share a
process. Snakemake knows only that something of the job has changed, and removes all its files. What was
drawn last is therefore kept beside Snakemake's own notes, with a digest of everything that it was drawn
from: the same digest gives the same bytes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvbench import documents
from kvbench.errors import InputError

log = logging.getLogger(__name__)

#: Where jobs keep what they have drawn: beside Snakemake's own notes.
KEPT = Path(".snakemake", "drawn")

#: Libraries whose versions show in a figure's bytes.
_LIBRARIES = ("fonttools", "matplotlib", "numpy", "pandas", "pillow", "seaborn")


@dataclass(frozen=True)
class Plan:
    """What one figure is drawn from.

    Attributes
    ----------
    module, arguments:
        The module in :mod:`kvbench.figures`, and what its ``draw`` takes behind the tables.
    tables:
        Paths in the order of ``draw``'s arguments.
    code:
        Digest of the code that draws it.
    """

    module: str
    tables: Sequence[str]
    arguments: Sequence[str]
    code: str


def draw(
    plans: Mapping[str, Plan],
    folder: Path,
    languages: Sequence[str],
    words: Collection[Path],
    kept: Path = KEPT,
) -> list[str]:
    """Bring figures into a folder, each as PDF, SVG and PNG in every language.

    A figure that cannot be drawn keeps no other from being drawn.

    Parameters
    ----------
    plans:
        Name of a figure to what it is drawn from.
    words:
        The phrase books.
    kept:
        Folder of what earlier jobs drew.

    Returns
    -------
    list of str
        The figures that were drawn anew.

    Raises
    ------
    InputError
        Tables that figures cannot be drawn from, with the names of these figures.
    ExceptionGroup
        Figures whose drawing broke; the log has every traceback.
    OSError
        A file cannot be read or written.
    """
    # What fontTools does to the fonts of one PDF takes a hundred lines of the job's log.
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    common = {
        "languages": list(languages),
        "words": [_contents(path) for path in sorted(words)],
        "software": _software(),
    }
    drawn: list[str] = []
    failed: dict[str, Exception] = {}
    for name, plan in plans.items():
        try:
            tables = [_contents(Path(path)) for path in plan.tables]
            origin = documents.digest({**common, **asdict(plan), "tables": tables})
            if _bring(kept / name, origin, folder):
                log.info("%s has not changed", name)
                continue
            files = _drawn(plan, folder / name, languages)
        except OSError:
            # A full disk is no fault of the figure, and no other figure would find room.
            raise
        except Exception as error:
            log.exception("%s cannot be drawn", name)
            failed[name] = error
            continue
        drawn.append(name)
        _keep(kept / name, origin, files)
    if failed:
        raise _failure(failed)
    return drawn


def _failure(failed: Mapping[str, Exception]) -> Exception:
    if all(isinstance(error, InputError) for error in failed.values()):
        return InputError("; ".join(f"figure {name}: {error}" for name, error in failed.items()))
    for name, error in failed.items():
        error.add_note(f"while drawing the figure {name}")
    return ExceptionGroup(f"cannot be drawn: {', '.join(failed)}", list(failed.values()))


def _drawn(plan: Plan, base: Path, languages: Sequence[str]) -> list[Path]:
    with without("scipy"):
        from kvbench.figures import style

    from kvbench.analysis import selection

    style.apply()
    module = importlib.import_module(f"kvbench.figures.{plan.module}")
    # Other figures of the job take the same tables, and none may see what a module adds to them.
    tables = [_table(path).copy() for path in plan.tables]
    if not getattr(module, "BATCHES", False):
        tables = [selection.single(table) for table in tables]
    return style.save(module.draw(*tables, *plan.arguments), base, *languages)


@contextmanager
def without(package: str) -> Iterator[None]:
    """While the block imports something, an optional package of it seems not to be installed.

    seaborn asks SciPy for density estimates and trees of clusters, which no figure shows; to import
    SciPy takes as long as all the rest. A package that is loaded already is left alone.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@cache
def _table(path: str) -> Any:
    from kvbench.records import gathering

    return gathering.read_csv(Path(path))


@cache
def _contents(path: Path) -> str:
    return documents.sha256_of_file(path)


def _software() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **versions}


# ------------------------------------------------------------------------------ what was drawn before


def _bring(kept: Path, origin: str, folder: Path) -> bool:
    """Put a figure that was drawn from the same into the folder again, if it is still what it was."""
    try:
        note = documents.read_json(kept / "origin.json")
        files = note["files"]
        if note["origin"] != origin or not files:
            return False
        if any(documents.sha256_of_file(kept / name) != digest for name, digest in files.items()):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            _place(kept / name, folder / name)
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return False
    return True


def _keep(kept: Path, origin: str, files: Sequence[Path]) -> None:
    """Remember a figure. Where that cannot be done it is drawn again next time."""
    with suppress(OSError):
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for path in files:
            _place(path, kept / path.name)
        digests = {path.name: documents.sha256_of_file(path) for path in files}
        # Last: without this page the folder counts for nothing.
        documents.write_json(kept / "origin.json", {"origin": origin, "files": digests})


def _place(source: Path, target: Path) -> None:
    """One more name for a file, which takes no room; a copy where the file system has no such names."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
