"""Print the claims, the sources' figures and the measured intervals as a table."""

from pathlib import Path

from _job import job
from kvbench.analysis import claims


def main(snakemake):
    """Run the rule ``claims``."""
    rows = claims.read(Path(snakemake.input[0]))
    print(claims.claims_table(rows), flush=True)
    if snakemake.params.must_hold:
        claims.hold(rows)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
