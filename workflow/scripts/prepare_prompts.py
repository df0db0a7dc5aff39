"""Turn one scenario into token ids of one model, and check that they fit its context."""

from pathlib import Path

from _job import job
from kvbench import documents
from kvbench.errors import InputError
from kvbench.inputs import scenarios, tokens
from kvbench.measurement import startup


def main(snakemake):
    """Run the rule ``prepare_prompts``."""
    folder, scenario = Path(snakemake.input.model), scenarios.load(Path(snakemake.input.scenario))
    if scenario.kind == "conversation":
        # Importing torch takes three times as long as all that this job does.
        startup.skip_unused_imports(also=["torch"])
    document = tokens.prompts(folder, scenario)
    allowed = tokens.context_limit(folder)
    for turns, new_tokens, longest in snakemake.params.requests:
        needed = tokens.longest_context(document, turns, new_tokens, longest)
        if allowed and needed > allowed:
            talk = document["kind"] == "conversation"
            remedy = "turns or max_new_tokens" if talk else "max_prompt_tokens"
            raise InputError(
                f"{snakemake.input.scenario}: needs {needed} tokens of context but "
                f"{snakemake.wildcards.model} allows {allowed}; lower kv.experiments[].{remedy}"
            )
    documents.write_json(Path(snakemake.output[0]), document)


if "snakemake" in globals():
    with job(snakemake):
        main(snakemake)
