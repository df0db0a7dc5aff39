"""Train the embedded model from fresh weights; adapter of kvbench.inputs.training."""

import logging
import sys
from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.inputs import scenarios, training


def progress(line):
    """Write to the log and to the terminal, where somebody watches for twenty minutes."""
    logging.getLogger("kvbench").info("%s", line)
    print(f"train_embedded_model: {line}", file=sys.stderr, flush=True)


def main(snakemake):
    """Run the rule ``train_embedded_model``."""
    loaded = [scenarios.load(Path(path)) for path in snakemake.input.scenarios]
    training.rebuild(
        {scenario.id: scenario for scenario in loaded},
        documents.read_yaml(Path(snakemake.input.rewordings)),
        Path(snakemake.input.tokenizer[0]).parent,
        Path(snakemake.output.weights).parent,
        training.Recipe(seed=snakemake.params.seed, steps=snakemake.params.steps),
        snakemake.threads,
        progress,
    )


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
