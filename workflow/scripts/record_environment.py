"""Write the facts of this machine for one device."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.measurement import environment


def main(snakemake):
    """Run the rule ``record_environment``."""
    facts = environment.describe(snakemake.wildcards.device, Path.cwd())
    documents.write_json(Path(snakemake.output[0]), facts)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
