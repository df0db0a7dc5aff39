"""Conversations out of notebooks: system prompts and turns, without running anything."""

from __future__ import annotations

import json

import pytest
from kvbench.errors import InputError
from kvbench.inputs import import_scenarios, scenarios
from typer.testing import CliRunner

CODE = """
%pip install something
class Demo:
    def __init__(self):
        self.scenarios = {
            "library_hours": {
                "system_prompt": "You answer for a library. {careful}",
                "turns": ["When do you open?", "And on Sundays?"],
            },
            "shop": {
                "system_prompt": "You answer for a shop.",
                "messages": [
                    {"role": "system", "content": "Ignored."},
                    {"role": "user", "content": "Where is my parcel?"},
                    {"role": "assistant", "content": "On its way."},
                    {"role": "user", "content": "Since when?"},
                ],
            },
            "without_turns": {"system_prompt": "You answer nobody."},
        }
raise RuntimeError("nothing of a notebook may run")
"""


@pytest.fixture
def notebook(tmp_path):
    path = tmp_path / "demo.ipynb"
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {"cell_type": "code", "source": CODE.splitlines(keepends=True)},
    ]
    path.write_text(json.dumps({"cells": cells, "nbformat": 4}), encoding="utf-8")
    return path


def test_system_prompts_and_turns_are_found_and_empty_ones_left_out(notebook):
    library, shop = import_scenarios.read(notebook)
    assert (library.name, library.system) == (
        "library_hours",
        "You answer for a library. {careful}",
    )
    assert [turn["user"] for turn in library.turns] == ["When do you open?", "And on Sundays?"]
    assert shop.turns == (
        {"user": "Where is my parcel?", "reference": "On its way."},
        {"user": "Since when?"},
    )


@pytest.mark.parametrize("ending", ["py", "txt"])
def test_exports_as_script_and_as_text_are_read_too(tmp_path, ending):
    path = tmp_path / f"demo.{ending}"
    code = CODE.replace("%pip install something\n", "").replace(" {careful}", "")
    path.write_text(code if ending == "py" else f"Page 1 of 3\n{code}\nIn [2]: done", "utf-8")
    assert [one.name for one in import_scenarios.read(path)] == ["library_hours", "shop"]


def test_the_files_written_are_scenarios_with_ids_of_their_own(notebook, tmp_path):
    folder = tmp_path / "scenarios"
    folder.mkdir()
    paths = import_scenarios.write(import_scenarios.read(notebook), folder, "imported", "en")
    assert [path.name for path in paths] == ["imported_library_hours.yaml", "imported_shop.yaml"]
    loaded = scenarios.load(paths[0])
    assert loaded.length == 2 and loaded.turns[0].reference == ""
    with pytest.raises(InputError, match="is there already"):
        import_scenarios.write(import_scenarios.read(notebook), folder, "imported", "en")


def test_a_conversation_without_replies_is_prepared_and_not_scored(notebook, tmp_path, tiny_folder):
    from kvbench.inputs import tokens

    paths = import_scenarios.write(import_scenarios.read(notebook), tmp_path, "imported", "en")
    document = tokens.prompts(tiny_folder, scenarios.load(paths[0]))
    assert document["references"] == [] and len(document["next"]) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.ipynb", "not json", "not a notebook"),
        ("a.ipynb", '{"cells": []}', "no conversation found"),
        ("a.py", "x = 1\n", "no conversation found"),
        ("absent.ipynb", None, "there is no such file"),
    ],
)
def test_what_is_no_notebook_ends_in_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        import_scenarios.read(path)
    assert "\n" not in str(caught.value)


def test_the_command_names_what_it_wrote(notebook, tmp_path):
    from kvbench.cli import app

    done = CliRunner().invoke(
        app, ["import-scenarios", str(notebook), "--folder", str(tmp_path), "--prefix", "mine"]
    )
    assert done.exit_code == 0, done.output
    assert "mine_shop.yaml" in done.output.replace("\n", "")
