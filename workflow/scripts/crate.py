"""Pack the finished run as an RO-Crate and read it back."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.publication import crate


def main(snakemake):
    """Run the rule ``crate``."""
    target = Path(snakemake.output[0])
    crate.write(
        target,
        Path(snakemake.params.root),
        [*snakemake.params.sources, *snakemake.input.get("records", [])],
        documents.read_json(Path(snakemake.input.manifest)),
        documents.read_json(Path(snakemake.input.environment)),
    )
    crate.check(target)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
