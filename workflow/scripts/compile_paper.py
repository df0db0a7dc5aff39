"""Build the PDF with latexmk or tectonic, whichever is there; shell escape stays off."""

from pathlib import Path

from _job import job
from kvbench.paper import typesetting


def main(snakemake):
    """Run the rule ``compile_paper``."""
    typesetting.compile_pdf(
        Path(snakemake.input.main),
        Path(snakemake.output[0]),
        Path(snakemake.log[0]),
    )


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
