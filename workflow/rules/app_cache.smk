# The app suite: one job per cell of a study; timed ones take the whole machine.


rule measure_app_cell:
    input:
        environment=layout.environment("cpu"),
        model=app_inputs,
    output:
        "results/cells/app/{study}/{cell}.json",
    log:
        "logs/cells/app/{study}/{cell}.log",
    priority: app_priority
    conda:
        "../../envs/app.yaml"
    threads: app_threads
    params:
        factors=lambda wildcards: dict(app_cell(wildcards).factors),
        timed=lambda wildcards: app_cell(wildcards).timed,
        seed=CONFIG["app"]["seed"],
        server_url=server_url,
        server=app_server,
        reads=app_reads,
        quiet_wait_s=quiet_wait_s,
        libraries=app_libraries,
        threads=app_threads,
        software=SOFTWARE,
        code=app_code,
    message:
        "Measuring {wildcards.cell} of the study {wildcards.study} (log: {log})"
    script:
        "../scripts/measure_app_cell.py"
