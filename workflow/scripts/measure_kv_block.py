"""Measure one block of the kv suite, its cells taking turns, and write their records."""

import logging
from pathlib import Path

from _job import job
from kvbench import records
from kvbench.measurement import blocks


def main(snakemake):
    """Run one of the rules that measure a block."""
    given, plan = snakemake.input, dict(snakemake.params.block)
    journal = Path(snakemake.params.journal)
    found = blocks.measure(
        plan | {"quiet_wait_s": snakemake.params.quiet_wait_s},
        blocks.Files(Path(given.model), Path(given.prompts), Path(given.environment), journal),
        dict(snakemake.params.code),
        snakemake.threads,
        progress=logging.getLogger("kvbench").info,
    )
    for path, name in zip(snakemake.output, plan["cells"], strict=True):
        records.write(Path(path), found[name])
    # Snakemake deletes what it had no time to book; the journal then writes the same records again.
    # It is removed at the end of the run. Why a cell failed stands in no journal.
    if any(record["status"] not in {"ok", "unsupported"} for record in found.values()):
        journal.unlink(missing_ok=True)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
