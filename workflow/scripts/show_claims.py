"""Print the claims, the sources' figures and the measured intervals as a table."""

from pathlib import Path

from _job import job
from kvbench.analysis import claims
from kvbench.errors import InputError


def main(snakemake):
    """Run the rule ``claims``."""
    rows = claims.read(Path(snakemake.input[0]))
    print(claims.claims_table(rows), flush=True)
    wrong = claims.unexpected(rows)
    if snakemake.params.must_hold and wrong:
        listed = "; ".join(
            f"{row['id']} ({row['machine'] or 'formula'}) is {row['verdict']}" for row in wrong
        )
        raise InputError(f"config/claims.yaml: verdicts other than expected: {listed}")


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
