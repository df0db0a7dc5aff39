# One figure a job, each as PDF for the paper, SVG for the report, PNG for a quick look.


rule draw_figure:
    input:
        figure_tables,
    output:
        pdf="results/figures/{name}.pdf",
        svg=report(
            "results/figures/{name}.svg",
            caption="../report/figure.rst",
            category="Figures",
            labels=figure_labels,
        ),
        png="results/figures/{name}.png",
    log:
        "logs/figures/{name}.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=lambda wildcards: digests.of_figure(wildcards.name),
    message:
        "Drawing {wildcards.name}"
    script:
        "../scripts/draw_figure.py"
