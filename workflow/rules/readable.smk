# Says in one line why the configuration cannot be read, before Snakemake reads it and shows a traceback.

import sys
from pathlib import Path

sys.path.insert(0, str(Path(str(workflow.current_basedir)).parent))

from kvbench.inputs import readable

DEFAULTS = Path("config/config.yaml")
if DEFAULTS.exists() and (unreadable := readable.problem(DEFAULTS)):
    raise WorkflowError(unreadable)
