# One figure a job, in every language, each as PDF for the paper, SVG for the report, PNG for a quick look.


rule draw_figure:
    input:
        tables=figure_tables,
        words=FIGURE_WORDS,
    output:
        report(
            f"results/figures/{{name}}.{LANGUAGES[0]}.svg",
            caption="../report/figure.rst",
            category="Figures",
            labels=figure_labels,
        ),
        [file for file in figure_files("{name}") if not file.endswith(f".{LANGUAGES[0]}.svg")],
    log:
        "logs/figures/{name}.log",
    wildcard_constraints:
        name="|".join(FIGURE_NAMES),
    conda:
        "../../envs/analysis.yaml"
    params:
        module=lambda wildcards: wildcards.name,
        base="results/figures/{name}",
        languages=LANGUAGES,
        arguments=[],
        code=lambda wildcards: digests.of_figure(wildcards.name),
    message:
        "Drawing {wildcards.name}"
    script:
        "../scripts/draw_figure.py"


rule draw_scenario_figure:
    input:
        tables=lambda wildcards: [
            layout.table(name) for name in figure_modules.tables_of(wildcards.module, STUDIES)
        ],
        words=FIGURE_WORDS,
    output:
        report(
            f"results/figures/{{module}}_{{scenario}}.{LANGUAGES[0]}.svg",
            caption="../report/figure.rst",
            category="Figures",
            labels=lambda wildcards: figure_modules.labels(wildcards.module)
            | {"scenario": wildcards.scenario},
        ),
        [
            file
            for file in figure_files("{module}_{scenario}")
            if not file.endswith(f".{LANGUAGES[0]}.svg")
        ],
    log:
        "logs/figures/{module}_{scenario}.log",
    wildcard_constraints:
        module="|".join({module for module, _ in SCENARIO_FIGURES.values()}) or "none",
        scenario="|".join({scenario for _, scenario in SCENARIO_FIGURES.values()}) or "none",
    conda:
        "../../envs/analysis.yaml"
    params:
        module=lambda wildcards: wildcards.module,
        base="results/figures/{module}_{scenario}",
        languages=LANGUAGES,
        arguments=lambda wildcards: [wildcards.scenario],
        code=lambda wildcards: digests.of_figure(wildcards.module),
    message:
        "Drawing {wildcards.module} of {wildcards.scenario}"
    script:
        "../scripts/draw_figure.py"
