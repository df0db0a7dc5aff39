"""A small configuration through the whole DAG, interrupted, resumed, rebuilt."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workflow_helpers import copy_repository, environment, run_snakemake, unbooked

pytestmark = pytest.mark.end_to_end

SMALL = ("--configfile", "tests/workflow/small.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The repository after a run that was interrupted once and then resumed."""
    folder = tmp_path_factory.mktemp("run") / "clone"
    copy_repository(folder)
    started = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "2", *SMALL],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # Where the tests run in the background, an interrupt would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    cells = folder / "results" / "cells" / "kv"
    journals = folder / "results" / "journals"

    def second_block_began() -> bool:
        """With a second journal there, Snakemake has booked the first block as finished."""
        return len(list(cells.rglob("r*.json"))) >= 2 and len(list(journals.rglob("*.jsonl"))) >= 2

    while not second_block_began() and time.monotonic() < deadline:
        assert started.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.2)
    os.killpg(started.pid, signal.SIGINT)
    try:
        started.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    # What the interrupted block had just written was not booked: it is written once more.
    begun = {folder / name for name in unbooked(folder)}
    records = set(cells.rglob("r*.json")) - begun
    before = {path: path.stat().st_mtime_ns for path in records}
    run_snakemake(folder, *SMALL, "--unlock")
    done = run_snakemake(folder, *SMALL, "--verbose")
    assert done.returncode == 0, done.stdout[-6000:]
    after = {path: path.stat().st_mtime_ns for path in before}
    (folder / "kept.json").write_text(json.dumps({"kept": len(before), "same": before == after}))
    return folder, done.stdout


def test_a_resumed_run_does_not_repeat_finished_cells(finished):
    folder, _ = finished
    assert json.loads((folder / "kept.json").read_text())["kept"] >= 1
    assert json.loads((folder / "kept.json").read_text())["same"]


def test_the_run_ends_by_saying_where_everything_is(finished):
    _, output = finished
    for place in ("results/tables/", "results/claims/claims.md", "results/paper/section.en.tex"):
        assert place in output


def test_snakemake_looks_at_waiting_jobs_only_when_one_has_finished(finished):
    # Its rate limit would make it look once a second for every job that ever finished, which takes
    # a good part of a core from what is being measured.
    _, output = finished
    assert output.count("Ready jobs: ") <= output.count("Finished jobid: ") + 5


def test_every_published_file_stands_in_the_manifest_with_its_checksum(finished):
    import hashlib

    folder, _ = finished
    files = json.loads((folder / "results/manifest.json").read_text())["files"]
    assert "results/tables/kv_summary.csv" in files
    assert "results/paper/values.json" in files
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], name
        assert len(content) == entry["bytes"], name


def test_an_unsupported_strategy_is_a_row_with_its_reason(finished):
    import pandas as pd

    folder, _ = finished
    table = pd.read_csv(folder / "results/tables/kv_summary.csv", keep_default_na=False)
    row = table[table["strategy"] == "offloaded"].iloc[0]
    assert row["status"] == "unsupported"
    assert "cuda" in row["reason"]


@pytest.mark.skipif(not shutil.which("latexmk"), reason="latexmk is not installed")
def test_the_pdf_is_built_and_says_the_measured_machine(finished):
    from pypdf import PdfReader

    folder, _ = finished
    reader = PdfReader(folder / "results/paper/paper.en.pdf")
    text = " ".join(page.extract_text() for page in reader.pages)
    assert len(reader.pages) >= 3
    assert "symposium" in text.lower()
    fonts = {
        str(font.get_object()["/Subtype"])
        for page in reader.pages
        for font in (page["/Resources"].get("/Font") or {}).values()
    }
    assert "/Type3" not in fonts


def test_published_files_are_byte_identical_when_rebuilt_from_the_same_records(finished):
    folder, _ = finished
    manifest = (folder / "results/manifest.json").read_bytes()
    for name in ("tables", "claims", "figures", "paper"):
        shutil.rmtree(folder / "results" / name)
    done = run_snakemake(folder, *SMALL)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "rule measure_kv" not in done.stdout
    assert (folder / "results/manifest.json").read_bytes() == manifest


def test_the_report_of_snakemake_embeds_figures_and_tables(finished):
    folder, _ = finished
    done = run_snakemake(folder, *SMALL, "--report", "results/snakemake-report.html")
    assert done.returncode == 0, done.stdout[-4000:]
    assert (folder / "results/snakemake-report.html").stat().st_size > 100_000


def test_the_report_shows_every_table_and_figure_of_the_run(finished):
    folder, _ = finished
    done = run_snakemake(folder, *SMALL, "--", "report")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "rule measure_kv" not in done.stdout
    tables = {path.stem for path in (folder / "results/tables").glob("*.csv")}
    figures = {path.name.split(".")[0] for path in (folder / "results/figures").glob("*.svg")}
    pages = sorted((folder / "results").glob("report.*.html"))
    assert pages
    for path in pages:
        page = path.read_text(encoding="utf-8")
        assert {name for name in tables if f'id="table-{name}"' not in page} == set()
        shown = {name for name in figures if f'id="figure-{name}"' in page}
        assert figures - shown <= {"symposium_symposium_turn"}


def test_a_recorded_run_rebuilds_tables_and_paper_without_measuring(finished, tmp_path):
    folder, _ = finished
    copy = tmp_path / "elsewhere"
    copy_repository(copy)
    shutil.rmtree(copy / "results" / "recorded", ignore_errors=True)
    done = run_snakemake(folder, *SMALL, "--config", "machine=test-bench", "--", "record")
    assert done.returncode == 0, done.stdout[-4000:]
    shutil.copytree(folder / "results/recorded/test-bench", copy / "results/recorded/test-bench")
    done = run_snakemake(
        copy, "--configfile", "config/recorded.yaml", "--config", "languages=['en']"
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "measure_kv" not in done.stdout
    assert "test-bench" in (copy / "results/tables/kv_summary.csv").read_text()
    altered = next((copy / "results/recorded/test-bench").glob("cells/kv/**/dynamic/r1.json"))
    altered.write_text(altered.read_text() + "\n")
    done = run_snakemake(
        copy, "--configfile", "config/recorded.yaml", "--", "results/tables/kv_summary.csv"
    )
    assert done.returncode != 0
    assert str(altered.relative_to(copy)) in done.stdout
    assert "Traceback" not in done.stdout


def test_without_latex_the_pdf_target_says_what_to_install(finished, tmp_path):
    folder, _ = finished
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "env", "git", "rm", "mkdir", "which"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    pdf = folder / "results/paper/paper.en.pdf"
    pdf.unlink(missing_ok=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "1",
            *SMALL,
            "--",
            str(pdf.relative_to(folder)),
        ],
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{tools}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "sudo apt install latexmk" in done.stdout + done.stderr
