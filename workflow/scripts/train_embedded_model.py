"""Train the embedded model from fresh weights; adapter of kvbench.inputs.training."""

import sys
from pathlib import Path

from kvbench import documents
from kvbench.errors import InputError
from kvbench.inputs import scenarios, training

with Path(snakemake.log[0]).open("w", encoding="utf-8", buffering=1) as log:

    def progress(line: str) -> None:
        """Write to the log and to the terminal."""
        print(line, file=log)
        print(f"train_embedded_model: {line}", file=sys.stderr, flush=True)

    try:
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
    except InputError as error:
        progress(f"error: {error}")
        raise SystemExit(1) from None
