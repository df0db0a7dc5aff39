"""Measure one cell of an application-cache study in this fresh process and write its record."""

from pathlib import Path

from _job import job
from kvbench import records
from kvbench.studies.measuring import _cell


def main(snakemake):
    """Run the rule ``measure_app_cell``."""
    record = _cell.run(
        snakemake.wildcards.study,
        snakemake.wildcards.cell,
        snakemake.params.factors,
        snakemake.params.timed,
        snakemake.params.seed,
        snakemake.params.server_url,
        Path(snakemake.input.environment),
        snakemake.params.code,
        snakemake.threads,
        snakemake.params.quiet_wait_s,
        Path(snakemake.input.model) if snakemake.input.get("model") else None,
    )
    records.write(Path(snakemake.output[0]), record)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
