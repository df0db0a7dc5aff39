"""From tables to the paper: all values by name, then the LaTeX text of each language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from kvbench import documents, instrument, paper_values, selection, studies, tex
from kvbench.figures import names as figure_names
from kvbench.values import Value

#: The order in which a reader meets the studies: from one function to a whole service.
STUDY_ORDER = (
    "memoization",
    "http",
    "eviction",
    "expiry",
    "write_policy",
    "response_cache",
    "layered",
    "stampede",
    "resilience",
    "semantic",
    "prefix",
    "llm_api",
    "one_stream",
)


def collect(
    summary: pd.DataFrame,
    samples: pd.DataFrame,
    study_tables: Mapping[str, pd.DataFrame],
    aa_table: pd.DataFrame,
    claims: pd.DataFrame,
    environments: Mapping[str, Mapping[str, Any]],
    study_cells: Mapping[str, Sequence[str]],
) -> dict[str, Value]:
    """Every value that the paper or a claim may name.

    Parameters
    ----------
    summary, samples, aa_table, claims:
        The tables of those names.
    study_tables:
        Study to its table.
    environments:
        Machine to its facts.
    study_cells:
        Study to the records behind it, for ``Value.cells``.
    """
    values = paper_values.kv_values(summary, samples, claims, environments)
    for machine in selection.machines(aa_table) if len(aa_table) else []:
        tests = instrument.as_tests(aa_table, machine)
        if {instrument.SAME, instrument.SLOWED} <= set(tests):
            rows = aa_table[(aa_table["machine"] == machine) & (aa_table["slowdown"] > 0)]
            # This machine's own test comes last and stays.
            values |= paper_values.aa_values(
                tests[instrument.SAME],
                tests[instrument.SLOWED],
                float(rows["slowdown"].iloc[0]),
            )
            values["aa_machine"] = Value(machine)
            values["aa_processes"] = Value(int(rows["processes"].iloc[0]), digits=0)
            if machine == selection.HERE:
                break
    for name, table in study_tables.items():
        found = studies.get(name).values(one_machine(table))
        cells = tuple(study_cells.get(name, ()))
        values |= {
            key: value if value.cells else replace(value, cells=cells)
            for key, value in found.items()
        }
    return values


def one_machine(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of this run; of the first recorded machine when this run has none."""
    present = sorted(set(table["machine"]), key=lambda name: (name != selection.HERE, name))
    return table[table["machine"] == present[0]] if present else table


def study_sequence(names: Iterable[str]) -> list[str]:
    """Studies in the order of the paper; unknown ones follow, sorted."""
    given = set(names)
    known = [name for name in STUDY_ORDER if name in given]
    return [*known, *sorted(given - set(known))]


def render(
    values: Mapping[str, Value],
    claims: pd.DataFrame,
    language: str,
    study_names: Iterable[str],
    figures: Iterable[str],
    templates: Path,
    outputs: Mapping[str, Path],
) -> None:
    """Write ``numbers``, ``section``, ``app_section`` and ``main`` of one language.

    Raises
    ------
    InputError
        A template names a value that does not exist.
    """
    from kvbench.figures.style import STRATEGIES

    sequence = [
        name
        for name in study_sequence(study_names)
        if (templates / "studies" / f"{name}.{language}.tex.j2").exists()
    ]
    context = paper_values.section_context(
        values,
        claims,
        lang=language,
        figures=figures,
        has_app=bool(sequence),
        labels={name: look.label for name, look in STRATEGIES.items()},
        authors="kvbench contributors",
    )
    context |= {"figures_dir": "../figures", "studies": sequence}
    documents.write_text_atomic(outputs["numbers"], tex.numbers_tex(values, language))
    for part in ("section", "app_section"):
        text = tex.render(templates / f"{part}.{language}.tex.j2", context)
        documents.write_text_atomic(outputs[part], text)
    documents.write_text_atomic(outputs["main"], tex.render(templates / "main.tex.j2", context))


def drawn(files: Iterable[str]) -> list[str]:
    """Names of the figures among some files."""
    known = set(figure_names())
    return sorted({Path(file).stem for file in files} & known)
