"""Write the advice on one replayed log, with its figures, in every language."""

from pathlib import Path

from _job import job
from kvbench.traffic import advise, cells


def main(snakemake):
    """Run the rule ``advise_traffic``."""
    record = cells.read(Path(snakemake.input[0]))
    folder = Path(snakemake.output.advice[0]).parent
    advise.draw(folder / "figures", record, *snakemake.params.languages)
    for language in snakemake.params.languages:
        advise.write_advice(folder, record, language)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
