"""Measure one cell of the kv suite in this fresh process and write its record."""

import logging
from pathlib import Path

from _job import job
from kvbench import records
from kvbench.measurement import conversation


def main(snakemake):
    """Run the rule ``measure_kv_cell``."""
    record = conversation.run_cell(
        {**snakemake.params.cell, "quiet_wait_s": snakemake.params.quiet_wait_s},
        Path(snakemake.input.model),
        Path(snakemake.input.prompts),
        Path(snakemake.input.environment),
        snakemake.params.code,
        snakemake.threads,
        progress=logging.getLogger("kvbench").info,
    )
    records.write(Path(snakemake.output[0]), record)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
