"""What every script of a rule does around its work: log to the rule's log, end with one line."""

import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvbench import processes
from kvbench.errors import InputError


@contextmanager
def job(snakemake):
    """Send logging to the rule's log file; turn a user's mistake into one line and exit code 1."""
    log, logger = Path(str(snakemake.log[0])), logging.getLogger("kvbench")
    # A log that cannot be written must not hide what the job has to say.
    logging.raiseExceptions, logging.lastResort = False, None
    try:
        processes.end_with_parent()
        processes.settle_in(Path(".snakemake", "home"))
        log.parent.mkdir(parents=True, exist_ok=True)
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(filename=log, filemode="w", level=logging.INFO, format=form, force=True)
        yield
    except InputError as error:
        logger.error("%s", error)
        message = str(error)
    except OSError as error:
        # A full disk is the user's to mend, a driver's fault is not: the log says where it was.
        logger.exception("the operating system refused")
        message = f"{error} (where: {log})"
    else:
        return
    print(f"error: {message}", file=sys.stderr, flush=True)
    # sys.exit would be reported with a traceback of the script's wrapper.
    os._exit(1)
