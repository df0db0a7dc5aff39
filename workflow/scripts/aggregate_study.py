"""Build the table of one application-cache study."""

from pathlib import Path

from _job import job
from kvbench import studies
from kvbench.analysis import tables
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``aggregate_study``."""
    study = studies.get(snakemake.wildcards.study)
    machines = gathering.machines(snakemake.params.machines)
    found = gathering.app_records(study.name, snakemake.input.records, machines)
    table = tables.app_table(study.columns, found, study.aggregate)
    gathering.write_csv(table, Path(snakemake.output[0]))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
