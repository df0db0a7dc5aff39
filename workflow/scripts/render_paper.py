"""Render the LaTeX of one language from the values."""

from pathlib import Path

from _job import job
from kvbench import gathering, paper_values, publishing


def main(snakemake):
    """Run the rule ``render_paper``."""
    publishing.render(
        paper_values.read_values(Path(snakemake.input.values)),
        gathering.read_csv(Path(snakemake.input.claims)),
        snakemake.wildcards.language,
        snakemake.params.studies,
        publishing.drawn(snakemake.input.figures),
        Path("paper"),
        {name: Path(path) for name, path in snakemake.output.items()},
    )


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
