"""Measure what a device can do at best, alone on the machine."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.layout import DEFAULT_DTYPE
from kvbench.measurement import ceilings, lock, noise


def main(snakemake):
    """Run the rule ``measure_ceilings``."""
    import torch

    device = snakemake.wildcards.device
    dtype = snakemake.wildcards.variant.removeprefix("-") or DEFAULT_DTYPE[device]
    if device == "cpu":
        torch.set_num_threads(snakemake.threads)
    with lock.machine():
        noise.wait_for_quiet(snakemake.params.quiet_wait_s)
        documents.write_json(Path(snakemake.output[0]), ceilings.measure(device, dtype))


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
