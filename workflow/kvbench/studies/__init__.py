"""The application-cache studies: two modules per study, discovered by name.

The light part, ``studies/<name>.py``, defines ``STUDY``, an instance of :class:`Study`: options,
cells, columns and named values. Planning and everything after the measurement import it, so it
imports neither a cache nor a client of a server. The measuring part,
``studies/measuring/<name>.py``, defines ``measure``; it knows nothing of the light part, and only
it decides whether a cell has to be measured again. Nothing else has to be edited. Modules whose
name starts with an underscore are helpers, not studies.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvbench.errors import InputError, one_of

if TYPE_CHECKING:
    import pandas as pd

    from kvbench.paper.values import Value


@dataclass(frozen=True)
class Cell:
    """One job of a study: its factors, and whether it measures time.

    A timed cell takes the machine lock and all threads, so nothing is measured beside it; an
    untimed one (hit ratios, simulations) may run next to others.

    Attributes
    ----------
    libraries:
        What a process has imported before it measures the cell, see
        :func:`kvbench.measurement.startup.import_libraries`; with ``""`` the cell imports what it needs by
        itself and starts in a process of its own, as one does that measures its own memory or looks for
        a GPU.
    """

    factors: Mapping[str, Any]
    timed: bool = True
    libraries: str = "caches"


@dataclass(frozen=True)
class Context:
    """What a running cell may use: a private scratch folder, a seed, a server, a model.

    Attributes
    ----------
    scratch:
        An empty temporary folder that is deleted when the cell ends, also on failure.
    seed:
        Seed of the study, the same in all its cells; every generator in ``measure`` derives from it.
    server_url:
        ``redis://`` address of a real server from the configuration, or None for the embedded one.
    model_dir:
        Folder of the local model in Hugging Face format, for studies that need one.
    known:
        Ids of this machine's processes that the cell asks although it did not start them; None if
        nobody looked or one of them cannot be found: no turn is marked as disturbed then. See
        :class:`kvbench.studies.measuring._rounds.Log`.
    """

    scratch: Path
    seed: int
    server_url: str | None = None
    model_dir: Path | None = None
    known: Collection[int] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a cell found: tidy rows for the table, and the raw samples behind them.

    Attributes
    ----------
    rows:
        One mapping per row of the table.
    samples:
        The raw times. Those of arms that took turns in rounds carry their ``round`` (from 0), their
        ``slot`` (running position in the cell) and whether something else took the processor
        meanwhile, see :mod:`kvbench.studies.measuring._rounds`.
    """

    rows: list[dict[str, Any]]
    samples: Mapping[str, Any] = field(default_factory=dict)


def control_of(reference: str) -> str:
    """Return the name of an arm that does what ``reference`` does, a second time in each round.

    Whatever the ratio of the two is, nothing that a study compares has made it.
    """
    return f"control-{reference}"


def recorded_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a record as they were measured."""
    return [dict(row) for row in record["rows"]]


@dataclass(frozen=True)
class Study:
    """A question about an application-level cache, and how it is answered.

    Attributes
    ----------
    name:
        Name of the module, of the records' folder and of the table ``app_<name>.csv``.
    question:
        The question in one sentence.
    options:
        JSON Schema of ``app.studies.<name>``: an object schema whose properties each carry a
        ``description`` and a ``default`` (the default is the quick configuration).
    plan:
        Options, filled with defaults, to the cells of the study by file-name-safe id.
    columns:
        Column name to meaning (with the unit), in the order of the table.
    values:
        The study's table (of one machine) to named values for the paper and the claims.
        Names start with ``<study>_``. The table may lack rows; absent values are ``Value(None)``.
    aggregate:
        A cell's record to its rows of the table: the recorded ones, with what follows from the
        samples beside them, such as ratios that are paired within rounds.
    needs_model:
        Whether cells load the local model (it is then an input of the job).
    """

    name: str
    question: str
    options: Mapping[str, Any]
    plan: Callable[[Mapping[str, Any]], dict[str, Cell]]
    columns: Mapping[str, str]
    values: Callable[[pd.DataFrame], dict[str, Value]]
    aggregate: Callable[[Mapping[str, Any]], list[dict[str, Any]]] = recorded_rows
    needs_model: bool = False

    def measuring(self) -> ModuleType:
        """Import the measuring part and return it."""
        return importlib.import_module(f"{__name__}.measuring.{self.name}")

    def measure(self, factors: Mapping[str, Any], context: Context) -> Outcome:
        """Run one cell with the measuring part.

        Raises
        ------
        kvbench.errors.Unsupported
            This machine cannot run the cell.
        """
        return self.measuring().measure(factors, context)


def names() -> list[str]:
    """Names of all studies, sorted."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(__path__)
        if not module.ispkg and not module.name.startswith("_")
    )


@cache
def get(name: str) -> Study:
    """Return the study called ``name``.

    Raises
    ------
    InputError
        If there is no such study; the message names the known ones.
    """
    one_of("study", name, names())
    study = importlib.import_module(f"{__name__}.{name}").STUDY
    if study.name != name:
        raise InputError(
            f"workflow/kvbench/studies/{name}.py: STUDY.name is {study.name!r}, not {name!r}"
        )
    return study
