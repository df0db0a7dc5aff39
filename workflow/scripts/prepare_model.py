"""Build, copy or download one model into a folder in Hugging Face format."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.inputs import models


def main(snakemake):
    """Run the rule ``prepare_model``."""
    document = documents.read_yaml(Path(snakemake.input[0]))
    models.prepare(document, Path(snakemake.output[0]), Path(snakemake.params.root))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
