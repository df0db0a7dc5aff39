"""Check every recorded machine against its checksums and schemas, once for all rules that read them."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.records import machines


def main(snakemake):
    """Run the rule ``verify_recorded``."""
    verified = {}
    for folder in map(Path, snakemake.params.machines):
        machines.verify(folder)
        verified[folder.name] = documents.sha256_of_file(folder / machines.SUMS)
    documents.write_json(Path(snakemake.output[0]), verified)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
