"""Keep the records of this run under results/recorded/<machine>."""

from pathlib import Path

from _job import job
from kvbench.records import machines


def main(snakemake):
    """Run the rule ``record``."""
    target = machines.record(
        Path("results"),
        Path("results/recorded"),
        snakemake.params.machine,
        files=[Path(path) for path in [*snakemake.input, *snakemake.params.aa]],
    )
    print(f"Recorded in {target}; look at its README.md and commit the folder.", flush=True)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
