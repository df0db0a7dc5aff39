"""Build the tables of all replayed logs."""

from pathlib import Path

from _job import job
from kvbench.traffic import cells, tables


def main(snakemake):
    """Run the rule ``aggregate_traffic``."""
    found = [cells.read(Path(path)) for path in sorted(snakemake.input.records)]
    tables.write(Path(snakemake.output[0]).parent, found)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
