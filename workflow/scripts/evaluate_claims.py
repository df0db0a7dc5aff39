"""Give every claim of config/claims.yaml its verdict from the tables."""

from pathlib import Path

from _job import job
from kvbench.analysis import claims
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``evaluate_claims``."""
    given = snakemake.input
    tables = {
        name: gathering.read_csv(Path(path))
        for name, path in zip(snakemake.params.studies, given.get("studies", []), strict=True)
    }
    tables["kv_quality"] = gathering.read_csv(Path(given.quality))
    rows = claims.evaluate(
        claims.load(Path(given.claims)),
        gathering.read_csv(Path(given.samples)),
        gathering.read_csv(Path(given.summary)),
        tables,
    )
    claims.write(Path(snakemake.output.csv).parent, rows)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
