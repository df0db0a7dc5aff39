# Inputs of the measurements: the machine and what it can do, models, and token ids.


rule record_environment:
    output:
        "results/inputs/environment/{device}.json",
    log:
        "logs/inputs/environment-{device}.log",
    conda:
        BENCH_ENV
    params:
        software=SOFTWARE,
        code=code_of("record_environment"),
    message:
        "Recording the facts of this machine ({wildcards.device})"
    script:
        "../scripts/record_environment.py"


rule measure_ceilings:
    input:
        rules.record_environment.output[0],
    output:
        "results/inputs/ceilings/{device}{variant}.json",
    log:
        "logs/inputs/ceilings-{device}{variant}.log",
    wildcard_constraints:
        device="cpu|cuda",
        variant="|-float32|-float16|-bfloat16",
    # Before the cells: they do not ask for this file, so that other ceilings make no cell out of date. As
    # an ancient input it would keep Snakemake from seeing that a cell's own parameters changed.
    priority: 1000000
    conda:
        BENCH_ENV
    threads: workflow.cores
    params:
        quiet_wait_s=quiet_wait_s,
        threads=lambda wildcards: workflow.cores if wildcards.device == "cpu" else None,
        software=SOFTWARE,
        code=code_of("measure_ceilings"),
    message:
        "Measuring what this machine can do at best ({wildcards.device}{wildcards.variant})"
    script:
        "../scripts/measure_ceilings.py"


rule prepare_model:
    input:
        ancient("config/models/{model}.yaml"),
    output:
        directory("results/inputs/models/{model}"),
    log:
        "logs/inputs/model-{model}.log",
    conda:
        "../../envs/bench-cpu.yaml"
    params:
        root=str(HERE),
        contents=model_contents,
        code=code_of("prepare_model"),
    message:
        "Preparing the model {wildcards.model}"
    script:
        "../scripts/prepare_model.py"


rule prepare_prompts:
    input:
        scenario=ancient("config/scenarios/{scenario}.yaml"),
        model=rules.prepare_model.output[0],
    output:
        "results/inputs/prompts/{model}/{scenario}.json",
    log:
        "logs/inputs/prompts-{model}-{scenario}.log",
    conda:
        "../../envs/bench-cpu.yaml"
    params:
        code=code_of("prepare_prompts"),
        requests=requests_of,
        contents=lambda wildcards: scenario_contents(wildcards.scenario),
    message:
        "Turning {wildcards.scenario} into tokens of {wildcards.model}"
    script:
        "../scripts/prepare_prompts.py"
