# From records to tables and verdicts. Nothing here needs torch or a GPU.


rule verify_recorded:
    input:
        RECORDED_FILES,
    output:
        "results/inputs/recorded.json",
    log:
        "logs/analysis/verify_recorded.log",
    priority: 1
    conda:
        "../../envs/analysis.yaml"
    params:
        machines=[str(machine) for machine in RECORDED],
        code=code_of("verify_recorded"),
    message:
        "Checking the recorded machines against their checksums"
    script:
        "../scripts/verify_recorded.py"


rule aggregate_kv:
    input:
        records=KV_RECORDS,
        ceilings=ceilings_files(),
        aa_test="results/tables/aa_test.csv",
        recorded=rules.verify_recorded.output[0],
    output:
        samples=report(
            "results/tables/kv_samples.csv",
            caption="../report/kv_samples.rst",
            category="Tables",
            labels={"table": "KV cache: every sample"},
        ),
        summary=report(
            "results/tables/kv_summary.csv",
            caption="../report/kv_summary.rst",
            category="Tables",
            labels={"table": "KV cache: one row per cell"},
        ),
        rounds=report(
            "results/tables/kv_rounds.csv",
            caption="../report/kv_rounds.rst",
            category="Tables",
            labels={"table": "KV cache: round by round"},
        ),
        replies=report(
            "results/tables/kv_replies.csv",
            caption="../report/kv_replies.rst",
            category="Tables",
            labels={"table": "KV cache: what the model answered"},
        ),
        quality=report(
            "results/tables/kv_quality.csv",
            caption="../report/kv_quality.rst",
            category="Tables",
            labels={"table": "KV cache: quality of lossy caches"},
        ),
        profile=report(
            "results/tables/kv_profile.csv",
            caption="../report/kv_profile.rst",
            category="Tables",
            labels={"table": "KV cache: where a token's time goes"},
        ),
    log:
        "logs/analysis/aggregate_kv.log",
    priority: 1
    conda:
        "../../envs/analysis.yaml"
    params:
        machines=[str(machine) for machine in RECORDED],
        code=code_of("aggregate_kv"),
    message:
        "Aggregating the records of this run and of the recorded machines"
    script:
        "../scripts/aggregate_kv.py"


rule aggregate_study:
    input:
        records=study_records,
        recorded=rules.verify_recorded.output[0],
    output:
        report(
            "results/tables/app_{study}.csv",
            caption="../report/app_table.rst",
            category="Tables",
            labels={"table": "Application cache: {study}"},
        ),
    log:
        "logs/analysis/app_{study}.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        machines=[str(machine) for machine in RECORDED],
        code=lambda wildcards: digests.of_script("aggregate_study", wildcards.study),
    message:
        "Aggregating the study {wildcards.study}"
    script:
        "../scripts/aggregate_study.py"


rule aggregate_aa_test:
    input:
        records=lambda wildcards: aa_records_present(),
        recorded=rules.verify_recorded.output[0],
    output:
        report(
            "results/tables/aa_test.csv",
            caption="../report/aa_test.rst",
            category="Tables",
            labels={"table": "Test of the instrument (A/A)"},
        ),
    log:
        "logs/analysis/aa_test.log",
    priority: 1
    conda:
        "../../envs/analysis.yaml"
    params:
        machines=[str(machine) for machine in RECORDED],
        code=code_of("aggregate_aa_test"),
    message:
        "Evaluating the test of the instrument"
    script:
        "../scripts/aggregate_aa_test.py"


rule plan_capacity:
    input:
        models=ancient(expand("config/models/{model}.yaml", model=sorted(MODELS))),
        ceilings=ceilings_files(),
    output:
        report(
            "results/tables/capacity.csv",
            caption="../report/capacity.rst",
            category="Tables",
            labels={"table": "Capacity: conversations that fit"},
        ),
    log:
        "logs/analysis/capacity.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        contents={name: model_file(name) for name in sorted(MODELS)},
        code=code_of("plan_capacity"),
    message:
        "Planning capacity from a laptop to a fleet"
    script:
        "../scripts/plan_capacity.py"


rule describe_tables:
    output:
        "results/tables/README.md",
    log:
        "logs/analysis/describe_tables.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        studies=STUDIES,
        traffic=bool(TRAFFIC_CELLS),
        code=code_of("describe_tables"),
    message:
        "Writing what each column of each table means"
    script:
        "../scripts/describe_tables.py"


rule evaluate_claims:
    input:
        claims="config/claims.yaml",
        samples=rules.aggregate_kv.output.samples,
        summary=rules.aggregate_kv.output.summary,
        quality=rules.aggregate_kv.output.quality,
        aa_test=rules.aggregate_aa_test.output[0],
        studies=APP_TABLES,
        environments=environment_files(),
        recorded=rules.verify_recorded.output[0],
    output:
        csv=report(
            "results/claims/claims.csv",
            caption="../report/claims.rst",
            category="Claims",
            labels={"table": "Verdicts"},
        ),
        json="results/claims/claims.json",
        english="results/claims/claims.md",
        portuguese="results/claims/claims.pt.md",
    log:
        "logs/analysis/claims.log",
    priority: 1
    conda:
        "../../envs/analysis.yaml"
    params:
        studies=STUDIES,
        machines=[str(machine) for machine in RECORDED],
        must_hold=CONFIG["claims_must_hold"],
        code=code_of("evaluate_claims"),
    message:
        "Giving every claim its verdict"
    script:
        "../scripts/evaluate_claims.py"


rule claims:
    input:
        rules.evaluate_claims.output.csv,
    log:
        "logs/analysis/show_claims.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code_of("show_claims"),
        must_hold=CONFIG["claims_must_hold"],
    message:
        "Claims, the sources' figures, and what was measured"
    script:
        "../scripts/show_claims.py"


rule record:
    input:
        KV_RECORDS,
        APP_RECORDS,
        ceilings_files(),
        environment_files(),
    log:
        "logs/analysis/record.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code_of("record"),
        machine=CONFIG["machine"],
        aa=lambda wildcards: aa_records_present(),
    message:
        "Keeping this run as a recorded machine"
    script:
        "../scripts/record.py"
