"""Measure one block of the kv suite, its cells taking turns, and write their records."""

from _job import job
from kvbench.measurement import warm


def main(snakemake):
    """Run one of the rules that measure a block."""
    given, plan = snakemake.input, dict(snakemake.params.block)
    work = (
        plan | {"quiet_wait_s": snakemake.params.quiet_wait_s},
        {
            "model": str(given.model),
            "prompts": str(given.prompts),
            "environment": str(given.environment),
            "journal": str(snakemake.params.journal),
        },
        dict(snakemake.params.code),
        snakemake.threads,
        [str(path) for path in snakemake.output],
    )
    cell = next(iter(plan["cells"].values()))
    # Libraries that have seen a GPU do not survive a fork. And a replicate is there to differ in whatever
    # two starts of the libraries differ in.
    alone = cell["device"] != "cpu" or cell["replicate"] > 1
    warm.call("kvbench.measurement.job", "measure", *work, alone=alone)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
