"""Describe the tables as a data package that validates, and write each as Parquet too."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.publication import columns, datapackage


def main(snakemake):
    """Run the rule ``package_tables``."""
    package = Path(snakemake.output.package)
    described = columns.described(snakemake.params.studies, snakemake.params.traffic)
    named = {Path(table).name: described[Path(table).name] for table in snakemake.input.tables}
    documents.write_json(package, datapackage.describe(named, package.parent))
    datapackage.check(package)
    for table, target in zip(snakemake.input.tables, snakemake.output.parquet, strict=True):
        datapackage.write_parquet(Path(table), Path(target))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
