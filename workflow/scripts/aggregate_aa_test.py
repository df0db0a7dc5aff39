"""Build the table of the instrument's own test."""

from pathlib import Path

from _job import job
from kvbench.analysis import instrument
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``aggregate_aa_test``."""
    machines = gathering.machines(snakemake.params.machines)
    found = gathering.aa_records(snakemake.input.records, machines)
    gathering.write_csv(instrument.evaluate(found), Path(snakemake.output[0]))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
