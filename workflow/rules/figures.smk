# Figures of the same tables are one job, in every language, each as PDF for the paper, SVG for the report,
# PNG for a quick look.

for tables, members in FIGURE_GROUPS.items():

    rule:
        name:
            f"draw_{tables}"
        input:
            tables=group_tables(members),
            words=FIGURE_WORDS,
        output:
            [
                report(
                    layout.figure(f"{name}.{LANGUAGES[0]}", "svg"),
                    caption="../report/figure.rst",
                    category="Figures",
                    labels=figure_labels(name),
                )
                for name in members
            ],
            [
                file
                for name in members
                for file in figure_files(name)
                if file != layout.figure(f"{name}.{LANGUAGES[0]}", "svg")
            ],
        log:
            f"logs/figures/{tables}.log",
        # The long jobs first: single figures then fill what is left of the processors.
        priority: int(len(members) > 1)
        conda:
            "../../envs/analysis.yaml"
        params:
            figures=figure_plans(members),
            languages=LANGUAGES,
        message:
            f"Drawing from {tables}: {', '.join(members)}"
        script:
            "../scripts/draw_figures.py"
