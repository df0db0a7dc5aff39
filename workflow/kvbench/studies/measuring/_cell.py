"""Running one cell of a study: scratch folder, lock, noise, and the record."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
import traceback
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbench import checkout, documents, processes, records, studies
from kvbench.caching import addresses
from kvbench.errors import InputError, Unsupported
from kvbench.measurement import lock, noise, startup
from kvbench.studies.measuring import _known
from kvbench.studies.measuring._rounds import Own

logger = logging.getLogger(__name__)


def measure(output: str, files: Mapping[str, str | None], cell: Mapping[str, Any]) -> None:
    """Measure one cell of a study and write its record: what its job does.

    Parameters
    ----------
    output:
        Path of the record.
    files:
        Paths by the names of :func:`run`'s parameters ``environment_file`` and ``model_dir``.
    cell:
        The other parameters of :func:`run`.
    """
    paths = {name: None if path is None else Path(path) for name, path in files.items()}
    records.write(Path(output), run(**cell, **paths))


def run(
    study: str,
    cell: str,
    factors: Mapping[str, Any],
    timed: bool,
    seed: int,
    server_url: str | None,
    environment_file: Path,
    code_digest: str,
    threads: int,
    quiet_wait_s: float,
    model_dir: Path | None = None,
    libraries: str = "",
) -> dict[str, Any]:
    """Measure one cell of a study and return its record; a failure inside is data.

    Parameters
    ----------
    study, cell, factors, timed:
        The cell as its study planned it.
    seed, server_url:
        Of the ``app`` section; the address may also come from the environment.
    environment_file:
        Facts about the machine.
    code_digest:
        Digest of the code behind the study.
    threads:
        Threads this job may use.
    quiet_wait_s:
        Longest wait for a quiet machine before a timed cell.
    model_dir:
        The local model, for studies that need one.
    libraries:
        Of the cell: imported before, whether or not they were when this process began.

    Raises
    ------
    InputError
        What the user configured is wrong, such as a server that cannot be reached.
    """
    started, begin = records.now(), time.perf_counter()
    facts = documents.read_json(environment_file, "environment")
    # Cells of a study draw the same streams, so that what differs between them is what is compared.
    seed += zlib.crc32(study.encode()) % 100_000
    record: dict[str, Any] = {
        "schema": records.APP_SCHEMA,
        "cell": {
            "suite": "app",
            "study": study,
            "id": cell,
            "factors": dict(factors),
            "timed": timed,
            "seed": seed,
            "threads": threads,
            # Without user and password; null is the embedded server, or none.
            "server": None if server_url is None else addresses.label(server_url),
        },
        "status": "ok",
        "reason": None,
        "rows": [],
        "samples": {},
        "noise": {},
        "environment": {key: facts[key] for key in ("digest", "cpu", "cores", "commit")},
        "code_digest": code_digest,
        "started_at": started,
        "wall_s": 0.0,
    }
    # A short path: the address of a Unix socket has room for about a hundred characters.
    scratch = checkout.scratch()
    guard = lock.machine() if timed else contextlib.nullcontext(0.0)
    try:
        with processes.sigterm_as_exit():
            _import(study, libraries)
        with processes.sigterm_as_exit(), guard as waited:
            known = _known.programs(
                [
                    server_url or os.environ.get("REDIS_URL"),
                    os.environ.get("OPENAI_BASE_URL"),
                ]
            )
            quiet = noise.wait_for_quiet(quiet_wait_s) if timed else 0.0
            own = Own(known or ())
            before = noise.read(own.cpu_s)
            outcome = studies.get(study).measure(
                factors,
                studies.Context(
                    scratch=scratch,
                    seed=seed,
                    server_url=server_url,
                    model_dir=model_dir,
                    known=known,
                ),
            )
            after = noise.read(own.cpu_s)
        record["rows"] = [_plain(row) for row in outcome.rows]
        record["samples"] = _plain(dict(outcome.samples))
        wall = max(after.wall_s - before.wall_s, 1e-9)
        record["noise"] = {
            "others_cores": round(before.others_s(after) / wall, 4),
            "steal_s": round(after.steal_s - before.steal_s, 3),
            "waited_for_lock_s": round(waited, 3),
            "waited_for_quiet_s": round(quiet, 3),
        }
        if known is None:
            record["noise"]["unmarked"] = (
                "no turn is marked as disturbed: a server that was named runs on this machine, and "
                "its time cannot be told from that of other programs"
            )
    except InputError:
        raise
    except Unsupported as error:
        record |= {"status": "unsupported", "reason": str(error)}
    except Exception as error:
        told = addresses.without_secrets(traceback.format_exc(), server_url)
        logger.error("cell failed\n%s", told)
        message = " ".join(addresses.without_secrets(str(error), server_url).split())[:500]
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {message}"}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    record["wall_s"] = round(time.perf_counter() - begin, 3)
    return record


def _import(study: str, libraries: str) -> None:
    """Import the code of a study, and what it measures with.

    The collector then leaves all of it alone, so that its pauses are the same in a process that had the
    libraries from the beginning.
    """
    with startup.collector_paused():
        if libraries:
            startup.import_libraries(libraries)
        studies.get(study).measuring()


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's own; NaN, which JSON cannot hold, as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    json.dumps(value)
    return value
