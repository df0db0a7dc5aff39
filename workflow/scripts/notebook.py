"""Put the tutorial together in one language, run it, and write it as notebook and page."""

from pathlib import Path

from _job import job
from kvbench.publication import tutorial


def main(snakemake):
    """Run the rule ``notebook``."""
    language = snakemake.wildcards.language
    notebook = tutorial.build(Path(snakemake.input.code), Path(snakemake.input.words), language)
    tutorial.run(notebook, Path())
    tutorial.write(notebook, Path(snakemake.output.notebook))
    tutorial.page(notebook, Path(snakemake.output.page), language)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
