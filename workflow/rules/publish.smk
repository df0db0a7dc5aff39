# What a finished run hands on beside the paper: tables for other tools, and a research object.


rule package_tables:
    input:
        tables=CSV_TABLES,
    output:
        package=PACKAGE[0],
        parquet=PACKAGE[1:],
    log:
        "logs/publish/package_tables.log",
    conda:
        "../../envs/publish.yaml"
    params:
        studies=STUDIES,
        traffic=bool(TRAFFIC_CELLS),
        code=code_of("package_tables"),
    message:
        "Describing every table as a data package, with Parquet beside CSV"
    script:
        "../scripts/package_tables.py"


rule spreadsheets:
    input:
        tables=CSV_TABLES,
    output:
        [table.replace("results/tables/", "results/spreadsheets/") for table in CSV_TABLES],
    log:
        "logs/publish/spreadsheets.log",
    conda:
        "../../envs/publish.yaml"
    params:
        code=code_of("spreadsheets"),
    message:
        "Writing the tables as a Portuguese spreadsheet opens them (semicolons, decimal commas)"
    script:
        "../scripts/spreadsheets.py"


rule crate:
    input:
        manifest="results/manifest.json",
        environment="results/inputs/environment/cpu.json",
        records=[*KV_RECORDS, *APP_RECORDS, *TRAFFIC_RECORDS],
    output:
        directory("results/crate"),
    log:
        "logs/publish/crate.log",
    conda:
        "../../envs/publish.yaml"
    params:
        root=str(HERE),
        sources=[
            "Snakefile",
            "README.md",
            "README.pt-BR.md",
            "LICENSE",
            "CITATION.cff",
            "config",
            "docs",
            "envs",
            "workflow",
            *(f"{layout.RECORDED}/{machine.name}" for machine in RECORDED),
        ],
        code=code_of("crate"),
    message:
        "Packing the run as an RO-Crate"
    script:
        "../scripts/crate.py"


rule notebook:
    input:
        code="workflow/notebooks/tutorial.py",
        words="workflow/notebooks/tutorial.{language}.md",
    output:
        notebook="results/tutorial/tutorial.{language}.ipynb",
        page="results/tutorial/tutorial.{language}.html",
    log:
        "logs/publish/tutorial-{language}.log",
    conda:
        "../../envs/publish.yaml"
    threads: workflow.cores
    params:
        code=code_of("notebook"),
    message:
        "Running the tutorial ({wildcards.language})"
    script:
        "../scripts/notebook.py"


rule report:
    input:
        tables=CSV_TABLES,
        claims=layout.claims("csv"),
        figures=[figure for figure in FIGURES if figure.endswith(".png")],
        environments=environment_files(),
        recorded=rules.verify_recorded.output[0],
        templates=report_templates(),
    output:
        [f"results/report.{language}.html" for language in LANGUAGES],
    log:
        "logs/publish/report.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        languages=LANGUAGES,
        studies=STUDIES,
        traffic=bool(TRAFFIC_CELLS),
        machines=[str(machine) for machine in RECORDED],
        pictures=[
            *((name, name, "") for name in FIGURE_NAMES),
            *((name, *drawn) for name, drawn in SCENARIO_FIGURES.items()),
        ],
        code=code_of("report"),
    message:
        "Writing the report: everything on one page"
    script:
        "../scripts/report.py"
