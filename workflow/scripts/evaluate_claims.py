"""Give every claim of config/claims.yaml its verdict from the tables."""

from pathlib import Path

from _job import job
from kvbench.analysis import claims, instrument
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``evaluate_claims``."""
    given = snakemake.input
    tables = {
        name: gathering.read_csv(Path(path))
        for name, path in zip(snakemake.params.studies, given.get("studies", []), strict=True)
    }
    tables["kv_quality"] = gathering.read_csv(Path(given.quality))
    summary = gathering.read_csv(Path(given.summary))
    aa_test = gathering.read_csv(Path(given.aa_test))
    rows = claims.evaluate(
        claims.load(Path(given.claims)),
        gathering.read_csv(Path(given.samples)),
        summary,
        tables,
        {machine: instrument.evidence(aa_test, machine) for machine in summary["machine"].unique()},
    )
    recorded = gathering.machines(snakemake.params.machines)
    facts = gathering.environments(given.get("environments", []), recorded)
    claims.write(Path(snakemake.output.csv).parent, rows, facts, Path(given.claims))
    if snakemake.params.must_hold:
        claims.hold(rows)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
