"""What every script of a rule does around its work: log to the rule's log, end with one line."""

import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvbench.errors import InputError


@contextmanager
def job(snakemake):
    """Send logging to the rule's log file; turn a user's mistake into one line and exit code 1."""
    log = Path(str(snakemake.log[0]))
    log.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=log,
        filemode="w",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    try:
        yield
    except (InputError, OSError) as error:
        logging.getLogger("kvbench").error("%s", error)
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        # sys.exit would be reported with a traceback of the script's wrapper.
        os._exit(1)
