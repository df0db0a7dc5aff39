"""Evaluate and print the test of the instrument."""

from pathlib import Path

from _job import job
from kvbench.analysis import instrument
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``aa_test``."""
    table = instrument.evaluate(gathering.aa_records(map(str, snakemake.input), {}))
    print(table.to_string(index=False), flush=True)
    Path(snakemake.output[0]).touch()


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
