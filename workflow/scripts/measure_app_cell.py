"""Measure one cell of an application-cache study and write its record."""

from _job import job
from kvbench.measurement import warm


def main(snakemake):
    """Run the rule ``measure_app_cell``."""
    given, params = snakemake.input, snakemake.params
    cell = {
        "study": snakemake.wildcards.study,
        "cell": snakemake.wildcards.cell,
        "factors": dict(params.factors),
        "timed": params.timed,
        "seed": params.seed,
        "server_url": params.server_url,
        "code_digest": params.code,
        "threads": snakemake.threads,
        "quiet_wait_s": params.quiet_wait_s,
        "libraries": params.libraries,
    }
    files = {"environment_file": str(given.environment), "model_dir": given.get("model")}
    # Untimed cells have one thread each, and the variables that say so are others.
    alone = not (params.timed and params.libraries)
    warm.call(
        "kvbench.studies.measuring._cell",
        "measure",
        str(snakemake.output[0]),
        {name: str(path) if path else None for name, path in files.items()},
        cell,
        libraries=params.libraries,
        alone=alone,
    )


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
