#!/usr/bin/env bash
# Snakemake runs this once after making the environment: compile quanto's kernel now, not in a timed cell.
set -euo pipefail
python -c "
import torch, optimum.quanto
torch.ops.quanto.unpack(torch.tensor([228], dtype=torch.uint8), 2)
" || echo "quanto's extension could not be compiled: its strategies will be reported as unsupported"
