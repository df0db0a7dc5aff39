"""One module per figure: tidy tables in, a matplotlib figure out.

Every figure module has ``QUESTION`` (the figure's title: the one question it answers) and
``draw(*tables)``. Which tables it takes follows from its name (``kv_*``: summary and samples;
``app_<study>*``: the study's table) or from a literal ``TABLES = ("name", ...)`` in the module.
A module with ``PER_SCENARIO = True`` is drawn once per scenario, as ``<module>_<scenario>``; the
scenario is the last argument of its ``draw``. A module with ``BATCHES = True`` is given rows of batches
too; to all others every row is of one request. Modules whose name starts with an underscore are
helpers. Saving, fonts, widths and colours live in
:mod:`kvbench.figures.style`.

Importing this package imports no matplotlib: the DAG is planned from the modules' text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from kvbench.errors import InputError

_FOLDER = Path(__file__).parent
_KV_TABLES = ("kv_summary", "kv_samples")


def _modules() -> list[str]:
    return sorted(
        path.stem
        for path in _FOLDER.glob("*.py")
        if not path.stem.startswith("_") and path.stem != "style"
    )


def names() -> list[str]:
    """Names of all figures that are drawn once, sorted."""
    return [name for name in _modules() if not _literals(name).get("PER_SCENARIO")]


def by_scenario(scenarios: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Figures that are drawn once per scenario: name to module and scenario."""
    return {
        f"{name}_{scenario}": (name, scenario)
        for name in _modules()
        if _literals(name).get("PER_SCENARIO")
        for scenario in sorted(set(scenarios))
    }


@cache
def _literals(name: str) -> dict[str, object]:
    """The module's top-level constants, read without importing it."""
    found = {}
    for node in ast.parse((_FOLDER / f"{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def tables_of(name: str, studies: Sequence[str]) -> tuple[str, ...]:
    """Names of the tables a figure takes, in the order of ``draw``'s arguments.

    Raises
    ------
    InputError
        The figure's name fits no table and its module names none.
    """
    declared = _literals(name).get("TABLES")
    if declared:
        return tuple(declared)
    if name.startswith("kv_"):
        return _KV_TABLES
    fitting = [study for study in studies if f"{name}_".startswith(f"app_{study}_")]
    if not fitting:
        raise InputError(
            f"workflow/kvbench/figures/{name}.py: no table follows from the name; "
            'add TABLES = ("kv_summary",) or the like'
        )
    return (f"app_{max(fitting, key=len)}",)


#: Tables of a suite that one job makes.
_MADE_TOGETHER = ("kv", "traffic")


def together(modules: Mapping[str, str], studies: Sequence[str]) -> dict[str, list[str]]:
    """Which figures are drawn by one job: those whose tables one job makes, so that none waits for more.

    Parameters
    ----------
    modules:
        Name of a figure to its module.

    Returns
    -------
    dict
        Name of a group to its figures: ``kv``, ``traffic``, a table like ``app_semantic``, a module that is
        drawn once per scenario, or a figure that takes the tables of several jobs.
    """
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        tables = tables_of(module, studies)
        suites = {table.partition("_")[0] for table in tables}
        if _literals(module).get("PER_SCENARIO"):
            group = module
        elif len(suites) == 1 and suites <= set(_MADE_TOGETHER):
            group = suites.pop()
        else:
            group = tables[0] if len(tables) == 1 else name
        groups.setdefault(group, []).append(name)
    return groups


def drawable(studies: Sequence[str], traffic: bool = True) -> list[str]:
    """Figures whose tables this run has: those of studies that are left out are left out.

    ``traffic`` says whether any request log is replayed.
    """
    return [
        name
        for name in names()
        if (traffic or not name.startswith("traffic_"))
        and (
            not name.startswith("app_")
            or "TABLES" in _literals(name)
            or any(f"{name}_".startswith(f"app_{study}_") for study in studies)
        )
    ]


def question(name: str) -> str:
    """The question a figure answers."""
    return str(_literals(name)["QUESTION"])


def labels(name: str) -> dict[str, str]:
    """Labels in the report."""
    return {"figure": question(name), "suite": name.partition("_")[0]}
