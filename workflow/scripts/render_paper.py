"""Render the LaTeX of one language from the values."""

from pathlib import Path

from _job import job
from kvbench.paper import numbers, sections
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``render_paper``."""
    sections.render(
        numbers.read_values(Path(snakemake.input.values)),
        gathering.read_csv(Path(snakemake.input.claims)),
        snakemake.wildcards.language,
        snakemake.params.studies,
        sections.drawn(snakemake.input.figures),
        Path("paper"),
        {name: Path(path) for name, path in snakemake.output.items()},
        Path(snakemake.input.sources),
        Path(snakemake.input.citation),
    )


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
