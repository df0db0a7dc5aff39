# The kv suite: one fresh process per model, scenario, strategy and replicate.


rule measure_kv_cell:
    input:
        model="results/inputs/models/{model}",
        prompts="results/inputs/prompts/{model}/{scenario}.json",
        environment=lambda wildcards: environment_file(kv_cell(wildcards)),
    output:
        "results/cells/kv/{place}/{model}/{scenario}/{strategy}/r{replicate}.json",
    log:
        "logs/cells/kv/{place}/{model}/{scenario}/{strategy}/r{replicate}.log",
    wildcard_constraints:
        replicate=r"\d+",
    priority: kv_priority
    conda:
        BENCH_ENV
    threads: workflow.cores
    resources:
        gpu=lambda wildcards: int(kv_cell(wildcards).device == "cuda"),
    params:
        cell=lambda wildcards: kv_identity(kv_cell(wildcards)),
        quiet_wait_s=quiet_wait_s,
        threads=lambda wildcards: kv_threads(kv_cell(wildcards)),
        software=SOFTWARE,
        code=kv_code,
    message:
        "Measuring {wildcards.strategy} in {wildcards.scenario} with {wildcards.model}, "
        "replicate {wildcards.replicate} (log: {log})"
    script:
        "../scripts/measure_kv_cell.py"


rule measure_aa_process:
    input:
        model=f"results/inputs/models/{CONFIG['aa_test']['model']}",
        prompts=f"results/inputs/prompts/{CONFIG['aa_test']['model']}/insurance_claim_auto.json",
        environment=lambda wildcards: environment_file(aa_cell(wildcards)),
    output:
        "results/cells/aa/{arm}/p{number}.json",
    log:
        "logs/cells/aa/{arm}/p{number}.log",
    wildcard_constraints:
        number=r"\d+",
    priority: aa_priority
    conda:
        BENCH_ENV
    threads: workflow.cores
    resources:
        gpu=lambda wildcards: int(aa_cell(wildcards).device == "cuda"),
    params:
        cell=lambda wildcards: kv_identity(aa_cell(wildcards)),
        quiet_wait_s=quiet_wait_s,
        threads=lambda wildcards: kv_threads(aa_cell(wildcards)),
        software=SOFTWARE,
        code=aa_code,
    message:
        "Testing the instrument: process {wildcards.number} of the arm {wildcards.arm}"
    script:
        "../scripts/measure_kv_cell.py"


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
