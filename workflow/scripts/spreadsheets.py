"""Write the tables with semicolons and decimal commas."""

from pathlib import Path

from _job import job
from kvbench.publication import datapackage


def main(snakemake):
    """Run the rule ``spreadsheets``."""
    for table, target in zip(snakemake.input.tables, snakemake.output, strict=True):
        datapackage.write_spreadsheet(Path(table), Path(target))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
