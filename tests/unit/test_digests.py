"""Digests of code: every edit that can change a job's result changes its digest, and no other edit."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from kvbench import figures, strategies, studies
from kvbench.records import digests
from kvbench.records.digests import Library

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"


def library_of(root: Path, files: dict[str, str]) -> Library:
    """A library of a few files; names are modules, ``pkg/`` a package's own page."""
    for name, text in files.items():
        path = root / (f"{name}__init__.py" if name.endswith("/") else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Library(root)


def closure(root: Path, files: dict[str, str], **how: object) -> list[str]:
    return list(library_of(root, files).closure("kvbench.start", **how))


def test_a_lazy_import_counts_and_one_for_type_checkers_does_not(tmp_path):
    files = {
        "kvbench/start": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvbench import typed\n"
            "def f():\n    from kvbench.late import g\n    return g\n"
        ),
        "kvbench/typed": "",
        "kvbench/late": "import numpy, kvbench.last\n",
        "kvbench/last": "",
        "kvbench/unused": "",
    }
    assert closure(tmp_path, files) == ["kvbench.last", "kvbench.late", "kvbench.start"]


def test_relative_imports_are_followed(tmp_path):
    files = {
        "kvbench/start": "from kvbench.a import b\n",
        "kvbench/a/": "",
        "kvbench/a/b": "from . import c\nfrom ..d import e\n",
        "kvbench/a/c": "",
        "kvbench/d": "",
    }
    found = closure(tmp_path, files)
    assert found == ["kvbench.a.b", "kvbench.a.c", "kvbench.d", "kvbench.start"]


def test_a_registry_stands_for_all_its_modules_unless_one_is_named(tmp_path):
    files = {
        "kvbench/start": "from kvbench import registry\n",
        "kvbench/registry/": "from importlib import import_module\nimport_module(f'{__name__}.{x}')\n",
        "kvbench/registry/one": "",
        "kvbench/registry/two": "",
    }
    every = ["kvbench.registry", "kvbench.registry.one", "kvbench.registry.two", "kvbench.start"]
    assert closure(tmp_path, files) == every
    only = {"kvbench.registry": ["kvbench.registry.two"]}
    assert closure(tmp_path, files, only=only) == [
        name for name in every if not name.endswith("one")
    ]


def test_taking_a_module_of_a_registry_takes_no_sibling(tmp_path):
    files = {
        "kvbench/start": "from kvbench.registry.one import x\n",
        "kvbench/registry/": "from importlib import import_module\nimport_module(f'{__name__}.{x}')\n",
        "kvbench/registry/one": "",
        "kvbench/registry/two": "",
    }
    assert closure(tmp_path, files) == ["kvbench.registry.one", "kvbench.start"]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("x = 1  # a comment\n", True),
        ('"""Words."""\n\nx = (\n    1\n)\n', True),
        ("x = 2\n", False),
        ("x = '1'\n", False),
        ("x = None\n", False),
        ("x = 1\ndef f(): pass\n", False),
    ],
)
def test_comments_docstrings_and_line_breaks_change_no_digest(tmp_path, text, same):
    digest = [
        library_of(tmp_path / str(number), {"kvbench/start": source}).digest("kvbench.start")
        for number, source in enumerate(["x = 1\n", text])
    ]
    assert (digest[0] == digest[1]) is same


def test_a_file_that_moved_changes_the_digest(tmp_path):
    first = library_of(tmp_path / "a", {"kvbench/start": "import kvbench.b\n", "kvbench/b": ""})
    second = library_of(tmp_path / "b", {"kvbench/start": "import kvbench.c\n", "kvbench/c": ""})
    assert first.digest("kvbench.start") != second.digest("kvbench.start")


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('{"description": "a", "minimum": 1}', '{"description": "b", "minimum": 1}', True),
        ('{"description": "a", "minimum": 1}', '{"description": "a", "minimum": 2}', False),
        (
            '{"properties": {"title": {"type": "string"}}}',
            '{"properties": {"title": {"type": "number"}}}',
            False,
        ),
    ],
)
def test_a_schema_counts_without_its_words(tmp_path, old, new, same):
    digest = []
    for number, text in enumerate([old, new]):
        root = tmp_path / str(number)
        (root / "schemas").mkdir(parents=True)
        (root / "schemas" / "thing.schema.json").write_text(text)
        source = "from kvbench import documents\ndocuments.check({}, 'thing', 'x')\n"
        files = {"kvbench/start": source, "kvbench/documents": ""}
        digest.append(library_of(root, files).digest("kvbench.start"))
    assert (digest[0] == digest[1]) is same


def test_a_shipped_file_that_code_names_counts(tmp_path):
    root = tmp_path / "workflow"
    (tmp_path / "resources" / "texts").mkdir(parents=True)
    data = tmp_path / "resources" / "texts" / "all.jsonl"
    source = (
        "from kvbench.layout import shipped\nD = shipped('resources') / 'texts' / 'all.jsonl'\n"
    )
    found = []
    for text in ("one", "two"):
        data.write_text(text)
        files = {"kvbench/start": source, "kvbench/layout": ""}
        found.append(library_of(root, files).digest("kvbench.start"))
    assert found[0] != found[1]


def test_a_shipped_folder_that_code_names_counts_but_not_the_prose_in_it(tmp_path):
    root, folder = tmp_path / "workflow", tmp_path / "resources" / "lists"
    folder.mkdir(parents=True)
    source = "from kvbench.layout import shipped\nD = shipped('resources') / 'lists'\n"
    found = []
    for name, text in (("en.yaml", "one"), ("README.md", "prose"), ("pt.yaml", "two")):
        (folder / name).write_text(text)
        files = {"kvbench/start": source, "kvbench/layout": ""}
        found.append(library_of(root, files).digest("kvbench.start"))
    assert found[0] == found[1] != found[2]


# The library itself ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """Which digests differ after an edit of one file, in a copy of the library."""
    root = tmp_path_factory.mktemp("edited") / "workflow"
    shutil.copytree(WORKFLOW, root, ignore=shutil.ignore_patterns("__pycache__"))
    # Files beside the folder that modules name.
    for beside in ("config", "resources"):
        (root.parent / beside).symlink_to(WORKFLOW.parent / beside)
    before = all_digests()

    def edited(name: str, change=lambda text: f"{text}\nEDITED = 1\n") -> dict[str, set[str]]:
        path = root / name
        text = path.read_text(encoding="utf-8")
        path.write_text(change(text), encoding="utf-8")
        try:
            with pytest.MonkeyPatch.context() as patch:
                copy = Library(root)
                patch.setattr(digests, "library", lambda: copy)
                after = all_digests()
        finally:
            path.write_text(text, encoding="utf-8")
        return {
            kind: {name for name in before[kind] if before[kind][name] != after[kind][name]}
            for kind in before
        }

    return edited


def all_digests() -> dict[str, dict[str, str]]:
    """The digest of every job, computed anew."""
    scripts = [path.stem for path in (WORKFLOW / "scripts").glob("[!_]*.py")]
    return {
        "strategies": {n: digests.of_strategy.__wrapped__(n) for n in strategies.names()},
        "studies": {n: digests.of_study.__wrapped__(n) for n in studies.names()},
        "figures": {n: digests.of_figure.__wrapped__(n) for n in figures.names()},
        "scripts": {n: digests.of_script.__wrapped__(n) for n in scripts},
    }


def test_an_import_by_name_says_which_package():
    """What it begins with is read; a name from elsewhere would escape the digests."""
    library = Library(WORKFLOW)
    scripts = [path for path in (WORKFLOW / "scripts").glob("*.py") if path.stem != "_job"]
    behind = {name for path in scripts for name in library.closure(script=path.stem)}
    files = [*scripts, *(library.paths[name] for name in behind if name in library.paths)]
    for path in files:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
                begins, _ = digests._beginning(node.args[0], "kvbench.x")
                assert begins, f"{path}: {ast.unparse(node)}"


def test_every_job_has_a_digest():
    found = [digest for kind in all_digests().values() for digest in kind.values()]
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in found)


def test_editing_a_strategy_measures_that_file_s_strategies_only(edited):
    changed = edited("kvbench/strategies/window.py")
    inside = {
        name
        for name in strategies.names()
        if type(strategies.get(name)).__module__ == "kvbench.strategies.window"
    }
    assert changed["strategies"] == inside
    assert changed["studies"] == set()


def test_editing_the_base_of_all_strategies_measures_all(edited):
    assert edited("kvbench/strategies/base.py")["strategies"] == set(strategies.names())


def test_editing_the_physics_that_a_record_holds_measures_anew(edited):
    name = "kvbench/physics/__init__.py"
    assert edited(name)["strategies"] == set(strategies.names())


@pytest.mark.parametrize(
    "name",
    ["kvbench/figures/style.py", "kvbench/paper/sections.py", "kvbench/commands/doctor.py"],
)
def test_editing_what_only_shows_or_serves_measures_nothing(edited, name):
    changed = edited(name)
    assert (changed["strategies"], changed["studies"]) == (set(), set())


def test_editing_the_proxy_measures_the_studies_that_start_it(edited):
    changed = edited("kvbench/caching/proxy/__init__.py")
    assert changed["studies"] == {"llm_api", "endpoint"}
    assert changed["strategies"] == set()


def test_editing_a_policy_measures_the_studies_that_use_it(edited):
    changed = edited("kvbench/caching/policies.py")
    assert "eviction" in changed["studies"]
    assert "memoization" not in changed["studies"]
    assert changed["strategies"] == set()


def test_editing_the_sections_of_the_paper_redoes_values_and_text(edited):
    assert {"collect_values", "render_paper"} <= edited("kvbench/paper/sections.py")["scripts"]


def test_editing_a_figure_draws_that_figure_only(edited):
    changed = edited("kvbench/figures/kv_latency.py")
    assert changed["figures"] == {"kv_latency"}
    assert changed["scripts"] <= {"draw_figures"}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("kvbench/documents.py", {"strategies", "studies", "figures", "scripts"}),
        ("kvbench/records/__init__.py", {"strategies", "studies", "scripts"}),
        ("kvbench/records/gathering.py", {"figures", "scripts"}),
    ],
)
def test_editing_the_ground_floor_redoes_what_stands_on_it(edited, name, kinds):
    changed = edited(name)
    assert {kind for kind, names in changed.items() if names} >= kinds


@pytest.mark.parametrize("name", ["kvbench/strategies/dynamic.py", "kvbench/documents.py"])
def test_a_comment_redoes_nothing(edited, name):
    assert not any(edited(name, lambda text: f"{text}\n# Words for readers.\n").values())


@pytest.mark.parametrize(
    ("schema", "measured"), [("kv-cell", "strategies"), ("app-cell", "studies")]
)
def test_another_contract_of_records_measures_and_reads_anew(edited, schema, measured):
    def stricter(text: str) -> str:
        return json.dumps({**json.loads(text), "minProperties": 1})

    changed = edited(f"schemas/{schema}.schema.json", stricter)
    assert changed[measured]
    assert not changed[{"strategies": "studies", "studies": "strategies"}[measured]]
    assert "aggregate_kv" in changed["scripts"]
