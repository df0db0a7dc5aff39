"""Plan how many conversations fit, for every model and from a laptop to a fleet."""

from pathlib import Path

import pandas as pd
from _job import job
from kvbench.analysis import capacity
from kvbench.records import gathering


def main(snakemake):
    """Run the rule ``plan_capacity``."""
    measured = gathering.ceilings(snakemake.input.ceilings, {})
    names = [Path(path).stem for path in snakemake.input.models]
    rows = capacity.grid(names, next(iter(measured.values()), None))
    gathering.write_csv(
        pd.DataFrame(rows, columns=list(capacity.COLUMNS)), Path(snakemake.output[0])
    )


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
