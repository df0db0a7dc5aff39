"""Turn one scenario into token ids of one model, and check that they fit its context."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.errors import InputError
from kvbench.inputs import models, scenarios


def main(snakemake):
    """Run the rule ``prepare_prompts``."""
    folder = Path(snakemake.input.model)
    document = models.prompts(folder, scenarios.load(Path(snakemake.input.scenario)))
    allowed = documents.read_json(folder / "config.json").get("max_position_embeddings")
    for turns, new_tokens in snakemake.params.requests:
        needed = models.longest_context(document, turns, new_tokens)
        if document["kind"] == "conversation" and allowed and needed > allowed:
            raise InputError(
                f"{snakemake.input.scenario}: {turns} turns of {new_tokens} new tokens need {needed} "
                f"tokens of context but {snakemake.wildcards.model} allows {allowed}; lower "
                "kv.experiments[].turns or max_new_tokens"
            )
    documents.write_json(Path(snakemake.output[0]), document)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
