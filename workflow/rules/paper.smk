# Numbers into LaTeX, LaTeX into PDF, and the list of everything that is published.


rule collect_values:
    input:
        samples=rules.aggregate_kv.output.samples,
        summary=rules.aggregate_kv.output.summary,
        quality=rules.aggregate_kv.output.quality,
        profile=rules.aggregate_kv.output.profile,
        studies=APP_TABLES,
        aa_test=rules.aggregate_aa_test.output[0],
        claims=rules.evaluate_claims.output.csv,
        environments=environment_files(),
        recorded=rules.verify_recorded.output[0],
    output:
        "results/paper/values.json",
    log:
        "logs/paper/values.log",
    priority: 1
    conda:
        "../../envs/analysis.yaml"
    params:
        studies=STUDIES,
        machines=[str(machine) for machine in RECORDED],
        code=code_of("collect_values"),
    message:
        "Collecting every number the paper prints"
    script:
        "../scripts/collect_values.py"


rule render_paper:
    input:
        values=rules.collect_values.output[0],
        claims=rules.evaluate_claims.output.csv,
        figures=FIGURES,
        sources="config/claims.yaml",
        citation="CITATION.cff",
        templates=paper_templates(),
    output:
        numbers="results/paper/numbers.{language}.tex",
        section="results/paper/section.{language}.tex",
        app_section="results/paper/app_section.{language}.tex",
        appendix="results/paper/appendix.{language}.tex",
        main="results/paper/main.{language}.tex",
    log:
        "logs/paper/render-{language}.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        studies=STUDIES,
        code=code_of("render_paper"),
    message:
        "Rendering the paper ({wildcards.language})"
    script:
        "../scripts/render_paper.py"


rule compile_paper:
    input:
        numbers=rules.render_paper.output.numbers,
        section=rules.render_paper.output.section,
        app_section=rules.render_paper.output.app_section,
        appendix=rules.render_paper.output.appendix,
        main=rules.render_paper.output.main,
        bibliography="paper/references.bib",
        figures=lambda wildcards: [
            figure for figure in FIGURES if figure.endswith(f".{wildcards.language}.pdf")
        ],
    output:
        report(
            "results/paper/paper.{language}.pdf",
            caption="../report/paper.rst",
            category="Paper",
            labels={"document": "Paper ({language})"},
        ),
    log:
        "logs/paper/compile-{language}.log",
    conda:
        "../../envs/paper.yaml"
    params:
        code=code_of("compile_paper"),
    message:
        "Building the PDF ({wildcards.language})"
    script:
        "../scripts/compile_paper.py"


rule write_manifest:
    input:
        PUBLISHED,
    output:
        "results/manifest.json",
    log:
        "logs/paper/manifest.log",
    conda:
        "../../envs/analysis.yaml"
    params:
        code=code_of("write_manifest"),
        rules=lambda wildcards: published_by(),
    message:
        "Writing the checksums of everything that is published"
    script:
        "../scripts/write_manifest.py"
