# Takes part in the checkout before anything large is imported: a run that is killed then leaves nothing unnoted.

import sys
from pathlib import Path

sys.path.insert(0, str(Path(str(workflow.current_basedir)).parent))

from kvbench import checkout, processes
from kvbench.errors import InputError

if workflow.is_main_process:
    # Snakemake asks for the user's name before its first job.
    processes.settle_in(Path(".snakemake", "home"))
    try:
        for line in checkout.enter(temporary=workflow.snakemake_tmp_dir):
            print(line, file=sys.stderr)
    except InputError as error:
        raise WorkflowError(str(error)) from None
elif workflow.subprocess_exec:
    checkout.follow()
else:
    checkout.lead()
checkout.note(workflow.snakemake_tmp_dir)
