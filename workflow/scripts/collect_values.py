"""Collect every number the paper prints into values.json."""

from pathlib import Path

from _job import job
from kvbench.paper import numbers, sections
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``collect_values``."""
    given, studies = snakemake.input, snakemake.params.studies
    machines = gathering.machines(snakemake.params.machines)
    values = sections.collect(
        gathering.read_csv(Path(given.summary)),
        gathering.read_csv(Path(given.samples)),
        gathering.read_csv(Path(given.quality)),
        gathering.read_csv(Path(given.profile)),
        {
            name: gathering.read_csv(Path(path))
            for name, path in zip(studies, given.get("studies", []), strict=True)
        },
        gathering.read_csv(Path(given.aa_test)),
        gathering.read_csv(Path(given.claims)),
        gathering.environments(given.get("environments", []), machines),
    )
    numbers.write_values(Path(snakemake.output[0]), values)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
