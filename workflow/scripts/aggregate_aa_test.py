"""Build the table of the instrument's own test."""

from pathlib import Path

from _job import job
from kvbench.analysis import instrument
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``aggregate_aa_test``."""
    settings = snakemake.params.settings
    machines = gathering.machines(snakemake.params.machines)
    found = gathering.aa_records(snakemake.input.records, machines)
    table = instrument.evaluate(
        found, settings["replicates"], settings["pairs"], snakemake.params.seed
    )
    gathering.write_csv(table, Path(snakemake.output[0]))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
