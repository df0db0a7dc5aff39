"""What a run hands on: a data package that validates, a spreadsheet's tables, a research object."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import tomllib
from pathlib import Path

import kvbench
import pandas as pd
import pytest
from kvbench import documents
from kvbench.caching import encoder
from kvbench.errors import InputError
from kvbench.publication import columns, crate, datapackage, tutorial
from kvbench.records import gathering

ROOT = Path(__file__).resolve().parents[2]
MEANINGS = {
    "strategy": "how keys are kept",
    "e2e_s": "time (s)",
    "rounds": "how many",
    "exact": "whether",
    "note": "x",
}


@pytest.fixture
def tables(tmp_path):
    """A folder with one table, written as the workflow writes tables."""
    table = pd.DataFrame(
        {
            "strategy": ["none", "dynamic"],
            "e2e_s": [1.5, None],
            "rounds": [3, 4],
            "exact": [True, None],
            "note": [None, None],
        }
    )
    gathering.write_csv(table, tmp_path / "times.csv")
    return tmp_path


def test_the_descriptor_gives_types_meanings_and_missing_values(tables):
    resource = datapackage.describe({"times.csv": MEANINGS}, tables)["resources"][0]
    fields = {field["name"]: field for field in resource["schema"]["fields"]}
    kinds = {name: field["type"] for name, field in fields.items()}
    assert kinds == {
        "strategy": "string",
        "e2e_s": "number",
        "rounds": "integer",
        "exact": "boolean",
        "note": "string",
    }
    assert fields["e2e_s"]["description"] == "time (s)"
    assert resource["schema"]["missingValues"] == [""]
    digest = hashlib.sha256((tables / "times.csv").read_bytes()).hexdigest()
    assert resource["hash"] == f"sha256:{digest}"


def test_the_package_validates(tables):
    documents.write_json(
        tables / "datapackage.json", datapackage.describe({"times.csv": MEANINGS}, tables)
    )
    datapackage.check(tables / "datapackage.json")


def test_a_package_whose_table_was_changed_is_refused_in_one_line(tables):
    documents.write_json(
        tables / "datapackage.json", datapackage.describe({"times.csv": MEANINGS}, tables)
    )
    path = tables / "times.csv"
    path.write_text(path.read_text().replace("1.5", '"soon"'))
    with pytest.raises(InputError, match=r"datapackage\.json") as error:
        datapackage.check(tables / "datapackage.json")
    assert "\n" not in str(error.value)


def test_a_column_that_nothing_describes_is_named(tables):
    with pytest.raises(InputError, match="note"):
        datapackage.describe(
            {"times.csv": {k: v for k, v in MEANINGS.items() if k != "note"}}, tables
        )


def test_parquet_holds_what_the_table_holds(tables):
    datapackage.write_parquet(tables / "times.csv", tables / "times.parquet")
    read = pd.read_parquet(tables / "times.parquet")
    assert list(read["strategy"]) == ["none", "dynamic"]
    assert list(read["rounds"]) == [3, 4]
    assert read["e2e_s"][0] == 1.5 and pd.isna(read["e2e_s"][1])
    assert read["exact"][0] is True and read["exact"][1] is None


# Numbers that a fast reader of floats gets wrong in the last digit.
@pytest.mark.parametrize("number", [0.16666666666666666, 0.9500000000000001, 3836453.5178476823])
def test_a_number_is_the_same_to_its_last_digit_in_every_form_of_a_table(tmp_path, number):
    gathering.write_csv(pd.DataFrame({"x": [number]}), tmp_path / "t.csv")
    datapackage.write_parquet(tmp_path / "t.csv", tmp_path / "t.parquet")
    datapackage.write_spreadsheet(tmp_path / "t.csv", tmp_path / "s.csv")
    written = (tmp_path / "s.csv").read_text(encoding="utf-8-sig").splitlines()[1]
    assert gathering.read_csv(tmp_path / "t.csv")["x"][0] == number
    assert pd.read_parquet(tmp_path / "t.parquet")["x"][0] == number
    assert float(written.replace(",", ".")) == number


def test_a_portuguese_spreadsheet_gets_semicolons_commas_and_a_mark(tables):
    datapackage.write_spreadsheet(tables / "times.csv", tables / "out.csv")
    data = (tables / "out.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbf")
    assert data.decode("utf-8-sig").splitlines()[:2] == [
        "strategy;e2e_s;rounds;exact;note",
        "none;1,5;3;True;",
    ]


def test_every_study_and_table_is_described():
    from kvbench import studies

    found = columns.described(studies.names(), traffic=True)
    assert {f"app_{name}.csv" for name in studies.names()} <= set(found)
    assert {"kv_summary.csv", "kv_rounds.csv", "aa_test.csv", "capacity.csv"} <= set(found)
    assert all(meaning for own in found.values() for meaning in own.values())


@pytest.fixture
def checkout(tmp_path):
    """A small checkout with one published file."""
    root = tmp_path / "checkout"
    (root / "results").mkdir(parents=True)
    (root / "Snakefile").write_text("rule all:\n")
    (root / "config").mkdir()
    (root / "config" / "config.yaml").write_text("suites: []\n")
    (root / "CITATION.cff").write_text((ROOT / "CITATION.cff").read_text())
    (root / "results" / "table.csv").write_text("a\n1\n")
    return root


def manifest(root: Path) -> dict:
    path = root / "results" / "table.csv"
    facts = {"bytes": 4, "rule": "aggregate", "sha256": documents.sha256_of_file(path)}
    return {"files": {"results/table.csv": facts}}


MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "system": "a system",
    "commit": "abc",
    "date": "2025-01-02T03:04:05+00:00",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "snakemake": "9.27.1"},
}


def packed(checkout: Path, target: Path) -> dict[str, dict]:
    """The entities of a crate as the workflow packs it, by their ids."""
    crate.write(target, checkout, ["Snakefile", "config"], manifest(checkout), MACHINE)
    crate.check(target)
    graph = json.loads((target / "ro-crate-metadata.json").read_text())["@graph"]
    return {entity["@id"]: entity for entity in graph}


def test_a_crate_lists_every_file_that_it_holds_and_no_cache(checkout, tmp_path):
    (checkout / "config" / "__pycache__").mkdir()
    (checkout / "config" / "__pycache__" / "x.pyc").write_bytes(b"x")
    entities = packed(checkout, tmp_path / "crate")
    held = {
        path.relative_to(tmp_path / "crate").as_posix()
        for path in (tmp_path / "crate").rglob("*")
        if path.is_file()
    }
    assert held == {name for name, one in entities.items() if "File" in one["@type"]} | {
        "ro-crate-metadata.json"
    }
    assert entities["config/"]["hasPart"] == [{"@id": "config/config.yaml"}]


def test_a_crate_tells_who_when_under_which_licence_and_with_which_software(checkout, tmp_path):
    entities = packed(checkout, tmp_path / "crate")
    root = entities["./"]
    assert root["datePublished"] == MACHINE["date"]
    assert entities[root["license"]["@id"]]["identifier"] == "MIT"
    (author,) = root["author"]
    assert entities[author["@id"]]["@type"] == "Organization"
    assert entities[author["@id"]]["name"] == "kvbench contributors"
    used = [entities[one["@id"]] for one in entities["Snakefile"]["softwareRequirements"]]
    assert {one["name"]: one["softwareVersion"] for one in used} == {
        "python": "3.11.7",
        "torch": "2.13.0",
        "snakemake": "9.27.1",
    }
    assert entities["results/table.csv"]["encodingFormat"] == "text/csv"


def test_a_snakemake_file_is_text_to_a_crate(checkout, tmp_path):
    (checkout / "config" / "common.smk").write_text("x = 1\n")
    (checkout / "config" / "words.pt.md").write_text("Olá\n")
    entities = packed(checkout, tmp_path / "crate")
    assert entities["config/common.smk"]["encodingFormat"] == "text/plain"
    assert entities["config/words.pt.md"]["encodingFormat"] == "text/markdown"
    assert entities["config/words.pt.md"]["inLanguage"] == "pt-BR"


def test_a_crate_without_its_workflow_is_noticed(checkout, tmp_path):
    packed(checkout, tmp_path / "crate")
    metadata = tmp_path / "crate" / "ro-crate-metadata.json"
    metadata.write_text(metadata.read_text().replace('"ComputationalWorkflow"', '"Thing"'))
    with pytest.raises(InputError, match="no main workflow"):
        crate.check(tmp_path / "crate")


def test_a_crate_holds_workflow_configuration_and_results(checkout, tmp_path):
    entities = packed(checkout, tmp_path / "crate")
    assert entities["./"]["mainEntity"] == {"@id": "Snakefile"}
    assert "ComputationalWorkflow" in entities["Snakefile"]["@type"]
    assert entities["results/table.csv"]["description"] == "made by the rule aggregate"
    assert (tmp_path / "crate/config/config.yaml").is_file()


def test_a_published_file_that_changed_is_refused_and_no_crate_is_left(checkout, tmp_path):
    listed = manifest(checkout)
    (checkout / "results" / "table.csv").write_text("a\n2\n")
    with pytest.raises(InputError, match=r"table\.csv"):
        crate.write(tmp_path / "crate", checkout, ["config"], listed, MACHINE)
    assert not (tmp_path / "crate").exists()
    assert not (tmp_path / ".crate.part").exists()


def test_a_crate_that_lost_a_file_is_noticed(checkout, tmp_path):
    crate.write(tmp_path / "crate", checkout, ["config"], manifest(checkout), MACHINE)
    (tmp_path / "crate" / "results" / "table.csv").unlink()
    with pytest.raises(InputError, match=r"table\.csv"):
        crate.check(tmp_path / "crate")


# The tutorial ---------------------------------------------------------------------------------

NOTEBOOKS = ROOT / "workflow" / "notebooks"


def build(language: str):
    words = NOTEBOOKS / f"tutorial.{language}.md"
    return tutorial.build(NOTEBOOKS / "tutorial.py", words, language)


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_tutorials_cells_are_python_and_its_labels_are_filled(language):
    notebook = build(language)
    codes = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert len(codes) > 10
    for source in codes:
        ast.parse(source)
        assert "{{" not in source


def test_both_languages_place_the_same_cells_in_the_same_order():
    places = [
        tutorial._PLACE.findall((NOTEBOOKS / f"tutorial.{language}.md").read_text())
        for language in ("en", "pt")
    ]
    assert places[0] == places[1]


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_committed_notebook_is_what_code_and_words_give(language):
    import nbformat

    committed = (NOTEBOOKS / f"tutorial.{language}.ipynb").read_text()
    assert committed == nbformat.writes(build(language)) + "\n"


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_tutorial_takes_from_the_library_only_what_is_public(language):
    taken = [
        (node.module, name.name)
        for cell in build(language).cells
        if cell.cell_type == "code"
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "kvbench"
        for name in node.names
    ]
    assert {module for module, _ in taken} == {"kvbench"}
    assert {name for _, name in taken} <= set(kvbench.__all__)
    assert all(getattr(kvbench, name) for _, name in taken)


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_line_that_installs_the_tutorial_asks_for_what_its_cells_need(language):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert '%pip install "kvbench[tutorial] @ git+' in build(language).cells[0].source
    packages = project["dependencies"] + project["optional-dependencies"]["tutorial"]
    names = {re.match(r"[\w-]+", package)[0] for package in packages}
    assert {"matplotlib", "pandas", "psutil", "torch", "transformers"} <= names
    assert encoder.EMBEDDED in names


@pytest.fixture
def small(tmp_path):
    """A tutorial of two cells."""

    def small(code: str, words: str):
        (tmp_path / "t.py").write_text(code)
        (tmp_path / "t.md").write_text(words)
        return tutorial.build(tmp_path / "t.py", tmp_path / "t.md", "en")

    return small


CODE = "# %% one\nx = 20\nprint('{{ word }}', x)\n\n# %% two\nx + 1\n"
WORDS = "---\nword: twenty\n---\n# Title\n\n<!-- cell: one -->\n\nText.\n\n<!-- cell: two -->\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (WORDS.replace("<!-- cell: two -->", ""), "two"),
        (WORDS + "\n<!-- cell: one -->\n", "one"),
        (WORDS + "\n<!-- cell: three -->\n", "three"),
        (WORDS.replace("word: twenty", "other: x"), "word"),
        (WORDS.removeprefix("---"), "labels"),
    ],
)
def test_words_that_do_not_fit_the_code_are_refused_in_one_line(small, words, named):
    with pytest.raises(InputError, match=named) as error:
        small(CODE, words)
    assert "\n" not in str(error.value)


def test_a_run_stores_outputs_and_makes_a_page_that_needs_no_network(small, tmp_path):
    notebook = small(CODE, WORDS)
    tutorial.run(notebook, tmp_path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].outputs[0].text == "twenty 20\n"
    assert cells[1].outputs[0].data["text/plain"] == "21"
    tutorial.write(notebook, tmp_path / "t.ipynb")
    tutorial.page(notebook, tmp_path / "t.html", "pt")
    page = (tmp_path / "t.html").read_text()
    assert "twenty 20" in page
    assert 'lang="pt-BR"' in page
    assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css)', page)


def test_a_cell_that_fails_is_told_in_one_line(small, tmp_path):
    notebook = small(CODE.replace("x + 1", "x / 0"), WORDS)
    with pytest.raises(InputError, match="ZeroDivisionError") as error:
        tutorial.run(notebook, tmp_path)
    assert "\n" not in str(error.value)


def test_a_cell_that_waits_too_long_is_told_in_one_line(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tutorial, "LIMIT_S", 1)
    notebook = small(CODE.replace("x + 1", "import threading; threading.Event().wait()"), WORDS)
    with pytest.raises(InputError, match="longer than 1 s") as error:
        tutorial.run(notebook, tmp_path)
    assert "\n" not in str(error.value)
