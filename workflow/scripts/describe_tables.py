"""Write results/tables/README.md: what each column means, and its unit."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.analysis import tables
from kvbench.publication import columns


def main(snakemake):
    """Run the rule ``describe_tables``."""
    described = columns.described(snakemake.params.studies, snakemake.params.traffic)
    documents.write_text_atomic(Path(snakemake.output[0]), tables.columns_readme(described))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
