# The kv suite: a job is a block, whose strategies live side by side and take turns. Its records are
# its outputs, so that asking for one of them measures the block that it belongs to. One rule per
# experiment of the configuration: measure_kv_<experiment>, a hyphen in the name becoming a _.

for experiment, blocks in KV_EXPERIMENTS.items():

    rule:
        name:
            "measure_kv_" + experiment.replace("-", "_")
        input:
            model=block_input(experiment, model_folder),
            prompts=block_input(experiment, prompts_file),
            environment=block_input(experiment, environment_input),
        output:
            block_outputs(blocks),
        log:
            f"logs/cells/kv/{experiment}/{{where}}/r{{replicate}}.log",
        wildcard_constraints:
            where=any_of(place_of(block) for block in blocks),
            replicate=any_of(block.first.replicate for block in blocks),
        priority: block_input(experiment, kv_priority)
        conda:
            BENCH_ENV
        threads: workflow.cores
        resources:
            gpu=block_input(experiment, gpus),
        params:
            block=block_input(experiment, block_plan),
            quiet_wait_s=quiet_wait_s,
            threads=block_input(experiment, block_threads),
            software=SOFTWARE,
            code=block_input(experiment, block_code),
            journal=block_input(experiment, block_journal),
        message:
            "Measuring a block: {params.block[members]} in {wildcards.where}, "
            "replicate {wildcards.replicate} (log: {log})"
        script:
            "../scripts/measure_kv_block.py"


rule measure_aa_block:
    input:
        model=aa_input(model_folder),
        prompts=aa_input(prompts_file),
        environment=aa_input(environment_input),
    output:
        AA_OUTPUTS,
    log:
        "logs/cells/aa/b{number}.log",
    wildcard_constraints:
        number=r"\d+",
    priority: aa_input(aa_priority)
    conda:
        BENCH_ENV
    threads: workflow.cores
    resources:
        gpu=aa_input(gpus),
    params:
        block=aa_input(block_plan),
        quiet_wait_s=quiet_wait_s,
        threads=aa_input(block_threads),
        software=SOFTWARE,
        code=aa_input(block_code),
        journal=aa_input(block_journal),
    message:
        "Testing the instrument: block {wildcards.number}, {params.block[members]}"
    script:
        "../scripts/measure_kv_block.py"


rule aa_test:
    input:
        AA_RECORDS,
    output:
        "results/cells/aa/done",
    log:
        "logs/analysis/aa_test_done.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code_of("show_aa_test"),
    message:
        "The instrument against itself"
    script:
        "../scripts/show_aa_test.py"
