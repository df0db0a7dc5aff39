# Which cache should a language-model application use, what does it cost, can the number be trusted?
# This page is the table of contents; the stages are in workflow/rules, the library in workflow/kvbench.

from snakemake.utils import min_version

min_version("9.25")


include: "workflow/rules/checkout.smk"


# ------------------------------------------------------------------------------- configuration


include: "workflow/rules/readable.smk"


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"


report: "workflow/report/workflow.rst"


# -------------------------------------------------------------- stages, in the order data flows


include: "workflow/rules/inputs.smk"
include: "workflow/rules/kv_cache.smk"
include: "workflow/rules/app_cache.smk"
include: "workflow/rules/traffic.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/paper.smk"
include: "workflow/rules/publish.smk"
include: "workflow/rules/training.smk"


onstart:
    check_what_comes_late()
    keep_the_scheduler_quiet()


onerror:
    forget_journals()


onsuccess:
    forget_journals()
    print(closing_words())


# ------------------------------------------------------------------------------------- targets


localrules:
    all,
    inputs,
    cells,
    tables,
    figures,
    paper,
    symposium,
    tutorial,


rule all:
    default_target: True
    input:
        PUBLISHED,
        layout.MANIFEST,


rule inputs:
    input:
        kv_inputs(KV_CELLS.values()),


rule cells:
    input:
        KV_RECORDS,
        APP_RECORDS,
        TRAFFIC_RECORDS,


rule tables:
    input:
        TABLES,


rule figures:
    input:
        FIGURES,


rule paper:
    input:
        SECTIONS,
        PDFS,


rule symposium:
    input:
        [file for name in SCENARIO_FIGURES for file in figure_files(name)],


rule tutorial:
    input:
        expand("results/tutorial/tutorial.{language}.html", language=LANGUAGES),
