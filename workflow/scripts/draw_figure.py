"""Draw one figure from its tables, in every language."""

import importlib
from pathlib import Path

from _job import job
from kvbench.analysis import selection
from kvbench.figures import style
from kvbench.records import gathering


def main(snakemake):
    """Run the rules ``draw_figure`` and ``draw_scenario_figure``."""
    style.apply()
    module = importlib.import_module(f"kvbench.figures.{snakemake.params.module}")
    tables = [gathering.read_csv(Path(path)) for path in snakemake.input.tables]
    if not getattr(module, "BATCHES", False):
        tables = [selection.single(table) for table in tables]
    figure = module.draw(*tables, *snakemake.params.arguments)
    style.save(figure, Path(snakemake.params.base), *snakemake.params.languages)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
