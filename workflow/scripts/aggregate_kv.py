"""Build the KV tables from this run and the recorded machines."""

from pathlib import Path

from _job import job
from kvbench.analysis import instrument, tables
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``aggregate_kv``."""
    machines = gathering.machines(snakemake.params.machines)
    found = gathering.kv_records(snakemake.input.records, machines)
    ceilings = gathering.ceilings(snakemake.input.ceilings, machines)
    aa_test = gathering.read_csv(Path(snakemake.input.aa_test))
    needed = {machine: instrument.evidence(aa_test, machine) for machine in found}
    samples, summary = tables.kv_tables(found, ceilings, needed)
    gathering.write_csv(samples, Path(snakemake.output.samples))
    gathering.write_csv(summary, Path(snakemake.output.summary))
    gathering.write_csv(tables.round_table(found), Path(snakemake.output.rounds))
    gathering.write_csv(tables.reply_table(found), Path(snakemake.output.replies))
    gathering.write_csv(tables.quality_table(found, summary), Path(snakemake.output.quality))
    gathering.write_csv(tables.profile_table(found, ceilings), Path(snakemake.output.profile))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
