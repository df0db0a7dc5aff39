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
    # Libraries that have seen a GPU do not survive a fork.
    on_gpu = any(cell["device"] != "cpu" for cell in plan["cells"].values())
    warm.call("kvbench.measurement.job", "measure", *work, alone=on_gpu)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
