# The embedded model, trained anew; no other rule asks for what is written here, so it never runs by itself.
# About 20 minutes on one processor core that others leave alone, less where a GPU is found.

from pathlib import Path


rule train_embedded_model:
    input:
        scenarios=sorted(str(path) for path in Path("config/scenarios").glob("*.yaml")),
        rewordings="resources/embedded-llama/training/rewordings.yaml",
        tokenizer=collect(
            "resources/embedded-llama/{name}",
            name=[
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
                "special_ids.json",
            ],
        ),
    output:
        weights="results/embedded-llama/model.safetensors",
        config="results/embedded-llama/config.json",
        sums="results/embedded-llama/SHA256SUMS",
        card="results/embedded-llama/README.md",
        loss="results/embedded-llama/training/loss.csv",
    log:
        "results/logs/train_embedded_model.log",
    conda:
        "../../envs/bench-cpu.yaml"
    threads: 1
    params:
        code=code_of("train_embedded_model"),
        seed=2025,
        steps=750,
    message:
        "Training the embedded model, up to {params.steps} steps, about 20 minutes; watch {log}"
    script:
        "../scripts/train_embedded_model.py"
