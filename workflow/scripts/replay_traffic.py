"""Replay one request log for one model and memory and write its record."""

from pathlib import Path

from _job import job
from kvbench.traffic import cells


def main(snakemake):
    """Run the rule ``replay_traffic``."""
    record = cells.run(
        snakemake.params.cell,
        [Path(path) for path in snakemake.input.get("ceilings", [])],
        snakemake.params.code,
        Path(snakemake.params.root),
    )
    cells.write(Path(snakemake.output[0]), record)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
