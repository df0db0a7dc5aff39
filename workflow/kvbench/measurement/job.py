"""What the job of a block does: measure the block, write its records, and forget its journal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbench import records
from kvbench.measurement import blocks


def measure(
    plan: Mapping[str, Any],
    files: Mapping[str, str],
    digests: Mapping[str, str],
    threads: int,
    outputs: Sequence[str],
) -> None:
    """Measure a block and write the record of each of its cells.

    Parameters
    ----------
    plan, digests, threads:
        As :func:`kvbench.measurement.blocks.measure` takes them.
    files:
        Paths by the names of :class:`kvbench.measurement.blocks.Files`.
    outputs:
        Paths of the records, in the order of the plan's cells.

    Raises
    ------
    InputError
        The inputs are wrong; nothing is written then.
    """
    given = blocks.Files(**{name: Path(path) for name, path in files.items()})
    found = blocks.measure(
        plan, given, digests, threads, progress=logging.getLogger("kvbench").info
    )
    for path, name in zip(outputs, plan["cells"], strict=True):
        records.write(Path(path), found[name])
    # Snakemake deletes what it had no time to book; the journal then writes the same records again.
    # It is removed at the end of the run; where a cell failed, now, so that the block is measured anew
    # when it is asked for again.
    if any(record["status"] not in {"ok", "unsupported"} for record in found.values()):
        given.journal.unlink(missing_ok=True)
