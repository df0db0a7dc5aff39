"""The rules' scripts, run as Snakemake runs them: inputs to outputs, and one line when it fails."""

from __future__ import annotations

import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kvbench import documents, records, studies
from kvbench.analysis import instrument, tables
from kvbench.inputs import configuration
from kvbench.records import gathering
from kvbench.studies.measuring import _cell
from kvbench.traffic import cells as traffic_cells

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "workflow" / "scripts"


class Files(list):
    """Snakemake's list of files: by position, by name, and by ``get``."""

    def __init__(self, *files: object, **named: object) -> None:
        super().__init__(files)
        for name, value in named.items():
            self.extend(value if isinstance(value, list) else [value])
            setattr(self, name, value)
        self._named = named

    def get(self, name: str, default: object = None) -> object:
        return self._named.get(name, default)

    def items(self):
        return self._named.items()


@pytest.fixture
def workplace(tmp_path, monkeypatch, private_lock) -> Path:
    """An empty folder to run in, with the scripts' own folder importable and logging restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def run(workplace):
    """Run a script in this process; returns its log."""

    def run(script: str, **fields: object) -> str:
        log = workplace / "logs" / f"{script}.log"
        given = {
            "input": Files(),
            "output": Files(),
            "params": SimpleNamespace(),
            "wildcards": SimpleNamespace(),
            "log": [str(log)],
            "threads": 1,
            "config": {},
        } | fields
        for path in given["output"]:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        runpy.run_path(
            str(SCRIPTS / f"{script}.py"),
            init_globals={"snakemake": SimpleNamespace(**given)},
            run_name="__main__",
        )
        return log.read_text()

    return run


_DRIVER = """
import json, runpy, sys
from types import SimpleNamespace
class Files(list):
    def __init__(self, named):
        super().__init__()
        self._named = named
        for name, value in named.items():
            self.extend(value if isinstance(value, list) else [value])
            setattr(self, name, value)
    def get(self, name, default=None):
        return self._named.get(name, default)
given = json.loads(sys.argv[2])
for name in ("input", "output"):
    given[name] = Files(given[name])
for name in ("params", "wildcards"):
    given[name] = SimpleNamespace(**given[name])
snakemake = SimpleNamespace(**given)
runpy.run_path(sys.argv[1], init_globals={"snakemake": snakemake}, run_name="__main__")
"""


@pytest.fixture
def fail(workplace):
    """Run a script that must end with exit code 1 and one line; returns the line."""

    def fail(script: str, env: dict[str, str] | None = None, **fields: object) -> str:
        given = {
            "input": {},
            "output": {},
            "params": {},
            "wildcards": {},
            "log": ["logs/x.log"],
            "threads": 1,
        } | fields
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, str(SCRIPTS / f"{script}.py"), json.dumps(given)],
            cwd=workplace,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(ROOT / "workflow")]),
                **(env or {}),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr[-2000:]
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert lines[0].removeprefix("error: ") in Path(workplace, "logs/x.log").read_text()
        return lines[0]

    return fail


@pytest.fixture
def cells(workplace, make_record) -> Files:
    """Records of two strategies, as the measuring rules leave them."""
    paths = []
    for strategy, seconds in (("none", 2.0), ("dynamic", 1.0)):
        path = workplace / f"results/cells/kv/cpu/tiny/talk/{strategy}/r1.json"
        path.parent.mkdir(parents=True)
        records.write(path, make_record(strategy, [[seconds] * 3]))
        paths.append(str(path))
    aa_test = workplace / "results/tables/aa_test.csv"
    gathering.write_csv(instrument.evaluate({}), aa_test)
    return Files(records=paths, ceilings=[], aa_test=str(aa_test))


# Inputs and cells -----------------------------------------------------------------------------


def test_from_a_model_file_to_the_records_of_a_block(
    run, tiny_document, facts, workplace, undisturbed, private_lock
):
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny_document))
    run(
        "prepare_model",
        input=Files("tiny.yaml"),
        output=Files("results/inputs/models/tiny"),
        params=SimpleNamespace(root=str(ROOT)),
    )
    assert Path("results/inputs/models/tiny/model.safetensors").exists()

    scenario = ROOT / "config/scenarios/banking_open_account.yaml"
    run(
        "prepare_prompts",
        input=Files(scenario=str(scenario), model="results/inputs/models/tiny"),
        output=Files("results/inputs/prompts/tiny/banking_open_account.json"),
        params=SimpleNamespace(requests=[(2, 4, 0)]),
        wildcards=SimpleNamespace(model="tiny", scenario="banking_open_account"),
    )
    Path("cpu.json").write_text(json.dumps(facts))
    block = {
        "name": "test",
        "models": ["tiny"],
        "scenarios": ["banking_open_account"],
        "strategies": ["dynamic"],
        "turns": 2,
        "max_new_tokens": 4,
        "max_rounds": 1,
    }
    config = configuration.fill({"kv": {"experiments": [block], "quiet_wait_s": 0}}, "test")
    scenarios, _ = configuration.load_scenarios_and_models(ROOT / "config")
    (block,) = configuration.plan_kv(config, scenarios, {"tiny": {}}, "test").values()
    paths = [f"results/cells/kv/{cell.key}.json" for cell in block.cells]
    log = run(
        "measure_kv_block",
        input=Files(
            model="results/inputs/models/tiny",
            prompts="results/inputs/prompts/tiny/banking_open_account.json",
            environment="cpu.json",
        ),
        output=Files(*paths),
        params=SimpleNamespace(
            block=block.as_dict(),
            quiet_wait_s=0,
            code={cell.member: "0" * 16 for cell in block.cells},
            journal="results/journals/test.jsonl",
        ),
    )
    for path, strategy in zip(paths, ("dynamic", "control"), strict=True):
        record = records.read(Path(path))
        assert (record["status"], record["cell"]["strategy"]) == ("ok", strategy)
        assert [len(turn["samples"]) for turn in record["turns"]] == [1, 1]
    assert "round 1 " in log
    # Kept until Snakemake has booked the records: it deletes what it had no time to book.
    assert Path("results/journals/test.jsonl").exists()


@pytest.mark.parametrize(
    ("device", "replicate", "alone"), [("cpu", 1, False), ("cpu", 2, True), ("cuda", 1, True)]
)
def test_a_block_on_a_gpu_and_a_later_replicate_are_measured_alone(
    run, monkeypatch, device, replicate, alone
):
    from kvbench.measurement import warm

    asked = []
    monkeypatch.setattr(warm, "call", lambda *_, alone: asked.append(alone))
    run(
        "measure_kv_block",
        input=Files(model="model", prompts="prompts.json", environment="cpu.json"),
        output=Files("dynamic.json"),
        params=SimpleNamespace(
            block={"cells": {"dynamic": {"device": device, "replicate": replicate}}},
            quiet_wait_s=0,
            code={},
            journal="journal.jsonl",
        ),
    )
    assert asked == [alone]


def measure_app_cell(run, output, **params) -> None:
    """Run the job of one cell of the study eviction, untimed unless told otherwise."""
    planned = {
        "factors": {},
        "timed": False,
        "seed": 1,
        "server_url": None,
        "quiet_wait_s": 0,
        "libraries": "caches",
        "code": "0" * 16,
    }
    run(
        "measure_app_cell",
        input=Files(environment="cpu.json", model=[]),
        output=Files(output),
        params=SimpleNamespace(**planned | params),
        wildcards=SimpleNamespace(study="eviction", cell="lru"),
    )


@pytest.mark.parametrize(
    ("timed", "libraries", "alone"),
    [(True, "caches", False), (True, "models", False), (False, "caches", True), (True, "", True)],
)
def test_untimed_cells_and_those_that_ask_for_it_are_measured_alone(
    run, monkeypatch, timed, libraries, alone
):
    from kvbench.measurement import warm

    asked = []
    monkeypatch.setattr(warm, "call", lambda *_, **how: asked.append(how))
    measure_app_cell(run, "lru.json", timed=timed, libraries=libraries)
    assert asked == [{"libraries": libraries, "alone": alone}]


def test_the_environment_of_this_machine_is_written(run):
    run(
        "record_environment",
        output=Files("results/inputs/environment/cpu.json"),
        wildcards=SimpleNamespace(device="cpu"),
    )
    found = documents.read_json(Path("results/inputs/environment/cpu.json"))
    assert found["device"] == "cpu"
    assert found["digest"]


def test_ceilings_are_measured_at_the_dtype_of_the_files_name(run, monkeypatch):
    from kvbench.measurement import ceilings, noise

    asked = []
    monkeypatch.setattr(noise, "wait_for_quiet", lambda limit_s: asked.append(limit_s) or 0.0)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: {"at": [device, dtype]})
    for variant, dtype in (("", "float32"), ("-bfloat16", "bfloat16")):
        output = Path(f"results/inputs/ceilings/cpu{variant}.json")
        run(
            "measure_ceilings",
            output=Files(str(output)),
            wildcards=SimpleNamespace(device="cpu", variant=variant),
            params=SimpleNamespace(quiet_wait_s=3),
        )
        assert documents.read_json(output) == {"at": ["cpu", dtype]}
    assert asked == [3, 3]


def test_a_cell_of_a_study_is_measured_and_tabulated(run, facts):
    study = studies.get("eviction")
    outcome = studies.Outcome([dict.fromkeys(list(study.columns)[:2], 1)])
    fake = SimpleNamespace(measuring=lambda: None, measure=lambda factors, context: outcome)
    Path("cpu.json").write_text(json.dumps(facts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cell.studies, "get", lambda name: fake)
        measure_app_cell(run, "results/cells/app/eviction/lru.json", factors={"kind": "x"})
    run(
        "aggregate_study",
        input=Files(records=["results/cells/app/eviction/lru.json"]),
        output=Files("results/tables/app_eviction.csv"),
        params=SimpleNamespace(machines=[]),
        wildcards=SimpleNamespace(study="eviction"),
    )
    table = gathering.read_csv(Path("results/tables/app_eviction.csv"))
    assert list(table["cell"]) == ["lru"]
    assert set(study.columns) <= set(table.columns)


@pytest.mark.parametrize("known", [frozenset({1}), None])
def test_a_cell_is_told_the_programs_it_asks_and_its_record_where_one_cannot_be_found(
    run, facts, monkeypatch, known
):
    told = []

    def measure(factors, context):
        told.append(context.known)
        return studies.Outcome([])

    fake = SimpleNamespace(measuring=lambda: None, measure=measure)
    monkeypatch.setattr(_cell.studies, "get", lambda name: fake)
    monkeypatch.setattr(_cell._known, "programs", lambda addresses: known)
    Path("cpu.json").write_text(json.dumps(facts))
    measure_app_cell(run, "cell.json")
    record = documents.read_json(Path("cell.json"))
    assert told == [known]
    assert ("unmarked" in record["noise"]) is (known is None)


# Tables and what follows ----------------------------------------------------------------------


KV_TABLES = ("samples", "summary", "rounds", "replies", "quality", "profile")


def aggregate(run, cells: Files) -> None:
    names = {name: f"results/tables/kv_{name}.csv" for name in KV_TABLES}
    run(
        "aggregate_kv",
        input=cells,
        output=Files(**names),
        params=SimpleNamespace(machines=[]),
    )


def test_records_become_the_two_tables(run, cells):
    aggregate(run, cells)
    summary = gathering.read_csv(Path("results/tables/kv_summary.csv"))
    assert list(summary.columns) == list(tables.SUMMARY_COLUMNS)
    assert dict(zip(summary["strategy"], summary["e2e_s_median"], strict=True)) == {
        "none": 2.0,
        "dynamic": 1.0,
    }
    samples = gathering.read_csv(Path("results/tables/kv_samples.csv"))
    assert len(samples) == 6


def test_a_recorded_machine_stands_beside_this_run(run, cells, workplace):
    run(
        "record",
        input=cells,
        params=SimpleNamespace(machine="lab-1", aa=[]),
    )
    names = {name: f"results/tables/kv_{name}.csv" for name in KV_TABLES}
    run(
        "aggregate_kv",
        input=cells,
        output=Files(**names),
        params=SimpleNamespace(machines=["results/recorded/lab-1"]),
    )
    summary = gathering.read_csv(Path("results/tables/kv_summary.csv"))
    assert set(summary["machine"]) == {"here", "lab-1"}


def test_without_a_test_of_the_instrument_its_table_is_empty(run):
    run(
        "aggregate_aa_test",
        input=Files(records=[]),
        output=Files("results/tables/aa_test.csv"),
        params=SimpleNamespace(machines=[]),
    )
    table = gathering.read_csv(Path("results/tables/aa_test.csv"))
    assert len(table) == 0
    assert "share_ci_low" in table.columns


def test_every_column_of_every_table_is_described(run):
    names = studies.names()
    run(
        "describe_tables",
        output=Files("results/tables/README.md"),
        params=SimpleNamespace(studies=names, traffic=True),
    )
    text = Path("results/tables/README.md").read_text()
    assert "## traffic_prefix.csv" in text and "`token_share`" in text
    for name in names:
        assert f"## app_{name}.csv" in text
    for column in (*tables.SAMPLE_COLUMNS, *tables.SUMMARY_COLUMNS):
        assert f"`{column}`" in text


def test_a_log_is_replayed_tabulated_and_advised_on(run):
    log = ROOT / "resources" / "traffic" / "one_stream.jsonl.gz"
    entry = {"name": "shipped", "paths": [str(log)], "models": ["embedded"]}
    entry |= {"memories": ["16MiB"], "semantic": False}
    config = configuration.fill({"traffic": {"logs": [entry]}}, "config.yaml")
    models = configuration.read_models(ROOT / "config" / "models")
    ((key, cell),) = traffic_cells.plan(config, models, "config.yaml").items()
    record, folder = f"results/cells/traffic/{key}.json", f"results/traffic/{key}"
    params = SimpleNamespace(cell=cell.as_dict(), root=str(ROOT), code="0" * 16)
    run("replay_traffic", input=Files(files=[str(log)]), output=Files(record), params=params)
    summary = "results/tables/traffic_summary.csv"
    run("aggregate_traffic", input=Files(records=[record]), output=Files(summary))
    table = gathering.read_csv(Path(summary))
    assert table["log"].tolist() == ["shipped"] and table["requests"].tolist() == [240]
    run(
        "advise_traffic",
        input=Files(record),
        output=Files(advice=[f"{folder}/advice.pt.md", f"{folder}/advice.pt.html"]),
        params=SimpleNamespace(languages=["pt"]),
    )
    assert "## Limites" in Path(f"{folder}/advice.pt.md").read_text()
    assert "data:image/" in Path(f"{folder}/advice.pt.html").read_text()


def test_capacity_is_planned_for_every_model(run):
    models = sorted((ROOT / "config/models").glob("*.yaml"))
    run(
        "plan_capacity",
        input=Files(models=[str(path) for path in models], ceilings=[]),
        output=Files("results/tables/capacity.csv"),
    )
    table = gathering.read_csv(Path("results/tables/capacity.csv"))
    assert {path.stem for path in models} <= set(table["model"])


def test_claims_get_their_verdicts_and_are_shown(run, cells, capsys):
    aggregate(run, cells)
    run(
        "evaluate_claims",
        input=Files(
            claims=str(ROOT / "config/claims.yaml"),
            samples="results/tables/kv_samples.csv",
            summary="results/tables/kv_summary.csv",
            quality="results/tables/kv_quality.csv",
            aa_test=cells.aa_test,
            studies=[],
        ),
        output=Files(csv="results/claims/claims.csv"),
        params=SimpleNamespace(studies=[], machines=[], must_hold=False),
    )
    listed = {entry["id"] for entry in documents.read_yaml(ROOT / "config/claims.yaml")["claims"]}
    found = gathering.read_csv(Path("results/claims/claims.csv"))
    assert listed <= set(found["id"])
    run(
        "show_claims",
        input=Files("results/claims/claims.csv"),
        params=SimpleNamespace(must_hold=False),
    )
    shown = capsys.readouterr().out
    assert all(name in shown for name in listed)


def test_the_manifest_has_the_size_and_the_digest_of_every_file(run):
    Path("a.csv").write_bytes(b"abc")
    run(
        "write_manifest",
        input=Files("a.csv"),
        output=Files("results/manifest.json"),
        params=SimpleNamespace(rules={"a.csv": "aggregate_kv"}),
    )
    document = documents.read_json(Path("results/manifest.json"))
    assert document["files"] == {
        "a.csv": {
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "rule": "aggregate_kv",
        }
    }


def test_a_figure_is_drawn_in_three_formats_and_every_language(run, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "unit"))
    import synthetic_kv

    for name, table in zip(("summary", "samples"), synthetic_kv.tables(), strict=True):
        gathering.write_csv(table, Path(f"{name}.csv"))
    plan = {
        "module": "kv_overview",
        "tables": ["summary.csv", "samples.csv"],
        "arguments": [],
        "code": "1",
    }
    run(
        "draw_figures",
        input=SimpleNamespace(words=[]),
        output=Files("results/figures/kv_overview.en.svg"),
        params=SimpleNamespace(figures={"kv_overview": plan}, languages=["en", "pt"]),
    )
    made = sorted(path.name for path in Path("results/figures").iterdir())
    assert made == [
        f"kv_overview.{language}.{suffix}"
        for language in ("en", "pt")
        for suffix in ("pdf", "png", "svg")
    ]


# What fails -----------------------------------------------------------------------------------


def test_a_corrupt_record_ends_the_job_with_one_line_and_no_table(fail, cells):
    path = Path(cells.records[1])
    path.write_bytes(path.read_bytes()[:200])
    names = {name: f"results/tables/kv_{name}.csv" for name in KV_TABLES}
    line = fail(
        "aggregate_kv",
        input={"records": list(cells.records), "ceilings": [], "aa_test": cells.aa_test},
        output=names,
        params={"machines": []},
    )
    assert str(path) in line
    assert not any(Path(name).exists() for name in names.values())


def test_a_verdict_other_than_expected_fails_the_default_target_where_claims_must_hold(
    run, fail, cells
):
    aggregate(run, cells)
    claim = {
        "id": "bytes",
        "document": "ours",
        "kind": "hypothesis",
        "statement": {"en": "It is so.", "pt": "É assim."},
        "measure": {
            "kind": "formula",
            "quantity": "kv_bytes",
            "tokens": 1,
            "bytes_per_element": 2,
            "architecture": {
                "model_type": "llama",
                "num_hidden_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 1,
                "intermediate_size": 8,
                "vocab_size": 8,
            },
        },
        "holds_if": {"above": 0},
        "expected": "refuted",
    }
    document = {"documents": {"S1": "A document"}, "claims": [claim]}
    Path("claims.yaml").write_text(yaml.safe_dump(document))
    tables = {name: f"results/tables/kv_{name}.csv" for name in ("samples", "summary", "quality")}
    line = fail(
        "evaluate_claims",
        input={"claims": "claims.yaml", "aa_test": cells.aa_test, "studies": [], **tables},
        output={"csv": "results/claims/claims.csv"},
        params={"studies": [], "machines": [], "must_hold": True},
    )
    assert "bytes (formula) is reproduced, expected refuted" in line


def test_a_hub_that_cannot_be_reached_ends_the_job_with_one_line(fail, workplace):
    document = {
        "name": "distant",
        "title": "Distant",
        "source": "hub",
        "repo": "owner/model",
        "revision": "0" * 40,
        "gated": False,
    }
    Path("distant.yaml").write_text(yaml.safe_dump(document))
    line = fail(
        "prepare_model",
        # Nothing listens on this port of the loopback, so there is no network beyond it.
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(workplace / "hub")},
        input={"model": "distant.yaml"},
        output={"folder": "results/inputs/models/distant"},
        params={"root": str(ROOT)},
    )
    assert "owner/model could not be downloaded" in line
    assert list(Path("results/inputs/models").iterdir()) == []


def test_a_context_beyond_learned_positions_ends_the_job_with_one_line(
    run, workplace, monkeypatch, capsys
):
    """GPT-2 names its longest context ``n_positions``; the scenario's last step is 8192 and 16 tokens."""

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    (workplace / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_positions": 1024, "vocab_size": 2560})
    )
    asked = {
        "input": Files(
            scenario=str(ROOT / "config/scenarios/context_growth.yaml"), model=str(workplace)
        ),
        "output": Files("prompts.json"),
        "wildcards": SimpleNamespace(model="gpt", scenario="context_growth"),
    }
    with pytest.raises(SystemExit) as ended:
        run("prepare_prompts", **asked, params=SimpleNamespace(requests=[(None, 16, 0)]))
    assert ended.value.code == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "needs 8208 tokens of context but gpt allows 1024" in line
    assert "lower kv.experiments[].max_prompt_tokens" in line
    run("prepare_prompts", **asked, params=SimpleNamespace(requests=[(None, 16, 1000)]))
    assert Path("prompts.json").exists()


def test_a_context_that_is_too_long_ends_the_job_with_one_line(
    run, tiny_folder, monkeypatch, capsys
):
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    output = Path("results/inputs/prompts/tiny/banking_open_account.json")
    with pytest.raises(SystemExit) as ended:
        run(
            "prepare_prompts",
            input=Files(
                scenario=str(ROOT / "config/scenarios/banking_open_account.yaml"),
                model=str(tiny_folder),
            ),
            output=Files(str(output)),
            params=SimpleNamespace(requests=[(15, 400, 0)]),
            wildcards=SimpleNamespace(model="tiny", scenario="banking_open_account"),
        )
    assert ended.value.code == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "tiny allows 4096" in line
    assert "lower kv.experiments[].turns or max_new_tokens" in line
    assert not output.exists()


def test_without_latex_the_pdfs_job_says_what_to_install(fail, workplace):
    (workplace / "main.tex").write_text("x")
    line = fail(
        "compile_paper",
        env={"PATH": str(workplace)},
        input={"main": "main.tex"},
        output={"pdf": "results/paper/paper.en.pdf"},
    )
    assert "sudo apt install latexmk" in line
    assert not Path("results/paper/paper.en.pdf").exists()


def test_a_script_does_nothing_but_adapt():
    for path in SCRIPTS.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name


def test_recorded_machines_are_verified_once_and_the_stamp_is_that_of_their_checksums(run):
    folders = gathering.list_machines(ROOT / "results" / "recorded", ["all"])
    run(
        "verify_recorded",
        output=Files("results/inputs/recorded.json"),
        params=SimpleNamespace(machines=[str(folder) for folder in folders]),
    )
    stamp = documents.read_json(Path("results/inputs/recorded.json"))
    assert stamp == {
        folder.name: documents.sha256_of_file(folder / "SHA256SUMS") for folder in folders
    }
