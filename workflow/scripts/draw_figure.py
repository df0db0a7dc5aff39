"""Draw one figure from its tables."""

import importlib
from pathlib import Path

from _job import job
from kvbench.figures import style
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``draw_figure``."""
    style.apply()
    module = importlib.import_module(f"kvbench.figures.{snakemake.wildcards.name}")
    tables = [gathering.read_csv(Path(path)) for path in snakemake.input]
    style.save(module.draw(*tables), Path(snakemake.output.pdf).with_suffix(""))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
