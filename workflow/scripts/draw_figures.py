"""Draw the figures of some tables, in every language."""

from pathlib import Path

from _job import job
from kvbench.figures import _drawing


def main(snakemake):
    """Run a rule ``draw_<tables>``."""
    _drawing.draw(
        {name: _drawing.Plan(**plan) for name, plan in snakemake.params.figures.items()},
        Path(snakemake.output[0]).parent,
        snakemake.params.languages,
        [Path(path) for path in snakemake.input.words],
    )


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
