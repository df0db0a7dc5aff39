# The suite traffic: request logs replayed, one job per log, model and memory; nothing is timed.


rule replay_traffic:
    input:
        files=lambda wildcards: traffic_cell(wildcards).inputs,
        model=lambda wildcards: f"config/models/{traffic_cell(wildcards).model}.yaml",
        ceilings=lambda wildcards: [] if traffic_cell(wildcards).ceilings else ceilings_files(),
    output:
        "results/cells/traffic/{log}/{setting}.json",
    log:
        "logs/cells/traffic/{log}/{setting}.log",
    priority: 1
    conda:
        "../../envs/app.yaml"
    params:
        cell=lambda wildcards: traffic_cell(wildcards).as_dict(),
        root=str(HERE),
        code=code_of("replay_traffic"),
    message:
        "Replaying the log {wildcards.log} for {wildcards.setting} (log: {log})"
    script:
        "../scripts/replay_traffic.py"


rule aggregate_traffic:
    input:
        records=TRAFFIC_RECORDS,
    output:
        tables=report(
            TRAFFIC_TABLES or "results/tables/traffic_summary.csv",
            caption="../report/traffic_table.rst",
            category="Tables",
            subcategory="Replayed logs",
        ),
    log:
        "logs/analysis/traffic.log",
    priority: 1
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code_of("aggregate_traffic"),
    message:
        "Building the tables of the replayed logs"
    script:
        "../scripts/aggregate_traffic.py"


rule advise_traffic:
    input:
        record="results/cells/traffic/{log}/{setting}.json",
        words=FIGURE_WORDS,
    output:
        advice=expand(
            "results/traffic/{{log}}/{{setting}}/advice.{language}.{suffix}",
            language=LANGUAGES,
            suffix=["md", "html"],
        ),
        figures=expand(
            "results/traffic/{{log}}/{{setting}}/figures/{name}.{language}.{suffix}",
            name=TRAFFIC_FIGURES,
            language=LANGUAGES,
            suffix=["pdf", "svg", "png"],
        ),
    log:
        "logs/analysis/advice-{log}-{setting}.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        languages=LANGUAGES,
        code=code_of("advise_traffic"),
    message:
        "Writing the advice on {wildcards.log} for {wildcards.setting}"
    script:
        "../scripts/advise_traffic.py"
