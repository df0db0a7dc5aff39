# The configuration, checked, and everything that follows from it: cells, files, helper functions.

import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(str(workflow.current_basedir)).parent.parent
sys.path.insert(0, str(ROOT / "workflow"))
# The report shows parameters: they name no folder of this machine.
HERE = Path(os.path.relpath(ROOT))

from kvbench import documents, figures as figure_modules, layout, studies
from kvbench.errors import InputError
from kvbench.analysis import instrument
from kvbench.caching import addresses
from kvbench.inputs import configuration
from kvbench.measurement import environment
from kvbench.records import digests, gathering
from kvbench.traffic import cells as traffic, columns as traffic_columns


def stop(error):
    """End with one line instead of a traceback: what the user wrote is wrong."""
    raise WorkflowError(str(error))


def config_source():
    """The file that a message about the configuration should name: the last one given."""
    given = [*workflow.config_settings.configfiles] or [*workflow.configfiles]
    return str(given[-1]) if given else "config"


def load():
    """Check the configuration with everything it names, and plan the cells."""
    for path in {*workflow.configfiles, *workflow.config_settings.configfiles}:
        # Snakemake keeps the last of two equal keys without a word.
        documents.read_yaml(Path(path))
    filled = configuration.fill(config, config_source())
    scenarios, models = configuration.load_scenarios_and_models(ROOT / "config")
    # A name that is wrong in a suite that is left out would be found on the day it is taken in.
    kv_blocks = configuration.plan_kv(filled, scenarios, models, config_source())
    app_cells = configuration.plan_app(filled, models, config_source())
    kv_blocks = kv_blocks if "kv" in filled["suites"] else {}
    app_cells = app_cells if "app" in filled["suites"] else {}
    replayed = "traffic" in filled["suites"]
    traffic_cells = traffic.plan(filled, models, config_source(), files=replayed)
    traffic_cells = traffic_cells if replayed else {}
    aa_blocks = configuration.plan_aa(filled, models, config_source())
    return filled, scenarios, models, kv_blocks, app_cells, traffic_cells, aa_blocks


try:
    CONFIG, SCENARIOS, MODELS, KV_BLOCKS, APP_CELLS, TRAFFIC_CELLS, AA_BLOCKS = load()
    RECORDED = gathering.list_machines(HERE / layout.RECORDED, CONFIG["recorded"], config_source())
except InputError as error:
    stop(error)

if workflow.is_main_process and addresses.secrets_of(CONFIG["app"]["server_url"] or ""):
    print(
        f"{config_source()}: app.server_url holds a password, and Snakemake's own report shows configuration"
        " files as they are; put the address into the variable REDIS_URL instead",
        file=sys.stderr,
    )

KV_CELLS = configuration.cells_of(KV_BLOCKS.values())
KV_ORDER = configuration.measuring_order(KV_BLOCKS, CONFIG["kv"]["seed"])
AA_ORDER = configuration.measuring_order(AA_BLOCKS, CONFIG["kv"]["seed"])
# One rule an experiment, as its blocks differ in place, model, scenario and replicate only.
KV_EXPERIMENTS = {}
for block in KV_BLOCKS.values():
    KV_EXPERIMENTS.setdefault(block.first.experiment, []).append(block)
# Other packages may give other times: what is measured depends on them.
SOFTWARE = environment.software(ROOT / "envs" / "requirements.lock")

# ------------------------------------------------------------------------------ files by stage

KV_RECORDS = [layout.kv_record(key) for key in sorted(KV_CELLS)]
AA_RECORDS = [layout.aa_record(key) for key in sorted(configuration.cells_of(AA_BLOCKS.values()))]
APP_RECORDS = [layout.app_record(study, cell) for study in APP_CELLS for cell in APP_CELLS[study]]
TRAFFIC_RECORDS = [layout.traffic_record(key) for key in sorted(TRAFFIC_CELLS)]
CELL_RECORDS = {*KV_RECORDS, *AA_RECORDS, *APP_RECORDS, *TRAFFIC_RECORDS, "results/cells/aa/done"}
# Every file of a recorded machine is an input: an altered one must be noticed.
RECORDED_FILES = [str(path) for machine in RECORDED for path in gathering.files_of(machine)]
# Snakemake's environments are per rule: one CUDA block makes the measuring jobs use the GPU one.
ON_GPU = "cuda" in {cell.device for cell in KV_CELLS.values()}
BENCH_ENV = "../../envs/bench-gpu.yaml" if ON_GPU else "../../envs/bench-cpu.yaml"
STUDIES = sorted({*APP_CELLS, *gathering.studies_of(RECORDED)})
APP_TABLES = [layout.table(f"app_{study}") for study in STUDIES]
TRAFFIC_TABLES = [
    layout.table(name) for name in (traffic_columns.described() if TRAFFIC_CELLS else ())
]
TABLES = [
    *(
        layout.table(f"kv_{name}")
        for name in ("samples", "summary", "rounds", "replies", "quality", "profile")
    ),
    *APP_TABLES,
    *TRAFFIC_TABLES,
    layout.table("capacity"),
    layout.table("aa_test"),
    "results/tables/README.md",
]
CSV_TABLES = [table for table in TABLES if table.endswith(".csv")]
PACKAGE = [
    "results/tables/datapackage.json",
    *(table.replace(".csv", ".parquet") for table in CSV_TABLES),
]
CLAIMS = [layout.claims(suffix) for suffix in ("csv", "json", "md")]
FIGURE_NAMES = figure_modules.drawable(STUDIES, traffic=bool(TRAFFIC_CELLS))
TRAFFIC_FIGURES = [name for name in FIGURE_NAMES if name.startswith("traffic_")]
# The three strategies of the symposium's figure, in every scenario that is measured or recorded.
SCENARIO_FIGURES = figure_modules.by_scenario(
    {cell.scenario for cell in KV_CELLS.values() if cell.batch == 1}
    | {
        path.name
        for machine in RECORDED
        for path in machine.glob("cells/kv/*/*/*")
        if layout.batch_of(path.name)[1] == 1
    }
)
# A figure's name to its module and what the module draws it for.
FIGURE_MODULES = {name: [name] for name in FIGURE_NAMES} | {
    name: list(drawn) for name, drawn in SCENARIO_FIGURES.items()
}
FIGURE_GROUPS = figure_modules.together(
    {name: drawing for name, (drawing, *_) in FIGURE_MODULES.items()}, STUDIES
)
LANGUAGES = CONFIG["languages"]


def figure_files(name):
    """Files of a figure: one set per language."""
    return [
        layout.figure(f"{name}.{language}", suffix)
        for language in LANGUAGES
        for suffix in ("pdf", "svg", "png")
    ]


FIGURES = [file for name in FIGURE_MODULES for file in figure_files(name)]
FIGURE_WORDS = sorted(str(path) for path in HERE.glob("workflow/kvbench/figures/words.*.yaml"))
SECTIONS = [layout.VALUES] + [
    layout.paper(part, language)
    for language in LANGUAGES
    for part in ("numbers", "section", "app_section", "appendix", "main")
]
LATEX = shutil.which("latexmk") or shutil.which("tectonic")
WITH_CONDA = "conda" in {
    str(method.name).lower() for method in workflow.deployment_settings.deployment_method
}
ADVICE = [
    f"results/traffic/{key}/advice.{language}.{suffix}"
    for key in sorted(TRAFFIC_CELLS)
    for language in LANGUAGES
    for suffix in ("md", "html")
]
PDFS = [layout.pdf(language) for language in LANGUAGES]
PUBLISHED = [
    *TABLES,
    *PACKAGE,
    *CLAIMS,
    *FIGURES,
    *ADVICE,
    *SECTIONS,
    *(PDFS if LATEX or WITH_CONDA else []),
]


for target in sys.argv[1:]:
    # Looked for on the command line: an error inside an input function is shown with its traceback.
    if target.startswith("results/cells/") and target not in CELL_RECORDS:
        stop(
            f"{config_source()}: {target} is no planned cell; name its model, scenario and strategy in "
            "kv.experiments, or its factors in app.studies"
        )


# ----------------------------------------------------------------------------- helper functions


def code_of(script):
    """The parameter by which a rule runs again when the code behind its script changed."""
    return lambda wildcards: digests.of_script(script)


def quiet_wait_s(wildcards, threads):
    """The longest wait for a quiet machine.

    Snakemake compares no parameter that is a function of the threads: waiting longer measures nothing anew.
    """
    return CONFIG["kv"]["quiet_wait_s"]


def any_of(values):
    """A wildcard's constraint: one of some texts."""
    return "|".join(sorted({re.escape(str(value)) for value in values}))


def traffic_cell(wildcards):
    """The planned replay behind a record's path."""
    return TRAFFIC_CELLS[f"{wildcards.log}/{wildcards.setting}"]


def place_of(block):
    """The folder of a block's records, without strategy and replicate."""
    cell = block.first
    return f"{cell.place}/{cell.model}/{cell.workload}"


def block_outputs(blocks):
    """The records of an experiment's blocks, with wildcards for what the blocks differ in."""
    return [
        layout.kv_record(f"{{where}}/{cell.strategy}/r{{replicate}}") for cell in blocks[0].cells
    ]


def block_input(experiment, function):
    """A function of a block as one of the wildcards of its experiment's rule."""
    return lambda wildcards: function(
        KV_BLOCKS[f"{experiment}/{wildcards.where}/r{wildcards.replicate}"]
    )


def aa_input(function):
    """A function of a block as one of the wildcards of the instrument's test."""
    blocks = {str(block.first.replicate): block for block in AA_BLOCKS.values()}
    return lambda wildcards: function(blocks[wildcards.number])


AA_OUTPUTS = [
    layout.aa_record(cell.key.replace("b1-", "b{number}-"))
    for block in AA_BLOCKS.values()
    for cell in block.cells
    if cell.replicate == 1
]


def model_folder(block):
    """The prepared model of a block."""
    return layout.model(block.first.model)


def prompts_file(block):
    """The token ids of a block's scenario."""
    return layout.prompts(block.first.model, block.first.scenario)


def environment_input(block):
    """Facts about the machine that a block is measured on."""
    return environment_file(block.first)


def block_plan(block):
    """What is measured, as plain values; how long one waits for a quiet machine is no part of it."""
    plan = {key: value for key, value in block.as_dict().items() if key != "quiet_wait_s"}
    return plan | {"members": ", ".join(plan["cells"])}


def block_code(block):
    """For each cell the digest of the code that can change what is measured of its strategy."""
    return {cell.member: digests.of_strategy(cell.measured) for cell in block.cells}


def block_threads(block):
    """Threads are part of what is measured, but for a GPU, which is only driven by them."""
    return workflow.cores if block.first.device == "cpu" else None


def block_journal(block):
    """Where a block's rounds are kept until it is whole."""
    return layout.journal(block.id)


def gpus(block):
    """Graphics processors that a block needs."""
    return int(block.first.device == "cuda")


def kv_priority(block):
    """Blocks run in their drawn order, and all of them before the app suite: figures wait for the last."""
    return len(KV_ORDER) - KV_ORDER[block.id] + 2


def aa_priority(block):
    """The blocks of the instrument's test in their drawn order."""
    return len(AA_ORDER) - AA_ORDER[block.id]


def kv_inputs(cells):
    """Inputs of measuring jobs: models, token ids, and what the machine is and can do."""
    found = set()
    for cell in cells:
        found.add(layout.prompts(cell.model, cell.scenario))
        found.add(layout.environment(cell.device))
        found.add(layout.ceilings(cell.place))
    return sorted(found)


def environment_file(cell):
    """Facts about the machine that a cell is measured on."""
    return layout.environment(cell.device)


def requests_of(wildcards):
    """What the cells ask of a model in a scenario: turns, new tokens and longest prompt, each once."""
    cells = [
        cell
        for cell in KV_CELLS.values()
        if (cell.model, cell.scenario) == (wildcards.model, wildcards.scenario)
    ]
    return sorted(
        {(cell.turns or 0, cell.max_new_tokens, cell.max_prompt_tokens or 0) for cell in cells}
    )


def app_cell(wildcards):
    """The planned cell of a study behind a record's path."""
    return APP_CELLS[wildcards.study][wildcards.cell]


def app_threads(wildcards):
    """All threads where time is measured, so that nothing else is; one otherwise."""
    return workflow.cores if app_cell(wildcards).timed else 1


def app_priority(wildcards):
    """Timed cells first: they need the whole machine, and what is left can then be done side by side."""
    return 1 + app_cell(wildcards).timed


def app_inputs(wildcards):
    """The local model, for the studies that put a cache in front of one."""
    if not studies.get(wildcards.study).needs_model:
        return []
    return layout.model(CONFIG["app"]["model"])


def app_code(wildcards):
    """Digest of the code that can change this study's measurements."""
    return digests.of_study(wildcards.study)


def server_url(wildcards, threads):
    """Address of the user's cache server; compared between runs without its password, see below."""
    return CONFIG["app"]["server_url"] or os.environ.get("REDIS_URL") or None


def app_libraries(wildcards, threads):
    """What a cell's process has imported before it measures: no part of what is measured, so not compared."""
    return app_cell(wildcards).libraries


def app_server(wildcards):
    """Which server a study measures: none, the embedded one, or the user's by host, port and database."""
    if not digests.study_imports(wildcards.study, "kvbench.caching.server.running"):
        return None
    given = server_url(wildcards, None)
    return "embedded" if given is None else given.rpartition("@")[2].partition("?")[0]


def app_reads(wildcards):
    """Digests of what a cell's factors name: scenarios, and files or folders of the user."""
    return {
        key: contents(value)
        for key, value in app_cell(wildcards).factors.items()
        if isinstance(value, str) and contents(value)
    }


def contents(name):
    """Digest of what a setting names: a scenario, or a file or folder that is there."""
    if name in SCENARIOS:
        return scenario_contents(name)
    path = ROOT / Path(name).expanduser()
    return documents.fingerprint(path) if name and path.exists() else None


def scenario_contents(name):
    """Digest of a scenario without its comments and its title."""
    return documents.digest({**asdict(SCENARIOS[name]), "title": ""})


def model_file(name):
    """Digest of a model file without its comments and its title."""
    return documents.digest({**MODELS[name], "title": ""})


def model_contents(wildcards):
    """Digests of a model: its file, and the weights and the tokenizer that it names."""
    document = MODELS[wildcards.model]
    names = [document["path"]] if "path" in document else []
    # A built model takes the tokenizer that comes with the embedded one.
    names += ["resources/embedded-llama"] if "tokenizer" in document else []
    return [model_file(wildcards.model), *(contents(name) for name in names)]


def study_records(wildcards):
    """Records of one study in this run."""
    return [layout.app_record(wildcards.study, cell) for cell in APP_CELLS.get(wildcards.study, {})]


def ceilings_files():
    """Ceilings of this run, one per device and dtype that is measured."""
    return sorted({layout.ceilings(cell.place) for cell in KV_CELLS.values()})


def environment_files():
    """Facts about this machine, one file per device that is measured."""
    devices = {cell.device for cell in KV_CELLS.values()} | ({"cpu"} if APP_CELLS else set())
    return sorted(layout.environment(device) for device in devices)


def drawn_from(name):
    """The tables that a figure is drawn from, in the order its module takes them."""
    return [
        layout.table(table) for table in figure_modules.tables_of(FIGURE_MODULES[name][0], STUDIES)
    ]


def group_tables(members):
    """The tables that some figures are drawn from."""
    return sorted({table for name in members for table in drawn_from(name)})


def figure_plans(members):
    """For each figure of a job what it is drawn from, as :class:`kvbench.figures._drawing.Plan` has it."""
    return lambda wildcards: {
        name: {
            "module": FIGURE_MODULES[name][0],
            "tables": drawn_from(name),
            "arguments": FIGURE_MODULES[name][1:],
            "code": digests.of_figure(FIGURE_MODULES[name][0]),
        }
        for name in members
    }


def figure_labels(name):
    """Labels of a figure in the report."""
    drawing, *scenario = FIGURE_MODULES[name]
    return figure_modules.labels(drawing) | ({"scenario": scenario[0]} if scenario else {})


def keep_the_scheduler_quiet():
    """Stop Snakemake from looking at all waiting jobs again and again while a cell is measured.

    For its limit on the rate of submissions it looks anew one second after every look, and every
    finished job starts another such series: after a hundred jobs it takes a tenth of a core, which is
    what the noise record calls disturbed. Jobs on this machine need no limit; clusters keep theirs.
    """
    if workflow.local_exec and hasattr(workflow.scheduler, "job_rate_limiter"):
        workflow.scheduler.job_rate_limiter = None


def check_what_comes_late():
    """Read what only later jobs of this run would read: a mistake there is told before hours of measuring."""
    rules = {job.rule.name for job in workflow.dag.needrun_jobs()}
    try:
        if "evaluate_claims" in rules:
            from kvbench.analysis.claims import reading

            reading.load(ROOT / "config" / "claims.yaml")
        if "measure_app_cell" in rules and "semantic" in APP_CELLS:
            from kvbench.caching import paraphrases

            given = {cell.factors.get("paraphrases") for cell in APP_CELLS["semantic"].values()}
            for path in sorted({Path(path or paraphrases.DEFAULT) for path in given}):
                paraphrases.load(path)
    except InputError as error:
        stop(error)


def forget_journals():
    """Remove the journals of blocks whose records lie: at a run's end Snakemake has booked them."""
    for block in [*KV_BLOCKS.values(), *AA_BLOCKS.values()]:
        path = layout.aa_record if block.id in AA_BLOCKS else layout.kv_record
        if all(Path(path(cell.key)).exists() for cell in block.cells):
            Path(layout.journal(block.id)).unlink(missing_ok=True)


def closing_words():
    """What `make reproduce` ends with: where everything is."""
    if not Path(layout.MANIFEST).exists():
        return "Done."
    sections = "  ".join(layout.paper("section", language) for language in LANGUAGES)
    lines = [
        "",
        "Tables    results/tables/    (README.md there says what each column means)",
        "Claims    results/claims/claims.md",
        "Figures   results/figures/   (PDF, SVG, PNG)",
        f"Section   {sections}",
    ]
    told = instrument.told_differences(gathering.rows_of("results/tables/kv_summary.csv"))
    if told:
        lines.insert(1, f"Precision {told}")
    made = "  ".join(pdf for pdf in PDFS if Path(pdf).exists())
    lines.append(f"PDF       {made}" if made else f"PDF       not made: {layout.NO_LATEX}")
    return "\n".join(lines)


def paper_templates():
    """Everything the paper is rendered from."""
    found = [*(ROOT / "paper").rglob("*.j2"), *(ROOT / "paper" / "words").glob("*.yaml")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def published_by():
    """File to the rule that makes it, for the manifest."""
    return {
        file: next(rule.name for rule in workflow.rules if rule.is_producer(file))
        for file in PUBLISHED
    }


def aa_records_present():
    """Planned records of the instrument's test that exist; without it the table is empty.

    What an older configuration left behind is of other settings and stays out.
    """
    return [path for path in AA_RECORDS if Path(path).exists()]


def report_templates():
    """What the report is rendered from, beside the tables and figures."""
    found = (ROOT / "workflow/kvbench/publication/templates").iterdir()
    return sorted(str(path.relative_to(ROOT)) for path in found)
